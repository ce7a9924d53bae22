"""Group effects within problems: equal to regression on dummy variables, errors equal to a sandwich built by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from emocircuits.errors import InputError
from emocircuits.evaluation.fixed_effects import within_effect


def panel(seed: int, g: int = 12, effect: float = 0.7) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows of g problems of unequal size, with levels and shared errors of their own; the group goes with length."""
    rng = np.random.default_rng(seed)
    problems = [f"p{i}" for i in range(g) for _ in range(rng.integers(2, 7))]
    codes = np.array([int(p[1:]) for p in problems])
    group = rng.integers(0, 2, len(codes)).astype(float)
    length = rng.normal(size=len(codes)) + 0.5 * group
    shared = rng.normal(size=g)[codes] * (1 + group)  # so that errors within a problem go together
    y = effect * group + 0.4 * length + 3 * rng.normal(size=g)[codes] + shared + rng.normal(size=len(codes))
    return y, np.stack([group, length], 1), problems


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_regression_on_dummies_with_a_sandwich_by_hand(seed: int) -> None:
    y, x, problems = panel(seed)
    names = sorted(set(problems))
    dummies = np.array([[p == name for name in names] for p in problems], dtype=float)
    full = np.hstack([x, dummies])
    beta, *_ = np.linalg.lstsq(full, y, rcond=None)
    bread, meat = np.linalg.inv(full.T @ full), np.zeros((full.shape[1],) * 2)
    for name in names:
        rows = [i for i, p in enumerate(problems) if p == name]
        score = full[rows].T @ (y - full @ beta)[rows]
        meat += np.outer(score, score)
    g, n, k = len(names), len(y), x.shape[1]
    se = math.sqrt((bread @ meat @ bread)[0, 0] * g / (g - 1) * (n - 1) / (n - k))
    found = within_effect(y, x, problems)
    assert found.estimate == pytest.approx(beta[0])
    assert found.se == pytest.approx(se)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(beta[0]) / se, g - 1))
    assert (found.low + found.high) / 2 == pytest.approx(beta[0])
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, g - 1) * se)
    assert (found.n, found.n_clusters) == (n, g)


def test_the_error_is_that_of_resampled_problems() -> None:
    y, x, problems = panel(7, g=150)
    found, rng = within_effect(y, x, problems), np.random.default_rng(0)
    members = [np.flatnonzero(np.array(problems) == name) for name in dict.fromkeys(problems)]
    draws = []
    for _ in range(400):
        picked = [members[i] for i in rng.integers(0, len(members), len(members))]
        rows, copies = np.concatenate(picked), np.repeat(np.arange(len(picked)), list(map(len, picked)))
        draws.append(within_effect(y[rows], x[rows], copies.tolist()).estimate)
    assert found.se == pytest.approx(np.std(draws), rel=0.12)
    assert found.low < 0.7 < found.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = [found.low < 0.7 < found.high for s in range(200) for found in [within_effect(*panel(1000 + s, g=40))]]
    assert 0.9 < np.mean(held) < 0.99


def test_levels_and_problems_of_one_group_change_nothing() -> None:
    y, x, problems = panel(3)
    found = within_effect(y, x[:, :1], problems)
    shifted = y + np.array([100.0 * int(p[1:]) for p in problems])
    assert within_effect(shifted, x[:, :1], problems).estimate == pytest.approx(found.estimate)
    more = within_effect([*y, 5.0, 9.0], [*x[:, :1], [1.0], [1.0]], [*problems, "alone", "alone"])
    assert more.estimate == pytest.approx(found.estimate)
    assert (more.n_used, more.n) == (found.n_used, found.n + 2)


def test_what_cannot_be_estimated_is_nan_with_a_reason() -> None:
    x = np.array([[0.0, 1], [1, 2], [0, 1], [1, 2]])
    cases = {
        "both groups": within_effect([0, 1, 0, 1], x[:, :1], ["a", "b", "c", "d"]),
        "too few": within_effect([0, 1], x[:2, :1], ["a", "a"]),
        "say the same": within_effect([0, 1, 1, 0], x, ["a", "a", "b", "b"]),
    }
    for reason, found in cases.items():
        assert reason in found.reason
        assert np.isnan([found.estimate, found.se, found.low, found.high, found.p]).all()
    exact = within_effect([0, 1, 0, 1], x[:, :1], ["a", "a", "b", "b"])
    assert (exact.estimate, exact.reason) == (1.0, "the fit leaves no error to measure")
    assert math.isnan(exact.p)
    with pytest.raises(InputError, match=r"must be \[n\] and \[n, k\]"):
        within_effect([0, 1], x, ["a", "b"])
    with pytest.raises(InputError, match="3 cluster labels for 4"):
        within_effect([0, 1, 0, 1], x, ["a", "b", "c"])
