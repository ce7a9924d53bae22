"""`emocircuits serve`: check the options, listen at once, load the model meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from .engine import Engine

DEFAULT_KEY_VARIABLE = "EMOCIRCUITS_API_KEY"
SHUTDOWN_SECONDS = 10
"""How long answers in progress may go on after Ctrl-C."""


def check_packages() -> None:
    """Raise MissingPackageError, with the pip command, where the server's packages are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f'the server needs {" and ".join(missing)}; run: pip install "emocircuits[serve]"')


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable (None: in the default one, if it is set); InputError for an empty one."""
    key = os.environ.get(variable or DEFAULT_KEY_VARIABLE)
    if key is None and variable is None:
        return None
    if not key or not key.strip():
        raise InputError(f"the environment variable {variable or DEFAULT_KEY_VARIABLE} holds no API key; set it")
    return key.strip()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, key: str | None, allow_open: bool) -> None:
    """Refuse to be open to a network by accident."""
    if not is_loopback(host) and key is None and not allow_open:
        raise InputError(
            f"listening on {host} lets others in; set {DEFAULT_KEY_VARIABLE}, or pass --allow-open if that is wanted"
        )


def served_name(model: str) -> str:
    """The name by which clients ask for a model: never the path of a folder on this machine."""
    return Path(model).resolve().name if Path(model).expanduser().exists() else model


def serve(args: argparse.Namespace) -> None:
    """Serve until interrupted. Raises EmocircuitsError for what cannot work, also when loading fails."""
    check_packages()
    import uvicorn

    from .app import create_app
    from .engine import Limits
    from .registry import Registry

    key = api_key(args.api_key_env)
    check_reach(args.host, key, args.allow_open)
    if args.max_body_bytes < 1 or not args.max_strength > 0:
        raise InputError("--max-body-bytes and --max-strength must be above 0")
    limits = Limits(args.max_batch, args.max_queue, args.max_tokens)
    registry = Registry.load(args.steerer, args.max_strength)
    name = args.name or served_name(args.model)
    hosts = ["localhost", "127.0.0.1", "[::1]", args.host] if is_loopback(args.host) else None
    app = create_app(model_name=name, api_key=key, max_body_bytes=args.max_body_bytes, hosts=hosts)
    listening = _listen(args.host, args.port)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    server = uvicorn.Server(config)
    loader = _Loader(app, server, args.model, registry, limits)
    loader.start()
    where = f"[{args.host}]" if ":" in args.host else args.host
    sys.stdout.write(f"serving {name!r} at http://{where}:{listening.getsockname()[1]}/v1 (Ctrl-C stops)\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):  # the ordinary end of a server
        server.run(sockets=[listening])
    loader.finish()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from error


@contextlib.contextmanager
def background(app: Any) -> Iterator[str]:
    """Serve an application from a thread, at a free port of this machine; yields its address (ending in /v1)."""
    check_packages()
    import uvicorn

    listening = _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


class _Loader(threading.Thread):
    """Loads the model while the server answers "loading"; stops the server when that fails."""

    def __init__(self, app: Any, server: Any, model: str, registry: Any, limits: Any) -> None:
        super().__init__(name="emocircuits-loader", daemon=True)
        self._app, self._server, self._given = app, server, (model, registry, limits)
        self.error: BaseException | None = None
        self.engine: Engine | None = None

    def run(self) -> None:
        from ..models.load import load
        from .engine import Engine

        model, registry, limits = self._given
        try:
            self.engine = self._app.state.engine = Engine(load(model), registry, limits)
        except BaseException as error:
            self.error, self._server.should_exit = error, True

    def finish(self) -> None:
        """Close the engine; raises what loading raised."""
        if self.error is not None:
            raise self.error
        if self.engine is not None:
            self.engine.close()
