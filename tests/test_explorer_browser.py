"""The explorer end to end: its server as the command starts it, and every page in a real browser when there is one.

EMOCIRCUITS_SCREENSHOTS=folder keeps a picture of every page, in both widths and both themes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from pictures import HERE, SLOW, explorer, free_port, start, wait_for
from synthetic_run import write_balance, write_run, write_usable_run
from synthetic_studies import write_anchors, write_sae

from emocircuits import explore
from emocircuits.artefact import write_json_atomic
from emocircuits.data.emotions import EKMAN6
from emocircuits.data.scenarios import ScenarioSet, discovery
from emocircuits.directions import fit
from emocircuits.examples import reply_examples
from emocircuits.models.fingerprint import fingerprint
from emocircuits.reading import read

pytest.importorskip("streamlit", reason="streamlit is not installed: emocircuits[dashboard]")

PAGES = {
    "": "Overview", "directions": "Directions", "circuits": "Circuits", "steer": "Steer", "modality": "Modality",
    "reasoning": "Reasoning", "features": "Features", "compare": "Compare", "about": "About this run",
}  # fmt: skip

BASE_PATH = re.compile(r"404 .*/_stcore/(health|host-config)$")
"""Streamlit's page finds out where the server's root is by asking under its own address first."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `emocircuits explore` on a folder of runs."""
    root = tmp_path_factory.mktemp("browser") / "runs"
    write_usable_run(root / "whole")
    write_run(root / "other", emotions=("anger", "fear", "joy"), layers=4, scenarios=2)
    write_balance(root / "balance")
    write_anchors(root / "anchors")
    write_sae(root / "sae")
    with explorer(root / "whole") as address:
        yield address


@pytest.fixture(scope="module")
def tab(server: str) -> Iterator[chromium.Tab]:
    if chromium.browser() is None:
        pytest.skip(f"no browser is installed: one of {', '.join(chromium.BROWSERS)}")
    with chromium.tab() as opened:
        yield opened


def handshake(port: int, host: str) -> str:
    """The first line of the answer to a request for the app's websocket under a host name."""
    with socket.create_connection((HERE, port), timeout=10) as raw:
        lines = (
            "GET /_stcore/stream HTTP/1.1", f"Host: {host}", "Connection: Upgrade", "Upgrade: websocket",
            "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", "",
        )  # fmt: skip
        raw.sendall("\r\n".join(lines).encode())
        return raw.recv(200).decode(errors="replace").splitlines()[0]


# ------------------------------------------------------------------------------------------------ the server


def test_the_app_answers_this_machine_and_no_other_name(server: str) -> None:
    port = int(server.rsplit(":", 1)[1])
    assert "101" in handshake(port, f"localhost:{port}")
    assert "403" in handshake(port, "evil.example")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass  # another address of this machine than the one the server is bound to


def test_ctrl_c_ends_the_command_without_a_trace(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "one", layers=4, scenarios=1)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from emocircuits.cli import main; sys.exit(main(['explore', {str(run)!r}, "
         f"'--port', '{port}', '--no-browser']))"], start_new_session=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(explore._app().parents[1])},
    )  # fmt: skip
    wait_for(port)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and its server
    _, error = process.communicate(timeout=SLOW)
    assert process.returncode == 0
    assert b"Traceback" not in error


def test_a_terminated_command_takes_its_server_along(tmp_path: Path) -> None:
    port = free_port()
    process = start(write_run(tmp_path / "runs" / "one", layers=4, scenarios=1), port)
    wait_for(port)
    process.terminate()
    assert process.wait(timeout=SLOW) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HERE, port), timeout=5).close()


# ------------------------------------------------------------------------------------------------ the browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_without_an_exception_fits_and_asks_nothing_of_other_machines(
    tab: chromium.Tab, server: str, page: str, width: int
) -> None:
    tab.errors.clear()
    tab.requests.clear()
    tab.look(width)
    tab.open(f"{server}/{page}?run=whole")
    for theme in ("light", "dark"):
        tab.look(width, dark=theme == "dark")  # the page follows at once
        tab.wait(chromium.READY)
        if folder := os.environ.get("EMOCIRCUITS_SCREENSHOTS"):
            tab.picture(Path(folder, f"{page or 'overview'}-{width}-{theme}.png"))
        assert PAGES[page] in tab.words()
        assert not tab.js("""document.querySelectorAll('[data-testid="stException"]').length""")
        assert not tab.js("""document.querySelectorAll('[data-testid="stAlertContentError"]').length""")
        ground = tab.js("""getComputedStyle(document.querySelector('[data-testid="stApp"]')).backgroundColor""")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 128) == (theme == "dark")
        main = """document.querySelector('[data-testid="stMain"]')"""
        assert tab.js(f"{main}.scrollWidth <= {main}.clientWidth + 1")
    assert [e for e in tab.errors if not BASE_PATH.search(e)] == []
    assert tab.requests
    assert [url for url in tab.requests if not url.startswith((server, "data:", "blob:"))] == []


