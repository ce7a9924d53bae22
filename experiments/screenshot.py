"""A picture of a page, for the README: needs chromium (or chrome) on the PATH.

python experiments/screenshot.py run/report.html docs/report.png --width 1280 --height 2000 --dark
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MIN_WINDOW = 500  # chromium makes no narrower window, so a narrow page is put into a frame
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=15000"
)


def screenshot(page: str | Path, out: str | Path, width: int = 1280, height: int = 1600, dark: bool = False) -> Path:
    """Picture of a local file or URL at `width` x `height` CSS pixels, saved as PNG at `out`.

    Raises FileNotFoundError when no browser is installed, RuntimeError when the browser made no picture.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"no browser found; install one of {', '.join(BROWSERS)}")
    out = Path(out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    url = str(page) if "://" in str(page) else Path(page).resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        if width < MIN_WINDOW:
            frame = f'<body style="margin:0"><iframe src="{url}" style="border:0;width:{width}px;height:{height}px">'
            wrapper = Path(folder, "narrow.html")
            wrapper.write_text(f"<!DOCTYPE html><meta name=color-scheme content='light dark'>{frame}</iframe>")
            url = wrapper.as_uri()
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        size = f"--window-size={max(width, MIN_WINDOW)},{height}"
        command = [
            browser,
            *FLAGS.split(),
            scheme,
            size,
            f"--user-data-dir={folder}/profile",
            f"--screenshot={out}",
            url,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not out.is_file():
        raise RuntimeError(f"{browser} made no picture of {url}: {done.stderr.strip()[-400:]}")
    return out


def main() -> int:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description="Picture of a page.")
    parser.add_argument("page", help="a local file or a URL")
    parser.add_argument("out", help="where the PNG goes")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1600)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    print(screenshot(args.page, args.out, args.width, args.height, args.dark))
    return 0


if __name__ == "__main__":
    sys.exit(main())
