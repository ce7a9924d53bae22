"""The report: whole and partial runs, hostile text, undefined numbers, and no load from anywhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from synthetic_run import write_run

from emocircuits import plots
from emocircuits._report_html import Page, interval, num, p_value, points
from emocircuits._report_texts import Texts
from emocircuits.artefact import read_jsonl, write_json_atomic, write_jsonl_atomic
from emocircuits.errors import InputError
from emocircuits.report import headline, read_run, render, targets, write_report

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> {{body}} & \"'"
STAGES = ("quality.json", "embedding.json", "tuning.json", "evaluation.json", "dose.json", "texts.jsonl")


class Reader(HTMLParser):
    """Collects what a browser would see: elements, what they would load, visible text, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [], ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def page(run: Path) -> Reader:
    return Reader(write_report(run).read_text("utf-8"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    write_json_atomic(path, found)


# -------------------------------------------------------------------------------------------------- the page


def test_the_page_loads_nothing(page: Reader) -> None:
    loads = [
        (t, a) for t, a in page.tags if a.get("src") or a.get("srcset") or t in ("link", "iframe", "object", "base")
    ]
    assert loads == []
    assert all((a.get("href") or "#").startswith("#") for _, a in page.tags)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")


def test_plotly_is_inside_exactly_once(page: Reader) -> None:
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def test_every_figure_has_a_place_and_the_other_way_round(page: Reader) -> None:
    places = [a["id"] for _, a in page.tags if a.get("class") == "plot"]
    drawn = json.loads(page.scripts[1])
    assert sorted(map(str, places)) == sorted(drawn)
    assert len(drawn) > 20
    assert all(go.Figure(figure).data for figure in drawn.values())


def test_ids_are_unique_and_links_lead_somewhere(page: Reader) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {(a.get("href") or "")[1:] for t, a in page.tags if t == "a"} <= set(ids)


def test_the_headline_gives_numbers_with_intervals(run: Path) -> None:
    said = " ".join(headline(read_run(run)))
    assert "synthetic/model-0 has linear emotion directions" in said
    assert re.search(r"coherently in 80% <span class=\"ci\">\[75, 85\]</span>", said)
    assert "chance 0.17" in said


def test_no_direction_is_claimed_when_the_interval_reaches_the_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")

    def weaken(quality: dict[str, Any]) -> None:
        quality["readout"] |= {"accuracy": 0.26, "low": 0.20, "high": 0.32}

    edit(run / "quality.json", weaken)
    assert "shows no reliable" in headline(read_run(run))[0]


def test_directions_that_read_no_better_than_letters_do_are_called_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert "without a model 0.60" in headline(read_run(run))[0]
    assert "not clearly more" not in headline(read_run(run))[0]
    edit(run / "quality.json", lambda q: q["fits"][-1].update(accuracy=0.95))
    assert "not clearly more than the words of the replies give" in headline(read_run(run))[0]


def test_a_steering_effect_within_its_control_is_called_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", scenarios=1)
    assert "not clearly better" not in " ".join(headline(read_run(run)))
    weak = {"estimate": 0.04, "low": -0.03, "high": 0.1}
    edit(run / "evaluation.json", lambda e: e["comparisons"][1].update(difference=weak))
    assert "not clearly better than the random direction" in " ".join(headline(read_run(run)))


def test_a_report_is_the_same_twice(run: Path) -> None:
    assert render(read_run(run)) == render(read_run(run))


# ---------------------------------------------------------------------------------------------- hostile text


def test_hostile_data_shows_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", scenarios=3)
    rows = [{**row, "prompt": HOSTILE, "text": HOSTILE, "theme": HOSTILE} for row in read_jsonl(run / "texts.jsonl")]
    write_jsonl_atomic(run / "texts.jsonl", rows)
    edit(run / "manifest.json", lambda m: m["settings"].update(model=HOSTILE, note=HOSTILE))
    edit(run / "quality.json", lambda q: q["confounds"][0].update(name=HOSTILE, what=HOSTILE, note=HOSTILE))
    edit(run / "quality.json", lambda q: q["sets"][0].update(name=HOSTILE, trained_on=HOSTILE))
    edit(run / "evaluation.json", lambda e: e["judge"].update(name=HOSTILE))
    edit(run / "embedding.json", lambda e: e["points"][0].update(theme=HOSTILE))
    page = Reader(write_report(run).read_text("utf-8"))
    assert HOSTILE in page.text
    assert len(page.scripts) == 4  # plotly, the figures, the data, the page's own
    assert not [t for t, a in page.tags if t == "img" or "onerror" in a]
    blocks = json.loads(page.scripts[2])["texts"]
    inner = Reader(blocks["anger"][0]["html"])
    assert HOSTILE in inner.text
    assert {t for t, _ in inner.tags} <= {"div", "p", "span", "article", "h4"}


def test_figure_text_is_not_markup() -> None:
    fig = plots.embedding_scatter(
        [{"x": 0, "y": 1, "emotion": "<b>joy</b>", "theme": "<a href='x'>", "held_out": True}]
    )
    shown = fig.to_json() or ""
    assert "\\u003cb\\u003e" not in shown
    assert "<b>" not in shown.replace("<br>", "")


# ------------------------------------------------------------------------------------- partial and odd runs


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_stage_is_a_note_that_names_the_command(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "part", scenarios=3)
    (run / name).unlink()
    page = Reader(write_report(run).read_text("utf-8"))
    assert "missing" in page.ids()
    assert name in page.text
    assert "emocircuits demo --out part" in page.text


def test_a_whole_run_lacks_nothing(page: Reader) -> None:
    assert "missing" not in page.ids()


def test_a_run_without_any_stage_still_gives_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", scenarios=1)
    for name in STAGES:
        (run / name).unlink()
    page = Reader(write_report(run).read_text("utf-8"))
    assert "Nothing has been measured" in page.text
    assert page.text.count("not measured in this run") == 5


def test_one_emotion_is_enough(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", emotions=("anger",), scenarios=2)
    assert "anger" in Reader(write_report(run).read_text("utf-8")).text


def test_undefined_numbers_say_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "gaps", scenarios=2)
    hole = {"estimate": None, "low": None, "high": None, "n": 0, "n_clusters": 0, "reason": "no texts were generated"}

    def pierce(found: dict[str, Any]) -> None:
        found["methods"]["steered"]["coherent"] = hole
        found["methods"]["steered"]["perplexity"] = {"median": math.nan, "q25": None, "q75": None}
        found["methods"]["random"]["by_emotion"]["fear"]["coherent"] = hole
        found["comparisons"][0] |= {"difference": hole, "p": math.nan}

    edit(run / "evaluation.json", pierce)
    edit(run / "dose.json", lambda d: d["rows"][0].update(coherent=None, perplexity=math.nan))
    edit(run / "quality.json", lambda q: q["sets"][0]["split_half"][0].__setitem__(0, None))
    page = Reader(write_report(run).read_text("utf-8"))
    assert "n/a (no texts were generated)" in page.text
    assert "n/a (too few texts remain)" in page.text
    assert not re.search(r"\bnan\b|\bNone\b|\bNaN\b", page.text)
    assert all("NaN" not in script for script in page.scripts[1:3])


def test_a_folder_that_is_no_run_or_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
    run = write_run(tmp_path / "r", scenarios=1)
    (run / "dose.json").write_text("{")
    with pytest.raises(InputError, match=r"dose\.json is damaged"):
        write_report(run)


# ------------------------------------------------------------------------------------------ targets and texts


def test_targets_are_judged_from_the_data(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", scenarios=1)
    assert [t.met for t in targets(read_run(run))] == [True] * 5

    def fail(found: dict[str, Any]) -> None:
        steered = found["methods"]["steered"]
        steered["by_emotion"]["disgust"]["coherent"] = {"estimate": 0.31, "low": 0.2, "high": 0.45}
        found["comparisons"][0] = {
            "a": "prompted",
            "b": "steered",
            "difference": {"estimate": -0.31, "low": -0.4, "high": -0.2},
            "p": 0.01,
        }

    edit(run / "evaluation.json", fail)
    found = targets(read_run(run))
    assert [t.met for t in found] == [True, True, False, True, True]
    assert "disgust" in found[2].name
    assert not found[3].sure, "the interval reaches below the target"
    said = " ".join(headline(read_run(run)))
    assert "4 of 5 targets are met" in said
    assert "weakest emotion (disgust)" in said


def test_the_accuracy_target_needs_a_test_on_themes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", scenarios=1)

    def spoil(quality: dict[str, Any]) -> None:
        del quality["readout"]
        quality["sets"][0]["tests"] = [{**quality["sets"][0]["tests"][1], "name": "seen"}]

    edit(run / "quality.json", spoil)
    assert targets(read_run(run))[0].met is None


def test_the_sample_does_not_look_at_the_texts(run: Path) -> None:
    rows = read_jsonl(run / "texts.jsonl")
    turned = [{**row, "coherent": not row["coherent"], "text": "other"} for row in reversed(rows)]
    one, other = (Texts(r, ["anger", "fear"]) for r in (rows, turned))
    assert one.sample("anger") == other.sample("anger")
    assert set(one.of("fear", one.sample("fear")[0])) == {"unsteered", "prompted", "random", "steered"}


def test_every_scenario_can_be_paged(run: Path, page: Reader) -> None:
    blocks = json.loads(page.scripts[2])["texts"]
    wanted = {row["skeleton_id"] for row in read_jsonl(run / "texts.jsonl")}
    assert all(len(of_emotion) == len(wanted) for of_emotion in blocks.values())


# --------------------------------------------------------------------------------------------- small pieces


def test_numbers_are_careful() -> None:
    assert num(None, reason="no texts") == '<span class="na">n/a (no texts)</span>'
    assert "n/a" in num(math.nan)
    assert num(-0.5) == "\N{MINUS SIGN}0.50"
    assert interval({"estimate": 0.5, "low": 0.4, "high": 0.6}) == '50% <span class="ci">[40, 60]</span>'
    assert "no interval: one cluster" in interval({"estimate": 0.5, "low": None, "high": None, "reason": "one cluster"})
    assert points({"estimate": -0.1, "low": -0.2, "high": 0.05}).startswith("\N{MINUS SIGN}10 ")
    assert p_value(0.0001) == "&lt;&nbsp;0.001"
    assert p_value(0.0421) == "0.042"


def test_data_that_looks_like_a_placeholder_stays_text() -> None:
    page = Page("{{plotly}}")
    page.add("a", "A", "<p>{{data}}</p>")
    text = Reader(page.render("")).text
    assert "{{plotly}}" in text
    assert "{{data}}" in text


def test_pareto_front_keeps_only_what_nothing_beats() -> None:
    pairs = [(10, 0.2), (12, 0.1), (15, 0.6), (9, None), (math.nan, 0.9), (20, 0.6), (30, 0.8)]
    rows = [{"perplexity": p, "expression": e} for p, e in pairs]
    assert plots.pareto_front(rows) == [(10, 0.2), (15, 0.6), (30, 0.8)]


def test_gaps_stay_gaps_in_figures() -> None:
    rows = [
        {"emotion": "fear", "relative": r, "strength": r, "coherent": c} for r, c in ((-1, 0.1), (0, None), (1, 0.7))
    ]
    assert list(plots.dose_response(rows).data[0].y) == [0.1, None, 0.7]
    bars = plots.expression_bars({"steered": {"by_emotion": {}, "coherent": {"estimate": 0.4}}}, ["fear"])
    assert list(bars.data[0].y) == [None, 0.4]
    assert list(bars.data[0].error_y.array) == [None, None]


def test_an_emotion_keeps_its_colour_in_every_figure() -> None:
    row = {"emotion": "fear", "layers": [1], "strength": 0.1, "perplexity": 9.0, "expression": 0.5, "coherent": 0.5}
    line = plots.dose_response([{**row, "relative": 1.0}]).data[0].line.color
    dot = next(t for t in plots.pareto([row], [], {}).data if t.name == "fear").marker.color
    frame = plots.tuning_map([row], "fear", row).layout.shapes[0].line.color
    assert {line, dot, frame} == {plots.EMOTION_COLORS["fear"]}
    assert len(set(plots.EMOTION_COLORS.values())) == len(plots.EMOTION_COLORS)


def test_the_chosen_setting_is_the_starred_one() -> None:
    rows = [
        {"emotion": "fear", "layers": [1, 2], "strength": s, "perplexity": 9 + s, "expression": s, "coherent": s}
        for s in (0.1, 0.2)
    ]
    fig = plots.pareto(rows, [], {"fear": {"layers": [1, 2], "strength": 0.2}})
    stars = [t for t in fig.data if t.marker.symbol == "star" and t.name == "fear"]
    assert [list(t.y) for t in stars] == [[0.2]]


def test_methods_without_a_colour_of_their_own_still_differ() -> None:
    rate = {"coherent": {"estimate": 0.5}}
    fig = plots.expression_bars(dict.fromkeys(("circuit", "random units", "all units", "steered"), rate), ["anger"])
    assert len({bar.marker.color for bar in fig.data[:3]}) == 3


def test_figures_of_traces_say_what_else_they_are_asked_to_draw() -> None:
    from emocircuits.reasoning.plots import agreement_bars, step_lines

    rows = [{"name": "<lift>", "estimate": 0.2, "low": 0.1, "high": 0.4}, {"name": "alpha", "estimate": math.nan}]
    bars, lines = agreement_bars(rows, "change"), step_lines(["", ""], {"lift": [1.0, math.nan]}, "lost", "layer")
    assert (bars.layout.xaxis.title.text, lines.layout.xaxis.title.text) == ("change", "layer")
    assert list(bars.data[0].y) == ["alpha", "&lt;lift&gt;"]
    assert list(bars.data[0].x) == [None, 0.2]
    assert list(lines.data[0].y) == [1.0, None]
    assert agreement_bars(rows).layout.xaxis.title.text == "mean rank correlation within a trace"
    assert step_lines([""], {"fear": [0.0]}, "odds").layout.xaxis.title.text == "step"