def test_a_click_on_a_head_shows_it_and_puts_it_into_the_url(tab: chromium.Tab, server: str) -> None:
    """Not the head that is shown by default: that one needs no place in the URL."""
    tab.look()
    tab.open(f"{server}/circuits?run=whole&unit=h0.0")
    place = tab.js("""(() => {
        const plot = document.querySelector('.js-plotly-plot'), {xaxis, yaxis} = plot._fullLayout;
        const box = plot.getBoundingClientRect();
        return [box.left + xaxis._offset + xaxis.l2p(1), box.top + yaxis._offset + yaxis.l2p(1)];
    })()""")
    tab.click(*place)
    tab.wait("document.body.innerText.includes('Head 1 of layer 1')")
    tab.wait("location.search.includes('unit=h1.1')")


def test_a_click_on_a_row_shows_the_neuron_and_puts_it_into_the_url(tab: chromium.Tab, server: str) -> None:
    tab.look()
    tab.open(f"{server}/circuits?run=whole&view=Neurons")
    tab.wait("""document.querySelector('[data-testid="stDataFrame"] canvas') !== null""")
    place = tab.js("""(() => {
        const box = document.querySelector('[data-testid="stDataFrame"] canvas').getBoundingClientRect();
        return [box.left + 0.7 * box.width, box.top + 3 * 35 + 17];
    })()""")
    tab.click(*place)
    tab.wait("location.search.includes('unit=n')")
    unit = tab.js("new URLSearchParams(location.search).get('unit')")
    layer, number = unit[1:].split(".")
    tab.wait(f"document.body.innerText.includes('Neuron {number} of layer {layer}')")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("figure", "across", "down", "step"), [(0, 3, 0.0, 3), (1, 1, 0, 0)], ids=["bars", "words"])
def test_a_click_on_a_step_chooses_it(
    tab: chromium.Tab, server: str, figure: int, across: float, down: float, step: int, width: int
) -> None:
    """Anywhere in a step's column, and on any of its words; the first step needs no place in the URL."""
    tab.look(width)
    tab.open(f"{server}/reasoning?run=anchors&step=1")
    place = tab.js(f"""(() => {{
        const plot = document.querySelectorAll('.js-plotly-plot')[{figure}], {{xaxis, yaxis}} = plot._fullLayout;
        const box = plot.getBoundingClientRect();
        return [box.left + xaxis._offset + xaxis.l2p({across}), box.top + yaxis._offset + yaxis.l2p({down})];
    }})()""")
    tab.click(*place)
    tab.wait(f"[...document.querySelectorAll('h3')].some(h => h.innerText === 'Step {step}')")
    tab.wait(f"(new URLSearchParams(location.search).get('step') ?? '0') === '{step}'")
    tab.wait(chromium.READY)
    assert not tab.js("""document.querySelectorAll('[data-testid="stAlert"]').length""")


def test_writing_in_the_playground(tab: chromium.Tab, server: str) -> None:
    tab.look()
    tab.open(f"{server}/steer?run=whole&prompt=the+dog+ran&tokens=8")
    tab.js("""[...document.querySelectorAll('button')].find(b => b.innerText.includes('Write')).click()""")
    tab.wait("document.body.innerText.includes('Perplexity, steered')")
    tab.wait(chromium.READY)
    assert not tab.js("""document.querySelectorAll('[data-testid="stException"]').length""")


# ------------------------------------------------------------------------------------------------ the demo model


@pytest.fixture(scope="module")
def demo_run(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose directions and steerer are the demo model's own, from a few scenarios; it is loaded as "demo"."""
    emotions = EKMAN6
    path = write_run(tmp_path_factory.mktemp("demo") / "runs" / "demo", emotions=emotions, layers=18, scenarios=2)
    manifest = json.loads((path / "manifest.json").read_text())
    write_json_atomic(path / "manifest.json", manifest | {"settings": manifest["settings"] | {"model": "demo"}})
    some = ScenarioSet(tuple(discovery())[:6])
    made = fit(read(*demo, reply_examples(some, emotions)), emotions, fingerprint=fingerprint(demo.model))
    made.save(path / "directions_response_mean.safetensors")
    made.steerer("fear", 0.012, list(range(4, 14))).save(path / "steerers" / "fear.safetensors")
    return path


@pytest.mark.real_model
def test_the_demo_model_writes_and_reads_in_the_browser(tab: chromium.Tab, demo_run: Path) -> None:
    with explorer(demo_run) as address:
        tab.errors.clear()
        tab.look()
        tab.open(f"{address}/steer?tokens=8&temperature=0.0")
        press = "[...document.querySelectorAll('button')].find(b => b.innerText.includes('%s')).click()"
        tab.js(press % "Write")
        tab.wait("document.body.innerText.includes('Perplexity, steered')", patience=180)
        tab.wait(chromium.READY)
        tab.open(f"{address}/directions?view=Read+a+text&text=I+am+so+afraid.&emotion=fear")
        tab.js(press % "Read it")
        tab.wait("document.body.innerText.includes('fear at layer')", patience=180)
        tab.wait(chromium.READY)
        assert not tab.js("""document.querySelectorAll('[data-testid="stException"]').length""")
        assert not tab.js("""document.querySelectorAll('[data-testid="stAlert"]').length""")
        assert [e for e in tab.errors if not BASE_PATH.search(e)] == []
