"""Importance: by hand on toy rollouts, its null calibrated, undefined values named."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.errors import InputError
from emocircuits.reasoning import importance as imp
from emocircuits.reasoning.traces import Rollout, Rollouts, Steps, Trace

TRACE = Trace("Q ", Steps("One is. Two is. Three.", (0, 7, 15, 22)), truth="a")


def rolled(*answers: str, steps: dict[int, list[str]] | None = None) -> Rollouts:
    """One string of one-letter answers per boundary ("-" gave none); `steps`: first steps of some boundaries."""
    items = [
        Rollout(k, i, f"... {a}", (steps or {}).get(k, ["x"] * len(row))[i], None if a == "-" else a, a == "a")
        for k, row in enumerate(answers)
        for i, a in enumerate(row)
    ]
    return Rollouts(len(answers) - 1, tuple(items))


def axis(texts: list[str]) -> np.ndarray:
    """An embedding by first letter: same letter, same direction."""
    rows = np.zeros((len(texts), 128))
    for row, text in zip(rows, texts):
        row[ord(text.strip()[0]) % 128 if text.strip() else 0] = 1
    return rows


SIMILAR = imp.Similarity(axis)


def test_kl_by_hand() -> None:
    found = imp.importance(TRACE, rolled("ab" * 50, "a" * 100, "a" * 100, "a" * 100), metric="kl")
    p, q = (50.5 / 101, 50.5 / 101), (100.5 / 101, 0.5 / 101)
    assert found.value[0] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))
    assert found.value[1:].tolist() == [0, 0]
    assert found.headroom[0] == pytest.approx(math.log(2))
    assert found.headroom[1] == 0
    assert found.p[0] < 0.01
    assert found.anchors() == [0]
    compat = imp.importance(TRACE, rolled("ab" * 50, "a" * 100, "a" * 100, "a" * 100), alpha=1e-9)
    assert compat.value[0] == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-11), abs=1e-3)


def test_accuracy_is_with_minus_without_for_every_kind() -> None:
    rollouts = rolled("abbb", "aabb", "aaa-", "aaaa", steps={0: ["O", "O", "z", "z"]})
    resampling = imp.importance(TRACE, rollouts, metric="accuracy")
    assert resampling.value.tolist() == [0.25, 0.25, 0.25]  # no answer is wrong
    assert resampling.none_rate.tolist() == [0, 1 / 8, 1 / 8]
    dropped = imp.importance(TRACE, rollouts, metric="accuracy", drop_none=True)
    assert dropped.value.tolist() == [0.25, 0.5, 0]
    other = imp.importance(TRACE, rollouts, "counterfactual", "accuracy", similarity=SIMILAR)
    assert other.value[0] == 0.5 - 0  # without: the two rollouts that begin with another step, both wrong
    pooled = imp.importance(TRACE, rollouts, "counterfactual", "accuracy", similarity=SIMILAR, pooled=True)
    assert pooled.value[0] == 3 / 6 - 0  # with: those at 1, and those at 0 that say the same


def test_undefined_is_nan_with_a_reason() -> None:
    same = imp.importance(TRACE, rolled("ab", "ab", "ab", ""), "counterfactual", similarity=SIMILAR, tau=-2)
    assert np.isnan(same.value).all()
    assert "no rollout at 0 starts with another step" in same.reasons[0]
    missing = imp.importance(TRACE, rolled("ab", "", "ab", "ab"))
    assert missing.reasons == ("no rollouts at boundary 1", "no rollouts at boundary 1", "")
    assert math.isnan(missing.headroom[1])
    single = imp.importance(TRACE, rolled("a", "b", "ab", "ab"))
    assert not math.isnan(single.value[0])
    assert math.isnan(single.low[0])
    assert single.reasons[0].startswith("one rollout has no spread")
    open_answers = Rollouts(3, tuple(replace(r, correct=None) for r in rolled("ab", "ab", "ab", "ab").items))
    with pytest.raises(InputError, match="give the trace a truth"):
        imp.importance(replace(TRACE, truth=None), open_answers, metric="accuracy")
    with pytest.raises(InputError, match="of a trace of 1 steps, this one has 3"):
        imp.importance(TRACE, rolled("a", "b"))
    with pytest.raises(InputError, match="unknown kind of importance"):
        imp.importance(TRACE, rolled("a", "b", "a", "b"), "guess")


def test_likelihood_answers_count_with_their_probabilities() -> None:
    def scored(k: int, i: int, p: float) -> Rollout:
        return Rollout(k, i, "", answer="a" if p > 0.5 else "b", probabilities={"a": p, "b": 1 - p})

    rollouts = Rollouts(3, tuple(scored(k, i, [0.2, 0.7, 0.7, 0.9][k]) for k in range(4) for i in range(3)))
    found = imp.importance(TRACE, rollouts, metric="accuracy")
    assert found.value == pytest.approx([0.5, 0, 0.2])
    kl = imp.importance(TRACE, rollouts).value  # known chances are not smoothed
    assert kl[0] == pytest.approx(0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3), abs=1e-6)
    assert imp.answer_shares(rollouts)["a"] == pytest.approx([0.2, 0.7, 0.7, 0.9])


def test_the_null_is_calibrated() -> None:
    """Two boundaries with the same true distribution: p is uniform enough, and the floor is the mean value."""
    rng = np.random.default_rng(0)
    values, floors, hits = [], [], 0
    trace = Trace("", Steps("One.", (0, 4)))
    for run in range(200):
        draws = ["".join(rng.choice(list("abc"), size=40, p=[0.5, 0.3, 0.2])) for _ in range(2)]
        found = imp.importance(trace, rolled(*draws), n_boot=200, seed=run)
        values.append(found.value[0])
        floors.append(found.floor[0])
        hits += found.p[0] <= 0.1
    assert np.mean(values) == pytest.approx(np.mean(floors), rel=0.25)
    assert 0.04 < hits / 200 < 0.18


def test_intervals_cover() -> None:
    """The bootstrap interval of an accuracy difference covers the true one about as often as it says."""
    rng, trace, inside = np.random.default_rng(1), Trace("", Steps("One.", (0, 4)), truth="a"), 0
    for run in range(200):
        draws = ["".join(rng.choice(list("ab"), size=60, p=[p, 1 - p])) for p in (0.4, 0.7)]
        found = imp.importance(trace, rolled(*draws), metric="accuracy", n_boot=300, seed=run)
        inside += found.low[0] <= 0.3 <= found.high[0]
    assert inside / 200 > 0.88


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_kl_is_never_negative_and_zero_for_equal_shares(p: list[int], q: list[int]) -> None:
    size = max(len(p), len(q))
    a, b = (np.array(x + [0] * (size - len(x)), dtype=float) for x in (p, q))
    if a.sum() and b.sum():
        assert imp.smoothed_kl(a, b) >= 0
        assert imp.smoothed_kl(a, a) == pytest.approx(0)


def test_companions() -> None:
    rollouts = rolled("aaaa", "aabb", "aaaa", "bbbb", steps={0: ["One", "One", "z", ""], 1: ["T", "q", "q", "q"]})
    assert imp.different_trajectories(TRACE, rollouts, similarity=SIMILAR).tolist() == [0.5, 0.75, 1.0]
    assert imp.overdeterminedness(rollouts)[:2].tolist() == [0.25, 0.5]
    assert imp.accuracy_along(rollouts).tolist() == [1, 0.5, 1, 0]
    assert imp.convergence(rolled("ab", "aa", "aa", "aa"), window=3) == 1
    assert imp.convergence(rollouts, window=3) is None
    assert imp.screened({"flat": rolled("aa", "ab"), "open": rolled("ab", "aa")}) == ["open"]


def test_sentence_matrix_by_hand() -> None:
    said = [(0, "O. z."), (0, "z. q."), (1, "Two. z."), (1, "Two."), (2, "z."), (3, "q.")]
    items = [Rollout(k, i, text, step=text.split(".")[0]) for i, (k, text) in enumerate(said)]
    rollouts = Rollouts(3, tuple(items))
    trace = Trace("", Steps("One is. kwo is. Three.", (0, 7, 15, 22)))
    matrix = imp.sentence_matrix(trace, rollouts, lambda t: t.split("."), similarity=SIMILAR)
    assert np.isnan(matrix[np.triu_indices(3)]).all()
    assert matrix[2, 0] == 1.0  # "Three" is said (a T) in no rollout at 0 and in both at 1
    assert matrix[1, 0] == 0.0
    assert matrix[2, 1] == -1.0


def test_detrending_removes_a_parabola() -> None:
    x = np.linspace(0, 1, 20)
    y = 3 * x**2 - x + 2
    y[3] = math.nan
    rest = imp.detrended(y, x)
    assert np.nanmax(np.abs(rest)) < 1e-9
    assert math.isnan(rest[3])
    with pytest.raises(InputError, match="needs more than 3 values"):
        imp.detrended(y[:3], x[:3])


def test_everything_repeats_under_its_seed() -> None:
    rollouts = rolled("abab", "aabb", "aaab", "abbb")
    a, b = (imp.importance(TRACE, rollouts, seed=3).rows() for _ in range(2))
    assert a == b
    assert a != imp.importance(TRACE, rollouts, seed=4).rows()
