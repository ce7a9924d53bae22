"""The pictures of the README and of the guide, from real runs: the report, and the explorer's pages in a browser.

python experiments/pictures.py --runs runs --out docs/images

Needs chromium (or chrome) on the PATH. Runs are looked for in --runs, then among the results in the repository. The
report and the playground need `make demo`, the trace `emocircuits anchors --out runs/anchors`; else they are left out.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import chromium

HERE = "127.0.0.1"
SLOW = 60.0


@dataclass(frozen=True)
class Shot:
    """One picture of the explorer: a page of a run, at a height, after something was pressed and has come true."""

    name: str
    run: str
    page: str
    height: int = 1000
    press: str = ""
    then: str = ""


RESULTS = Path(__file__).parent / "results"
SHOTS = (
    Shot("overview", "demo", "?", 1100),
    Shot("directions", "demo", "directions?view=Quality", 1200),
    Shot("circuits", "circuits", "circuits?emotion=fear", 1200),
    Shot("reasoning", "anchors", "reasoning?step=2", 1300),
    Shot("modality", "nano_mllm", "modality?policy=set+point,+last&strength=0.2", 900),
    Shot("features", "saes", "features?view=Steering", 900),
    Shot("map", "saes", "features?view=Map", 900),
    Shot("steer", "demo", "steer?", 1250, "Write", "document.body.innerText.includes('Perplexity, steered')"),
)


@contextmanager
def explorer(run: Path) -> Iterator[str]:
    """The address of `emocircuits explore` on a run, for as long as the block lasts."""
    port = free_port()
    process = start(run, port)
    try:
        wait_for(port)
        yield f"http://{HERE}:{port}"
    finally:
        process.terminate()
        process.wait(timeout=SLOW)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind((HERE, 0))
        return probe.getsockname()[1]


def start(run: Path, port: int) -> subprocess.Popen[bytes]:
    """The command, as a user starts it."""
    command = [sys.executable, "-m", "emocircuits.cli", "explore", str(run), "--port", str(port), "--no-browser"]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def wait_for(port: int) -> None:
    """Wait until the app answers; raises OSError when it does not within a minute."""
    end = time.monotonic() + SLOW
    while True:
        try:
            with urllib.request.urlopen(f"http://{HERE}:{port}/_stcore/health", timeout=2) as answer:
                if answer.read() == b"ok":
                    return
                raise OSError("the app answers, but not that it is well")
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def take(tab: chromium.Tab, address: str, shot: Shot, out: Path, dark: bool = False, width: int = 1280) -> Path:
    """One picture."""
    tab.look(width, shot.height, dark)
    tab.open(f"{address}/{shot.page}")
    if shot.press:
        tab.js(f"[...document.querySelectorAll('button')].find(b => b.innerText.includes('{shot.press}')).click()")
        tab.wait(shot.then, patience=600)
        tab.wait(chromium.READY)
    return tab.picture(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take every picture whose run is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of your own runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args(arguments)
    with chromium.tab() as tab:
        if (report := args.runs / "demo" / "report.html").is_file():
            tab.look(args.width, 2000, args.dark)
            tab.open(chromium.address(report), chromium.LOADED)
            print(tab.picture(args.out / "demo.png"))
        for shot in SHOTS:
            places = [args.runs / shot.run] if shot.press else [args.runs / shot.run, RESULTS / shot.run]
            if (run := next((place for place in places if place.is_dir()), None)) is None:
                print(f"{shot.name}: there is no run {places[0]}")
                continue
            with explorer(run) as address:
                print(take(tab, address, shot, args.out / f"{shot.name}.png", args.dark, args.width))


if __name__ == "__main__":
    main()
