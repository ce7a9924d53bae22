"""The study of traces: on a planted model the step that names the emotion is the anchor; its tables by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from organisms import D_MODEL, TOKENS, planted
from scipy.stats import spearmanr

from emocircuits import cli
from emocircuits.data.problems import load_problems
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.models.load import Loaded
from emocircuits.reasoning import findings
from emocircuits.reasoning.answers import Boxed, Labels, LikelihoodAnswers, Pattern
from emocircuits.reasoning.command import parse_answers, read_traces
from emocircuits.reasoning.importance import Similarity
from emocircuits.reasoning.parts import read
from emocircuits.reasoning.steps import split
from emocircuits.reasoning.study import Plan, _sampled, emotional_plan, problem_traces, run_anchors
from emocircuits.reasoning.traces import Trace

NAMES = ("=anger", "=sadness", "=fear")
ANSWERS = LikelihoodAnswers(NAMES, " w13")
PLAN = Plan(rollouts=4, max_new_tokens=5, closing="", min_chars=1, distance=1, n_boot=50, controls=1, doses=(-0.5, 0.5))


def traces() -> list[Trace]:
    """Each names one emotion, in another step."""
    texts = (
        "w7 w8 w0. w6 fear w1. w9 w2. w11 w3.",
        "w5 anger w0. w6 w8 w1. w7 w2. w9 w3.",
        "w7 w0. w6 w1. w9 w2. w8 sadness w3.",
    )
    truths, labels = ("=fear", "=anger", "=sadness"), [("a", "b", "a", "a"), ("b", "a", "a", "a"), ("a", "a", "a", "b")]
    return [
        Trace("w9 w10 ", split(text, min_chars=1), truth=truth, labels=label, id=truth)
        for text, truth, label in zip(texts, truths, labels)
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Loaded, DirectionSet]:
    vectors = torch.zeros(len(NAMES), 4, D_MODEL)
    for e in range(len(NAMES)):
        vectors[e, :, e] = 1.0
    made = DirectionSet(NAMES, "resid_post", (0, 1, 2, 3), vectors, torch.full((4,), 2.0), torch.zeros(4, D_MODEL))
    loaded = Loaded(planted().model, TOKENS, "planted")
    out = tmp_path_factory.mktemp("anchors") / "run"
    run_anchors(loaded, traces(), ANSWERS, out, PLAN, directions=made, layer=0)
    return out, loaded, made


@pytest.fixture(scope="module")
def parts(study: tuple[Path, Loaded, DirectionSet]) -> list[dict[str, Any]]:
    return [read(p) for p in sorted(study[0].glob("trace_*.json"))]


def test_the_step_that_names_the_emotion_is_the_anchor(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        named = part["labels"].index("b")
        row = part["emotion"]["emotions"].index(part["truth"])
        assert part["emotion"]["judged"] == part["truth"]
        assert int(np.argmax([r["value"] for r in part["forced"]["kl"]])) == named
        assert int(np.argmax(part["suppression"]["on_answer"])) == named
        assert int(np.argmax([step[row] for step in part["emotion"]["carried"]])) == named
        assert len(part["sampled"]["resampling"]) == 4
        assert len(part["suppression"]["kl"].block()) == 4


def test_the_summary_says_so(study: tuple[Path, Loaded, DirectionSet]) -> None:
    found = json.loads((study[0] / "anchors.json").read_text())
    assert (found["n_traces"], found["n_steps"]) == (3, 12)
    assert found["answers"]["right_after"]["estimate"] == 1.0
    kinds = {row["category"]: row for row in found["categories"]}
    assert kinds["b"]["n"] == 3
    assert kinds["b"]["forced"]["estimate"] > 10 * kinds["a"]["forced"]["estimate"]
    up = next(r for r in found["pushes"] if r["dose"] == 0.5)
    assert up["everywhere"]["estimate"] > 5 * abs(up["control_everywhere"]["estimate"])
    page = (study[0] / "report.html").read_text()
    assert "What carries the reasoning of planted" in page
    assert "Trace =anger" in page
    told = (study[0] / "anchors.md").read_text()
    assert "| asked at once | hidden from attention |" in told
    assert "| +0.50 |" in told


def test_a_finished_run_is_read_and_another_one_refused(study: tuple[Path, Loaded, DirectionSet]) -> None:
    out, loaded, made = study
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.suffix in (".json", ".jsonl")}
    run_anchors(loaded, traces(), ANSWERS, out, PLAN, directions=made, layer=0)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.suffix in (".json", ".jsonl")}
    with pytest.raises(InputError, match=r"other settings \(plan\)"):
        run_anchors(loaded, traces(), ANSWERS, out, replace(PLAN, seed=1), directions=made, layer=0)
    with pytest.raises(InputError, match="no traces"):
        run_anchors(loaded, [], ANSWERS, out, PLAN)
    with pytest.raises(InputError, match="same id"):
        run_anchors(loaded, traces()[:1] * 2, ANSWERS, out, PLAN)


def test_an_interrupted_run_keeps_its_rollouts(study: tuple[Path, Loaded, DirectionSet], tmp_path: Path) -> None:
    out, loaded, made = study
    with pytest.raises(ZeroDivisionError):
        run_anchors(loaded, traces()[:1], ANSWERS, tmp_path / "run", PLAN, directions=_broken(made), layer=0)
    kept = next((tmp_path / "run").glob("*fear*.rollouts.jsonl"))
    lines = kept.read_text()
    run_anchors(loaded, traces()[:1], ANSWERS, tmp_path / "run", PLAN, directions=made, layer=0)
    assert kept.read_text() == lines
    name = next(out.glob("trace_*fear*.json")).name
    assert (tmp_path / "run" / name).read_text() == (out / name).read_text()


class _Broken(DirectionSet):
    def slots(self, layers: Any) -> list[int]:
        if not isinstance(layers, int):
            raise ZeroDivisionError
        return super().slots(layers)


def _broken(made: DirectionSet) -> DirectionSet:
    """Directions that fail when a step is pushed, the last thing a trace needs."""
    return _Broken(made.emotions, made.site, made.layers, made.vectors, made.norms, made.center)


def test_rank_correlations() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 6, (3, 30)).astype(float)
    assert findings.correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    r = {(a, b): spearmanr(u, v).statistic for a, u in zip("xyz", (x, y, z)) for b, v in zip("xyz", (x, y, z))}
    partial = (r["x", "y"] - r["x", "z"] * r["y", "z"]) / math.sqrt((1 - r["x", "z"] ** 2) * (1 - r["y", "z"] ** 2))
    assert findings.correlation(x, y, z) == pytest.approx(partial)
    assert math.isnan(findings.correlation(x[:3], y[:3]))
    assert math.isnan(findings.correlation(np.ones(9), y[:9]))
    x[:20] = math.nan
    assert findings.correlation(x, y) == pytest.approx(spearmanr(x[20:], y[20:]).statistic)


def test_ways_to_answer() -> None:
    assert parse_answers("boxed") == Boxed()
    assert parse_answers("labels: fear, joy") == Labels(("fear", "joy"))
    assert parse_answers(r"regex:#### (\d+)") == Pattern(r"#### (\d+)")
    with pytest.raises(InputError, match="unknown way to answer 'label'"):
        parse_answers("label")


def test_own_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        json.dumps({"prompt": "Q ", "completion": "<think>One is. Two is.</think>\\boxed{3}", "truth": 3}) + "\n"
    )
    (trace,) = read_traces(path, Boxed())
    assert (trace.answer, trace.truth, len(trace), trace.id) == ("3", "3", 1, "0")
    path.write_text(json.dumps({"id": "p", "prompt": "Q "}) + "\n")
    with pytest.raises(InputError, match="trace 'p': completion must be a text, not missing"):
        read_traces(path, Boxed())
    assert cli.main(["anchors", "--traces", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "completion must be a text" in capsys.readouterr().err
    assert cli.main(["anchors", "--problems", "0", "--out", str(tmp_path / "run")]) == 2


def test_sampled_reasoning_is_cut_before_the_answer_is_named() -> None:
    problem, plan = load_problems()[0], emotional_plan(PLAN)
    long = " He sees it. It hurts him. It was on purpose. He could have asked. So he feels Anger."
    texts = ["", " Too short. So it is fear.", long.replace("Anger", "warm"), long]
    found = _sampled(problem, "P", texts, plan)
    assert found is not None
    assert found.steps.texts == ("He sees it.", "It hurts him.", "It was on purpose.", "He could have asked.")
    assert found.prefix(4) + found.ending == "P" + long
    assert found.answer == "anger"
    assert _sampled(problem, "P", texts[:3], plan) is None


def test_written_reasoning_leaves_out_what_names_emotions() -> None:
    found = problem_traces(Loaded(None, None, ""), PLAN, 5, "written")  # type: ignore[arg-type]
    assert len(found) == 5
    for trace in found:
        assert {"conclusion", "alternative"}.isdisjoint(trace.labels or ())
        assert len(trace.labels or ()) == len(trace)
    with pytest.raises(InputError, match="unknown source of traces"):
        problem_traces(Loaded(None, None, ""), PLAN, 5, "guessed")  # type: ignore[arg-type]


def test_similarity_embeds_each_sentence_once() -> None:
    seen: list[str] = []

    def encode(texts: Any) -> np.ndarray:
        seen.extend(texts)
        return np.eye(4)[[len(t) for t in texts]]

    similarity = Similarity(encode)
    similarity.to("a", ["a", "bb", "bb"])
    assert similarity.to("bb", ["a", ""]).tolist() == [0.0, -1.0]
    assert seen == ["a", "bb", ""]
