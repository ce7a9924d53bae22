"""`emocircuits explore`: the dashboards in the browser, served by Streamlit to this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .errors import InputError, MissingPackageError

HOST = "127.0.0.1"
OPTIONS = {
    "server.address": (HOST,),
    "server.allowedHosts": ("localhost", HOST),  # no other site's name may lead here
    "server.showEmailPrompt": ("false",),
    "server.fileWatcherType": ("none",),
    "browser.gatherUsageStats": ("false",),
    "client.toolbarMode": ("viewer",),
    "client.showErrorLinks": ("false",),
    "theme.light.primaryColor": ("#6B4FD8",),  # one colour for both would be one theme: always light
    "theme.dark.primaryColor": ("#A594F9",),
}


def command(folder: Path, port: int | None = None, browser: bool = True) -> list[str]:
    """The command that serves the explorer of a run folder (or of a folder of runs).

    Raises MissingPackageError without Streamlit, InputError for no folder or a port that is taken.
    """
    if find_spec("streamlit") is None:
        raise MissingPackageError("the explorer needs another package: pip install 'emocircuits[dashboard]'")
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}; make one with `emocircuits demo --out {folder}`")
    if port is not None and not _free(port):
        raise InputError(f"port {port} is taken or not allowed; choose another --port")
    options = {**OPTIONS, "server.headless": (str(not browser).lower(),)}
    if port is not None:
        options["server.port"] = (str(port),)
    flags = [part for name, values in options.items() for value in values for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(_app()), *flags, "--", str(folder.resolve())]


def explore(folder: Path, port: int | None = None, browser: bool = True) -> None:
    """Serve until Ctrl-C or SIGTERM, to be called in the main thread.

    Raises as `command` does, and InputError when the server stops by itself with an error.
    """
    given = command(folder, port, browser)
    paths = [str(_app().parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(given, env=environment) as server:
        before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # the server would outlive us
        try:
            code = server.wait()
        except KeyboardInterrupt:  # the server got it, too, and is stopping
            return
        finally:
            signal.signal(signal.SIGTERM, before)
    if code > 0:  # below 0 it was told to stop
        raise InputError(f"the explorer's server stopped with exit code {code}; the lines above say why")


def _app() -> Path:
    """The dashboards' entry point, found without importing it."""
    found = find_spec("dashboards")
    folders = list(found.submodule_search_locations or ()) if found else []
    app = next((p for f in folders if (p := Path(f, "app.py")).is_file()), None)
    if app is None:
        raise MissingPackageError("the explorer's pages are not installed: pip install 'emocircuits[dashboard]'")
    return app


def _free(port: int) -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError):
        return False
    return True
