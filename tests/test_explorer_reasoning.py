"""The Reasoning page without a browser: long traces, clicks, folders without traces, words; commands of four pages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import explorer_app
import pytest
from explorer_app import open_app as open_app
from explorer_app import well
from synthetic_run import write_run
from synthetic_studies import write_anchors, write_sae
from test_trace_parts import as_an_older_run, receivers

from dashboards import reasoning
from emocircuits import cli
from emocircuits.artefact import write_json_atomic, write_jsonl_atomic
from emocircuits.reasoning import parts
from emocircuits.reasoning.names import NAMES

ROOT = Path(__file__).parents[1]
Open = Callable[..., Any]


@pytest.fixture
def open_page(open_app: Open) -> Open:
    """Opens a page, by default Reasoning."""
    return lambda folder, view="reasoning", **query: open_app(folder, view, **query)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_anchors(tmp_path_factory.mktemp("reasoning") / "runs" / "anchors")


def said(at: Any) -> str:
    return explorer_app.said(at).replace("\\", "")


def charts(at: Any) -> dict[str, dict[str, Any]]:
    """The figures of the page by the key they have, else by number."""
    drawn = [c.proto for c in at.get("plotly_chart")]
    return {c.id or str(i): json.loads(c.spec) for i, c in enumerate(drawn)}


def chart(at: Any, key: str) -> dict[str, Any]:
    return next(spec for name, spec in charts(at).items() if key in name)


# ------------------------------------------------------------------------------------------------ one trace


def test_a_step_shows_what_was_said_in_its_place(run: Path, open_page: Open) -> None:
    at = open_page(run, trace="p1", step="0")
    well(at)
    assert "Step 0 of <b>trace</b> 1." in said(at)
    told = at.dataframe[0].value  # the first table, right under the step
    assert told["said instead"].tolist() == ["So.", "So."]
    assert told["answer"].tolist() == ["fear", "fear"]
    at = open_page(run, trace="p1", step="3")
    assert not [t for t in at.dataframe if "said instead" in t.value.columns]


def test_damaged_lines_of_rollouts_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "trace_a.rollouts.jsonl"
    rows = [{"boundary": b, "index": i, "text": f"é {b}.{i}", "answer": "joy"} for b in (1, 0, 1) for i in (0, 1)]
    write_jsonl_atomic(file, [{"kind": "rollouts"}, *rows])
    file.write_bytes(file.read_bytes() + b'[1]\n\xff{"boundary": 1\n{"boundary": 1, "te')
    where = reasoning.index(file)
    assert [r["whole continuation"] for r in reasoning.rollouts(file, where[1])] == ["é 1.0", "é 1.1", "é 1.0", "é 1.1"]
    assert len(reasoning.rollouts(file, where[0])) == 2
    assert reasoning.rollout_file(tmp_path, "a") == file
    assert reasoning.rollout_file(tmp_path, "../a") is None


def test_five_thousand_steps_are_read_once_and_drawn_in_part(
    tmp_path: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_anchors(tmp_path / "long", steps=5000, n=1)
    reads: list[Path] = []
    indexed: list[Path] = []
    read, index = parts.read, reasoning.index
    monkeypatch.setattr(parts, "read", lambda file: reads.append(file) or read(file))
    monkeypatch.setattr(reasoning, "index", lambda file: indexed.append(file) or index(file))
    at = open_page(path, step="900")
    well(at)
    assert "Steps 870 to 929 of 5000" in said(at)
    for step in (901, 4999, 0):
        well(at.slider(key="step").set_value(step).run())
        assert f"Step {step} of <b>trace</b> 0." in said(at)
    assert len(reads) == len(indexed) == 1
    assert sum(len(json.dumps(spec)) for spec in charts(at).values()) < 500_000
    at = open_page(path, step="900")
    assert len(reads) == 1
    write_anchors(path, steps=7, n=1)  # another session's file: it is read again
    well(at.run())
    assert len(reads) == 2


def test_traces_of_older_runs_are_shown(tmp_path: Path, open_page: Open) -> None:
    path = write_anchors(tmp_path / "old")
    before = charts(open_page(path, step="2"))
    for file in sorted(path.glob("trace_*.json")):
        as_an_older_run(file)
    at = open_page(path, step="2")
    well(at)
    assert [spec["data"] for spec in charts(at).values()] == [spec["data"] for spec in before.values()]


# ------------------------------------------------------------------------------------------------ clicks


@pytest.mark.parametrize("figure", ["The reasoning", "Importance, resampling", "The whole trace"])
def test_every_step_of_a_figure_can_be_clicked(tmp_path: Path, open_page: Open, figure: str) -> None:
    n = 5 if figure != "The whole trace" else 80
    at = open_page(write_anchors(tmp_path / "run", steps=n, n=1), step="1")
    drawn = next(c.proto for c in at.get("plotly_chart") if figure in c.proto.id)
    assert list(drawn.selection_mode)  # a figure without on_click has none
    trace = next(t for t in reversed(json.loads(drawn.spec)["data"]) if "customdata" in t)
    chosen = [reasoning.clicked({"selection": {"points": [{"customdata": c}]}}) for c in trace["customdata"]]
    assert set(chosen) == set(range(n))


@pytest.mark.parametrize("data", [3, [3], ["step 3: +0.1", 3], {"0": "step 3: +0.1", "1": 3}])
def test_what_was_clicked_names_its_step(data: Any) -> None:
    assert reasoning.clicked({"selection": {"points": [{"customdata": data}]}}) == 3


def test_a_click_becomes_the_chosen_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from dashboards.views import reasoning as view

    state: dict[str, Any] = {"step": 1, "strip": {"selection": {"points": [{"customdata": ["", 4]}]}}, "none": None}
    monkeypatch.setattr(view.st, "session_state", state)
    view._take("none")
    assert state["step"] == 1
    view._take("strip")
    assert state["step"] == 4


@pytest.mark.parametrize(
    "event", [None, {}, {"selection": {"points": []}}, {"selection": {"points": [{"x": 1}]}},
              {"selection": {"points": [{"customdata": ["a"]}]}}, {"selection": {"points": [{"customdata": []}]}}],
)  # fmt: skip
def test_clicks_beside_a_step_choose_nothing(event: Any) -> None:
    assert reasoning.clicked(event) is None


def test_the_chosen_step_is_framed_in_both_figures(run: Path, open_page: Open) -> None:
    at = open_page(run, step="3")
    bars = chart(at, "Importance")["layout"]["shapes"]
    assert [(s["x0"], s["x1"]) for s in bars] == [(2.5, 3.5)]
    strip = chart(at, "The reasoning")
    words = strip["data"][0]
    mine = [y for y, (_, step) in zip(words["y"], words["customdata"]) if step == 3]
    assert len(strip["layout"]["shapes"]) == len(set(mine))


def test_an_excerpt_holds_the_chosen_step_and_fits_the_screen() -> None:
    steps = [f"step {i} " + "word " * (i % 30) for i in range(400)]
    for chosen in (0, 7, 200, 399):
        start, stop = reasoning.excerpt(steps, chosen)
        assert start <= chosen < stop
        fig: Any = reasoning.strip(steps[start:stop], [0.1] * (stop - start), chosen, start, 1.0)
        assert fig.layout.height < 700
        assert fig.layout.shapes
    assert reasoning.excerpt(steps[:4], 2) == (0, 4)
    assert reasoning.excerpt(["word " * 9000, "b"], 0) == (0, 1)


# ------------------------------------------------------------------------------------------------ all traces


def test_a_folder_without_traces_opens_on_all_of_them(tmp_path: Path, open_page: Open) -> None:
    path = write_anchors(tmp_path / "bare")
    for file in path.glob("trace_*"):
        file.unlink()
    for folder in (path, ROOT / "experiments" / "results" / "reasoning" / "sampled"):
        at = open_page(folder, view="reasoning")
        well(at)
        assert "Single traces are not in this folder" in said(at)
        assert "has measured no trace yet" not in said(at)
        assert len(at.dataframe) > 1


def test_flat_heads_are_said_to_be_flat_and_wear_no_ring(tmp_path: Path, open_page: Open) -> None:
    for best, words in ((-1.3, "No head is sharper than even"), (0.7, "the 1 sharpest heads")):
        path = write_anchors(tmp_path / f"run {best}", n=1)
        found = json.loads((path / "anchors.json").read_text())
        write_json_atomic(path / "anchors.json", found | receivers(best))
        at = open_page(path)
        at.segmented_control[0].set_value("All traces").run()
        well(at)
        assert words in said(at)
        assert len(list(charts(at).values())[-1]["data"]) == (1 if best < 0 else 2)


def test_measures_are_called_the_same_everywhere(run: Path, open_page: Open) -> None:
    at = open_page(run)
    assert set(at.selectbox(key="importance").options) <= set(NAMES.values())
    at.segmented_control[0].set_value("All traces").run()
    shown = json.dumps([list(charts(at).values()), [t.value.to_dict() for t in at.dataframe]])
    for key in ("forced", "pushed_random", "carried_other"):
        assert key not in shown
    assert "asked at once ~ moves under random pushes (control)" in shown


# ------------------------------------------------------------------------------------------------ commands


def test_commands_write_into_the_folder_that_is_shown(tmp_path: Path, open_page: Open) -> None:
    root = tmp_path / "my results; rm -rf x"
    write_run(root / "one", layers=4, scenarios=1)
    for view, name in {"reasoning": "anchors", "features": "sae", "modality": "balance", "compare": "other"}.items():
        at = open_page(root / "one", view)
        (command,) = [c.value for c in at.code]
        args = cli.parser().parse_args(shlex.split(command)[1:])
        assert Path(args.out) == root / name
    write_sae(root / "sae")
    report = json.loads((root / "sae" / "sae.json").read_text())
    write_json_atomic(root / "sae" / "sae.json", {k: v for k, v in report.items() if k != "geometry"})
    at = open_page(root / "sae", "features")
    at.segmented_control[0].set_value("Map").run()
    assert shlex.split(at.code[0].value)[-2:] == ["--out", str(root / "sae")]
