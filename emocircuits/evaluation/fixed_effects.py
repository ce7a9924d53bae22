"""A group's effect when rows share problems: least squares within problems, errors clustered. Needs numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emocircuits.errors import InputError

from .statistics import cluster_codes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """Coefficient of the first regressor with its interval and two-sided p; NaN with a reason where undefined.

    n: rows. n_clusters: problems. n_used: rows of problems in which the regressor varies; the others say nothing.
    """

    estimate: float
    se: float
    low: float
    high: float
    p: float
    n: int
    n_clusters: int
    n_used: int
    reason: str = ""


def within_effect(y: ArrayLike, x: ArrayLike, problems: Sequence[Hashable], confidence: float = 0.95) -> Effect:
    """Effect of x's first column [n, k] on y [n], given its other columns and a level of its own for each problem.

    Levels are taken out by centring within problems (Frisch-Waugh-Lovell), so no dummy variables are built. Errors are
    clustered by problem: the sandwich of Liang & Zeger (1986) times g/(g-1) (n-1)/(n-k), levels not counted in k since
    they are nested in clusters; t distribution with g - 1 degrees of freedom. Few problems (under about 20) make the
    interval too narrow. Raises InputError for shapes that do not fit.
    """
    target, regressors = np.asarray(y, dtype=np.float64), np.asarray(x, dtype=np.float64)
    if target.ndim != 1 or regressors.ndim != 2 or len(target) != len(regressors):
        raise InputError(f"y {target.shape} and x {regressors.shape} must be [n] and [n, k]")
    codes, g = cluster_codes(problems, len(target))
    n, k = regressors.shape
    inner, outcome = _centred(regressors, codes, g), _centred(target[:, None], codes, g)[:, 0]
    used = int(np.isin(codes, np.unique(codes[np.abs(inner[:, 0]) > 1e-12])).sum()) if n else 0
    if reason := _why_undefined(inner, used, g):
        return Effect(math.nan, math.nan, math.nan, math.nan, math.nan, n, g, used, reason)
    bread = np.linalg.inv(inner.T @ inner)
    beta = bread @ inner.T @ outcome
    scores = np.zeros((g, k))
    np.add.at(scores, codes, inner * (outcome - inner @ beta)[:, None])
    factor = g / (g - 1) * (n - 1) / (n - k)
    se = math.sqrt(max(float((bread @ (scores.T @ scores) @ bread)[0, 0]) * factor, 0.0))
    return _interval(float(beta[0]), se, n, g, used, confidence)


def _why_undefined(inner: Floats, used: int, g: int) -> str:
    """Why regressors centred within g problems give no estimate with an error; "" if they do."""
    n, k = inner.shape
    if used == 0:
        return "no problem has rows of both groups"
    if g < 2 or n <= k:
        return f"{n} rows of {g} problems are too few"
    return "within problems the regressors say the same" if np.linalg.matrix_rank(inner) < k else ""


def _interval(estimate: float, se: float, n: int, g: int, used: int, confidence: float) -> Effect:
    from scipy.stats import t

    if se < 1e-12:
        reason = "the fit leaves no error to measure"
        return Effect(estimate, math.nan, math.nan, math.nan, math.nan, n, g, used, reason)
    reach = float(t.ppf((1 + confidence) / 2, g - 1)) * se
    p = 2 * float(t.sf(abs(estimate) / se, g - 1))
    return Effect(estimate, se, estimate - reach, estimate + reach, p, n, g, used)


def _centred(values: Floats, codes: NDArray[np.intp], g: int) -> Floats:
    """Each column less its mean within the problem."""
    sums = np.zeros((g, values.shape[1]))
    np.add.at(sums, codes, values)
    return values - (sums / np.maximum(np.bincount(codes, minlength=g), 1)[:, None])[codes]
