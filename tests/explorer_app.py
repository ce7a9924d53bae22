"""The explorer in Streamlit's own test harness: a folder of runs, a page opened on it, and what is on the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_balance, write_run, write_usable_run
from synthetic_studies import write_anchors, write_sae

from emocircuits.artefact import write_json_atomic

testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed: emocircuits[dashboard]")

APP = Path(__file__).parents[1] / "dashboards" / "app.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one whose model loads, a second one, a partial one, and one about modalities."""
    root = tmp_path_factory.mktemp("explorer") / "runs"
    write_usable_run(root / "whole")
    write_run(root / "other", emotions=("anger", "fear", "joy"), layers=4, scenarios=2, seed=1)
    write_json_atomic(root / "partial" / "manifest.json", {"kind": "run", "settings": {"model": "demo"}, "stages": {}})
    write_balance(root / "balance")
    write_anchors(root / "anchors")
    write_sae(root / "sae")
    return root


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens the app on a folder at a page, with what the URL says."""

    def make(folder: Path, view: str = "overview", **query: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["app.py", str(folder)])
        at = testing.AppTest.from_file(str(APP), default_timeout=120)
        for name, value in query.items():
            at.query_params[name] = value
        at.run()
        return at.switch_page(f"views/{view}.py").run() if view != "overview" else at

    return make


def sections(at: Any) -> list[str]:
    """The buttons that change the view of a page."""
    return list(at.segmented_control[0].options) if at.segmented_control else []


def well(at: Any) -> None:
    """No exception, no error, no warning, and a heading."""
    assert not at.exception, at.exception
    assert [e.value for e in (*at.error, *at.warning)] == []
    assert at.header


def said(at: Any) -> str:
    """All words of a page that stand in Markdown or text."""
    kinds = ("markdown", "caption", "text", "code", "error", "warning", "info", "success", "header", "subheader")
    return "\n".join(str(element.value) for kind in kinds for element in getattr(at, kind))
