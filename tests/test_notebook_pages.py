"""Pages of notebooks: what a run showed stands under its cell, unless the notebook was changed after it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

SOURCE = Path(__file__).parents[1] / "docs" / "_gen" / "notebooks.py"


def pages() -> Any:
    spec = importlib.util.spec_from_file_location("notebook_pages", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(path: Path, code: str, outputs: list[Any]) -> Path:
    text = {"cell_type": "markdown", "source": ["# Title\n", "Lead."]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": [text, {"cell_type": "code", "source": [code], "outputs": outputs}]}))
    return path


def test_what_a_run_showed_stands_under_its_cell(tmp_path: Path) -> None:
    figure = json.loads(go.Figure(go.Bar(y=[1], name="</script><b>")).to_json() or "")
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["<b>\x1b[1mbold\n", "\n", "next"]},
        {"output_type": "stream", "name": "stderr", "text": ["Loading weights"]},
        {"output_type": "display_data", "data": {"text/plain": "<IPython.core.display.HTML object>"}},
        {"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": figure}},
        {"output_type": "execute_result", "data": {"text/plain": ["0.5"]}},
    ]
    kept = written(tmp_path / "a.ipynb", "1 + 1", [])
    page = pages().page(kept, written(tmp_path / "run" / "a.ipynb", "1 + 1", outputs))
    title, *_ = page.splitlines()
    assert title == "# Title"
    assert "<pre><code>&lt;b&gt;bold" in page
    assert "Loading weights" not in page
    assert "IPython" not in page
    assert "Plotly.newPlot('figure-1-3'" in page
    assert page.count("</script>") == 2, "a name in a figure must not end its script"
    assert page.index("1 + 1") < page.index("bold") < page.index("newPlot") < page.rindex("0.5")


def test_a_notebook_that_changed_after_its_run_shows_nothing_old(tmp_path: Path) -> None:
    outputs = [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}]
    run = written(tmp_path / "run" / "a.ipynb", "1 + 1", outputs)
    for page in (
        pages().page(written(tmp_path / "a.ipynb", "2 + 2", []), run),
        pages().page(tmp_path / "a.ipynb", tmp_path / "none.ipynb"),
    ):
        assert "Run it to see its figures" in page
        assert "<pre>" not in page
        assert "script" not in page
