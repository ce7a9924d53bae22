"""Rollouts over HTTP: from the project's own server, and from servers that are busy, broken, slow or gone."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from served import registry, tiny

from emocircuits.errors import InputError
from emocircuits.reasoning.endpoint import EndpointEngine
from emocircuits.reasoning.engines import Completion, Job, LocalEngine, Sampling
from emocircuits.serving.app import create_app
from emocircuits.serving.engine import Engine, Limits
from emocircuits.serving.run import background

JOBS = [Job("They gave my seat away"[: 8 + 6 * k], k, i) for k in range(3) for i in range(4)]


def named(completions: Any) -> dict[tuple[int, int], Completion]:
    found = list(completions)
    by_name = {(c.boundary, c.index): c for c in found}
    assert len(by_name) == len(found), "no job is answered twice"
    return by_name


# ---------------------------------------------------------------- the project's own server


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Engine]]:
    engine = Engine(tiny(), registry(), Limits(max_batch=5, max_queue=64))
    with background(create_app(engine, model_name="tiny", api_key="secret")) as url:
        yield url, engine
    engine.close()


@pytest.mark.parametrize("stop", [(), ("aa", "G")])
@pytest.mark.parametrize("finished", [None, lambda text: len(text) > 6])
def test_greedy_rollouts_are_those_of_the_local_engine(
    served: tuple[str, Engine], stop: tuple[str, ...], finished: Callable[[str], bool] | None
) -> None:
    url, engine = served
    sampling = Sampling(25, temperature=0, stop=stop)
    there = EndpointEngine(url, "tiny", "secret", concurrency=4)
    loaded = tiny()
    expected = named(LocalEngine(*loaded).complete(JOBS, sampling, finished))
    found = named(there.complete(JOBS, sampling, finished))
    assert {c.finish for c in expected.values()} >= ({"length"} if finished is None else {"answer"})
    for name, c in expected.items():
        whole = c.finish != "answer"
        assert found[name] == (c if whole else replace(c, n_tokens=found[name].n_tokens))
        assert 0 < found[name].n_tokens <= c.n_tokens, "a stream that was left early counts its pieces"
    end = time.monotonic() + 10
    while engine.batch_size:  # a text whose answer is complete is not generated to its end
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_job_has_a_seed_of_its_own(served: tuple[str, Engine]) -> None:
    engine, sampling = EndpointEngine(served[0], "tiny", "secret"), Sampling(12, temperature=5.0, seed=3)
    found = named(engine.complete(JOBS, sampling))
    assert found == named(engine.complete(JOBS[::-1], sampling))
    assert len({c.text for c in found.values()}) == len(JOBS)
    other = named(engine.complete(JOBS, Sampling(12, temperature=5.0, seed=4)))
    assert all(other[name].text != c.text for name, c in found.items())
    assert engine.computed_tokens is None
    assert list(engine.complete([], sampling)) == []


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [("tiny", "wrong", "HTTP 401.*valid api_key"), ("huge", "secret", "HTTP 404.*unknown model.*check base_url and")],
)
def test_what_every_request_would_be_refused_for_ends_the_work(
    served: tuple[str, Engine], model: str, key: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(EndpointEngine(served[0], model, key).complete(JOBS, Sampling(5)))


def test_a_request_that_is_refused_fails_alone(served: tuple[str, Engine]) -> None:
    work = [*JOBS, Job("x" * 300, 3, 0)]
    found = named(EndpointEngine(served[0], "tiny", "secret").complete(work, Sampling(5)))
    assert [name for name, c in found.items() if c.finish == "error"] == [(3, 0)]
    assert "HTTP 400" in found[3, 0].reason
    assert "exceeds the context of 256" in found[3, 0].reason


# ---------------------------------------------------------------- servers that fail


class Flaky(ThreadingHTTPServer):
    """Answers POSTs with `answer(prompt, attempt)`: a status, or the bytes of a body; counts requests."""

    daemon_threads = True
    answer: Callable[[str, int], int | bytes]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.kind = "text/event-stream"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Flaky

    def do_GET(self) -> None:
        self._send(404, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            attempt = self.server.asked[body["prompt"]] = self.server.asked.get(body["prompt"], -1) + 1
            self.server.bodies.append(body)
        answer = self.server.answer(body["prompt"], attempt)
        self._send(*((answer, b"no") if isinstance(answer, int) else (200, answer)))

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", self.server.kind)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    server = Flaky()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def events(*pieces: str, finish: str | None = "stop", done: bool = True, usage: int | None = None) -> bytes:
    """A stream of texts as vLLM sends it."""
    rows: list[dict[str, Any]] = [{"choices": [{"text": p, "finish_reason": None}]} for p in pieces]
    if finish:
        rows.append({"choices": [{"text": "", "finish_reason": finish}]})
    if usage is not None:
        rows.append({"choices": [], "usage": {"completion_tokens": usage}})
    sent = [f"data: {json.dumps(row)}\n\n" for row in rows] + ["data: [DONE]\n\n"] * done
    return ": ping\n\n".join(sent).encode()


def work(n: int) -> list[Job]:
    return [Job(f"prompt {i}", 0, i) for i in range(n)]


def test_busy_broken_and_slow_servers_are_asked_again(flaky: Flaky) -> None:
    first: dict[str, int | bytes] = {
        "prompt 0": 429,
        "prompt 1": 500,
        "prompt 2": events("half", finish=None, done=False),
        "prompt 3": b'data: {"error": {"message": "out of memory"}}\n\n',
        "prompt 4": 503,
    }

    def answer(prompt: str, attempt: int) -> int | bytes:
        if prompt == "prompt 5" and attempt == 0:
            time.sleep(1.0)
        return first[prompt] if attempt == 0 and prompt in first else events(prompt, " said", usage=7)

    flaky.answer = answer
    engine = EndpointEngine(flaky.url, "m", backoff_s=0.01, timeout_s=0.4)
    start = time.monotonic()
    found = named(engine.complete(work(7), Sampling(5)))
    assert found == {(0, i): Completion(0, i, f"prompt {i} said", "stop", 7) for i in range(7)}
    assert flaky.asked == {f"prompt {i}": int(i < 6) for i in range(7)}
    assert time.monotonic() - start >= 1.0, "the wait that the server asked for"


def test_a_job_that_keeps_failing_is_an_error_and_the_others_go_on(flaky: Flaky) -> None:
    flaky.answer = lambda prompt, _: 500 if prompt == "prompt 3" else events("fine", finish="length")
    found = named(EndpointEngine(flaky.url, "m", retries=2, backoff_s=0.01).complete(work(9), Sampling(5)))
    assert {c.finish for name, c in found.items() if name != (0, 3)} == {"length"}
    assert found[0, 3].finish == "error"
    assert "failed 3 times (last: HTTP 500)" in found[0, 3].reason
    assert flaky.asked["prompt 3"] == 2


def test_a_server_that_goes_away_ends_the_work_and_what_came_before_is_given(flaky: Flaky) -> None:
    flaky.answer = lambda prompt, _: events("fine") if int(prompt.split()[1]) < 5 else 503
    engine = EndpointEngine(flaky.url, "m", concurrency=2, retries=1, backoff_s=0.001)
    found: list[Completion] = []

    def collect() -> None:
        for completion in engine.complete(work(60), Sampling(5)):
            found.append(completion)

    with pytest.raises(InputError, match=r"8 rollouts failed one after the other .*HTTP 503.* run this again"):
        collect()
    assert sum(c.text == "fine" for c in found) == 5
    assert len(flaky.asked) < 60


def test_nothing_there_is_one_sentence_before_any_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    engine = EndpointEngine(f"http://127.0.0.1:{port}/v1", "m", backoff_s=100)
    with pytest.raises(InputError, match="nothing answers at .*start the server, or check base_url"):
        list(engine.complete(work(3), Sampling(5)))
    for wrong, message in ((("ftp://x", "m"), "must start with http"), (("http://x", "m", None), "concurrency")):
        with pytest.raises(InputError, match=message):
            EndpointEngine(*wrong, concurrency=0 if message == "concurrency" else 1)


def test_answers_that_are_not_streamed_will_do(flaky: Flaky) -> None:
    flaky.kind = "application/json"
    whole = {"choices": [{"text": "all at once", "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    flaky.answer = lambda *_: json.dumps(whole).encode()
    sampling = Sampling(5, 0.7, 0.9, 20, seed=1, stop=("x",))
    found = named(EndpointEngine(flaky.url + "/", "m").complete(work(1), sampling))
    assert found[0, 0] == Completion(0, 0, "all at once", "length", 3)
    sent = flaky.bodies[0]
    assert 0 <= sent.pop("seed") < 2**31
    assert sent == {
        "model": "m", "prompt": "prompt 0", "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 20,
        "stop": ["x"], "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip


def test_a_stream_is_left_once_the_answer_is_complete(flaky: Flaky) -> None:
    flaky.answer = lambda *_: events("so ", "42", " and", " on", usage=9)
    found = named(EndpointEngine(flaky.url, "m").complete(work(1), Sampling(50), lambda text: "42" in text))
    assert found[0, 0] == Completion(0, 0, "so 42", "answer", 2)


def test_closing_ends_waiting_and_running_requests(flaky: Flaky) -> None:
    flaky.answer = lambda prompt, _: events("fine") if prompt == "prompt 0" else 503
    engine = EndpointEngine(flaky.url, "m", concurrency=3, backoff_s=30)
    running = engine.complete(work(30), Sampling(5))
    assert next(running).text == "fine"
    running.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 5
    while any(t.name.startswith("rollouts") for t in threading.enumerate()):
        assert time.monotonic() < end, "no thread goes on waiting"
        time.sleep(0.01)
    assert sum(flaky.asked.values()) < 10
