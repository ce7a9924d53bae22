"""A headless Chromium tab, driven through its own debugging protocol (websockets come with Streamlit).

python experiments/chromium.py runs/demo/report.html report.png --width 1280 --height 2000 --dark
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)
PATIENCE = 30.0
READY = """(() => {
  const app = document.querySelector('[data-testid="stApp"]');
  const charts = document.querySelectorAll('[data-testid="stPlotlyChart"]').length;
  const drawn = document.querySelectorAll('.js-plotly-plot .main-svg').length;
  const done = app && app.dataset.testScriptState === 'notRunning' && document.querySelector('h2');
  return Boolean(done && !document.querySelector('[data-testid="stSkeleton"]') && (!charts || drawn));
})()"""
LOADED = """(() => {
  const plots = document.querySelectorAll('.plot').length, drawn = document.querySelectorAll('.main-svg').length;
  return document.readyState === 'complete' && (!plots || drawn > 0);
})()"""


def browser() -> str | None:
    """Where Chromium (or Chrome) is; None where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Tab:
    """One page. requests: every address that it asked for. errors: what its console and its scripts complained of."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; raises RuntimeError when the browser refuses it."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            self._note(message.get("method"), message.get("params", {}))
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        elif event == "Runtime.consoleAPICalled" and about["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def look(self, width: int = 1280, height: int = 1600, dark: bool = False) -> None:
        """Set the window and the colour scheme the reader prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str, ready: str = READY) -> None:
        """Go to an address and wait until the app (or whatever `ready` says) has been drawn."""
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def wait(self, condition: str, patience: float = PATIENCE) -> None:
        """Wait until an expression has been true twice in a row; raises TimeoutError with the page's words."""
        end, seen = time.monotonic() + patience, 0
        while seen < 2:
            seen = seen + 1 if self.js(condition) else 0
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}; the page says: {self.words()[:2000]}")
            time.sleep(0.3)

    def words(self) -> str:
        """What stands on the page."""
        return str(self.js("document.body.innerText"))

    def click(self, x: float, y: float) -> None:
        """A mouse click at a place of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)
            time.sleep(0.15)  # plotly takes the point under the pointer when it comes to rest

    def picture(self, file: Path) -> Path:
        """The page as PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file


@contextmanager
def tab() -> Iterator[Tab]:
    """A fresh browser with one tab."""
    from websockets.sync.client import connect

    path = browser()
    if path is None:
        raise FileNotFoundError(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [
            path,
            *FLAGS.split(),
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}/profile",
            "about:blank",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_page(Path(folder, "profile", "DevToolsActivePort")), max_size=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE)


def _page(port_file: Path) -> str:
    """The address of the first tab's debugger."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if port_file.is_file() and (lines := port_file.read_text().splitlines()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                pages = [t for t in json.load(answer) if t["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise TimeoutError("the browser opened no debugging port")


def main() -> None:
    """A picture of any page or file."""
    parser = argparse.ArgumentParser(description="Picture of a page.")
    parser.add_argument("page", help="a local file or a URL")
    parser.add_argument("out", type=Path, help="where the PNG goes")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1600)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with tab() as page:
        page.look(args.width, args.height, args.dark)
        page.open(address(args.page), LOADED)
        print(page.picture(args.out))


def address(page: str | Path) -> str:
    """The URL of a page or of a local file."""
    return str(page) if "://" in str(page) else Path(page).resolve().as_uri()


if __name__ == "__main__":
    main()
