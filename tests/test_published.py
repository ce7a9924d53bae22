"""Published rollouts: every layout read, damage reported, published numbers computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_traces import problems

from emocircuits.errors import InputError
from emocircuits.reasoning.importance import (
    Similarity,
    different_trajectories,
    importance,
    overdeterminedness,
    sentence_matrix,
)
from emocircuits.reasoning.published import load_published, read_rows
from emocircuits.reasoning.traces import Rollouts

CHUNKS = ["It says 2 plus 2.", "That makes 4.", "So the answer is 4."]


def _files() -> dict[str, Any]:
    """A problem in the hub's file tree: a lost folder, an error entry, an answer in the prefix, odd depends_on."""

    def rollout(text: str) -> dict[str, Any]:
        # `answer` is what the released code read: the first box of prefix and rollout together.
        return {"chunk_resampled": text.split(".")[0] + ".", "rollout": text, "answer": "9", "is_correct": False}

    labelled = [
        {"chunk": c, "chunk_idx": i, "function_tags": [tag], "depends_on": sources, "accuracy": 0.5, "summary": "s",
         "absolute_importance_kl": 3.0, "resampling_importance_kl": None, "different_trajectories_fraction": 0.5}
        for i, (c, tag, sources) in enumerate(
            zip(CHUNKS, ("problem_setup", "active_computation", "final_answer_emission"), ([], ["0"], [1, "7", 2]))
        )
    ]  # fmt: skip
    return {
        "problem.json": {"problem": "2+2", "gt_answer": "4"},
        "base_solution.json": {"prompt": "P: ", "solution": " ".join(CHUNKS) + "</think> \\boxed{4}", "answer": "4"},
        "chunks_labeled.json": labelled,
        "chunk_0/solutions.json": [rollout("It says 2. \\boxed{4}"), rollout("Odd. \\boxed{5}"), {"error": "503"}],
        "chunk_2/solutions.json": [rollout("Done. \\boxed{4.0}"), rollout("Lost in thought"), rollout("a. \\boxed{4}")],
    }


def _tree(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


def test_the_file_tree(tmp_path: Path) -> None:
    found = load_published(_tree(tmp_path / "problem_1", _files()))
    trace = found.trace
    assert list(trace.steps.texts) == CHUNKS
    assert (trace.answer, trace.truth, trace.ending) == ("4", "4", "</think> \\boxed{4}")
    assert trace.prefix(1) == "P: " + CHUNKS[0]
    assert trace.labels == ("problem_setup", "active_computation", "final_answer_emission")
    assert trace.depends_on == ((), (0,), (1,))
    assert [(r.answer, r.correct, r.step) for r in found.rollouts.at(0)] == [
        ("4", True, "It says 2."),
        ("5", False, "Odd."),
    ]
    assert found.rollouts.at(1) == ()
    assert [(r.answer, r.correct, r.finish) for r in found.rollouts.at(2)] == [
        ("4.0", True, "answer"), (None, False, "length"), ("4", True, "answer"),
    ]  # fmt: skip
    assert [r.reason for r in found.rollouts.items if r.finish == "error"] == ["503"]
    assert np.isnan(found.values["resampling_importance_kl"]).all()
    assert found.has_answers
    assert found.problems == ()


def test_hub_rows_give_the_same(tmp_path: Path) -> None:
    rows = [{"path": f"m/problem_1/{name}", "content": json.dumps(c)} for name, c in _files().items()]
    ((name, found),) = read_rows(
        [*rows, {"path": "README.md", "content": "x"}, {"path": "m/problem_2/problem.json", "content": "{}"}]
    ).items()
    assert name == "m/problem_1"
    assert found.rollouts == load_published(_tree(tmp_path / "m", _files())).rollouts
    with pytest.raises(InputError, match="no row holds the path"):
        read_rows([{"text": "x"}])


def test_cut_files_give_what_stands_before_the_cut(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "problem_1", _files())
    cut = folder / "chunk_2" / "solutions.json"
    cut.write_text(cut.read_text()[:-40])
    found = load_published(folder)
    assert len(found.rollouts.at(2)) == 2
    assert len(found.problems) == 1
    assert "problem_1/chunk_2/solutions.json is damaged" in found.problems[0]
    assert "kept 2 items" in found.problems[0]


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load_published(tmp_path / "absent")
    with pytest.raises(InputError, match="chunks_labeled.json is missing"):
        load_published(tmp_path)


def test_published_overdeterminedness_is_recomputed() -> None:
    """Exactly, but for the last step (0 by construction: its importance was never sampled) and for steps where the
    release left out rollouts without an answer, which its website layout does not mark: there the published value is
    that of the kept ones, whose number its accuracy gives away."""
    exact = 0
    for folder in problems():
        found = load_published(folder)
        ours, theirs, accuracy = (
            overdeterminedness(found.rollouts),
            found.values["overdeterminedness"],
            found.values["accuracy"],
        )
        for i in range(len(found.trace) - 1):
            if abs(ours[i] - theirs[i]) < 1e-6:
                exact += 1
                continue
            r, distinct = len(found.rollouts.at(i)), len({x.step for x in found.rollouts.at(i)})
            fits = [
                k for k in range(r - 3, r)
                if abs(accuracy[i] * k - round(accuracy[i] * k)) < 1e-6
                and any(abs(1 - d / k - theirs[i]) < 1e-6 for d in range(distinct - (r - k), distinct + 1))
            ]  # fmt: skip
            assert fits, f"{folder.name}, step {i}"
    assert exact == 198  # of 218


def test_published_trajectory_fractions_are_recomputed() -> None:
    """Every twelfth step, for time; experiments/reasoning/published.py does all of them."""
    similarity = Similarity()
    for folder in problems():
        found = load_published(folder)
        some = range(0, len(found.trace) - 1, 12)
        few = Rollouts(len(found.trace), tuple(r for i in some for r in found.rollouts.at(i)))
        ours = different_trajectories(found.trace, few, similarity=similarity)[list(some)]
        theirs = found.values["different_trajectories_fraction"][list(some)]
        assert np.corrcoef(ours, theirs)[0, 1] >= 0.98
        assert np.abs(ours - theirs).max() <= 0.02


def test_published_matrices_are_read() -> None:
    found = load_published(next(f for f in problems() if f.name == "problem_2238"))
    assert found.suppression is not None
    assert found.matrix is not None
    assert np.isnan(found.suppression[0]).all()
    assert abs(np.nanmean(found.suppression[5])) < 1e-3  # rows are centred
    with pytest.raises(InputError, match="first sentences only"):
        sentence_matrix(found.trace, found.rollouts, lambda text: [text])
    with pytest.raises(InputError, match="a trace of 60 steps, this one has"):
        importance(load_published(problems()[0]).trace, found.rollouts)
