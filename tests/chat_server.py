"""A local OpenAI-compatible chat endpoint for tests, which answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            status, said = self.server.answer(body)
        reply = {"choices": [{"message": {"content": said}}]}
        data = said if isinstance(said, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "3")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        pass


@contextmanager
def chat_server() -> Iterator[Any]:
    """A server with `url`, the `requests` so far as (path, headers, body), and `answer`, which a test sets.

    `answer(body)` returns (status, reply): the reply of the model as text, or the raw bytes of the whole response.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.lock, server.requests = threading.Lock(), []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(body: Any) -> str:
    """The one message of a request."""
    (message,) = body["messages"]
    return message["content"]


def material(body: Any) -> Any:
    """What a request quotes under "Material"."""
    return json.loads(asked(body).split("\n\nMaterial:\n", 1)[1])
