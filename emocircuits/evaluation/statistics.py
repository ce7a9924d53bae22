"""Uncertainty for every table: clustered intervals, a paired test, AUROC, Wilson intervals, Holm correction.

The unit of analysis is the cluster (for this package, the scenario), not the row: rows written from one
scenario are not independent, and treating them so makes intervals too narrow. Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emocircuits.errors import InputError

Statistic = Callable[[NDArray[Any]], float]
Floats = NDArray[np.float64]

_CELLS_AT_ONCE = 2_000_000  # resampling works in blocks of this many numbers, so memory stays flat
_MAX_UNDEFINED = 0.05  # an interval stands only if at least 95% of the resamples define the statistic


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `reason` says why a part of it is NaN, else it is empty."""

    estimate: float
    low: float
    high: float
    n: int
    n_clusters: int
    confidence: float = 0.95
    reason: str = ""

    @property
    def defined(self) -> bool:
        """Whether both bounds are numbers."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def __str__(self) -> str:
        if not self.defined:
            return f"{self.estimate:.3g} (no interval: {self.reason})"
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class PairedTest:
    """Mean difference a - b with its interval, and the two-sided p of the cluster sign-flip test."""

    difference: Interval
    p: float
    n_perm: int
    reason: str = ""


def mean(values: NDArray[Any]) -> float:
    """The mean; the default statistic of `clustered_bootstrap`, which then takes its vectorised path."""
    return float(np.mean(values))


def clustered_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    statistic: Statistic = mean,
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of `statistic(values)` from resampling whole clusters with replacement.

    `values` [n] or [n, k] (a statistic of several columns gets rows [m, k]); `clusters` [n], any labels.
    With fewer than about 20 clusters percentile intervals are somewhat too narrow. Undefined parts are NaN
    and `reason` says why. Raises InputError for lengths that differ or a confidence outside (0, 1).
    """
    rows = np.asarray(values)
    codes, n_clusters = cluster_codes(clusters, len(rows))
    _check_confidence(confidence)
    _check_count("n_boot", n_boot)
    nan = Interval(math.nan, math.nan, math.nan, len(rows), n_clusters, confidence)
    if reason := _why_undefined(rows):
        return replace(nan, reason=reason)
    estimate = float(statistic(rows))
    if math.isnan(estimate):
        return replace(nan, reason="the statistic is undefined on the full sample")
    if n_clusters < 2:
        return replace(nan, estimate=estimate, reason=f"an interval needs 2 clusters, got {n_clusters}")
    rng = np.random.default_rng(seed)
    fast = statistic is mean and rows.ndim == 1
    draws = (
        _bootstrap_means(rows, codes, n_clusters, n_boot, rng)
        if fast
        else _bootstrap(rows, codes, n_clusters, statistic, n_boot, rng)
    )
    missing = float(np.isnan(draws).mean())
    if missing > _MAX_UNDEFINED:
        reason = f"the statistic is undefined in {missing:.0%} of the resamples"
        return replace(nan, estimate=estimate, reason=reason)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return replace(nan, estimate=estimate, low=float(low), high=float(high))


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any],
    n_perm: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedTest:
    """Is mean(a) - mean(b) more than chance? Flips the sign of whole clusters of paired differences.

    `a`, `b`, `clusters` [n], row i of each from the same case. When all 2^clusters flips are no more than
    `n_perm` they are enumerated and p is exact; otherwise p = (1 + hits) / (1 + n_perm), never 0 (Phipson and
    Smyth, 2010). p is NaN with a reason when the data define no test. Raises InputError for unequal lengths.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"a and b must be paired lists of one length, got shapes {x.shape} and {y.shape}")
    _check_count("n_perm", n_perm)
    difference = clustered_bootstrap(x - y, clusters, confidence=confidence, seed=seed)
    if difference.reason:
        return PairedTest(difference, math.nan, 0, difference.reason)
    codes, n_clusters = cluster_codes(clusters, len(x))
    sums = np.bincount(codes, weights=x - y, minlength=n_clusters)
    # Float noise must not decide whether a tie counts as a hit.
    observed = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
    if n_clusters < 63 and 2**n_clusters <= n_perm:
        hits = sum(int((np.abs(s @ sums) >= observed).sum()) for s in _all_signs(n_clusters))
        return PairedTest(difference, hits / 2**n_clusters, 2**n_clusters)
    rng = np.random.default_rng(seed)
    hits = sum(int((np.abs(s @ sums) >= observed).sum()) for s in _random_signs(n_clusters, n_perm, rng))
    return PairedTest(difference, (1 + hits) / (1 + n_perm), n_perm)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve from midranks, so ties count one half; NaN where it is undefined.

    `scores` [n] with `labels` [n] of 0/1; or `scores` [n, k] with `labels` [n] of column numbers, which gives
    the macro mean over one-vs-rest classes. NaN when a class is absent or a score is NaN. Raises InputError
    for shapes or labels that do not fit.
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim == 2:
        return float(np.mean(auroc_per_class(s, labels)))
    y = _check_labels(s, labels, 2)
    positive = y == 1
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0 or np.isnan(s).any():
        return math.nan
    rank_sum = float(_midranks(s)[positive].sum())
    return (rank_sum - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)


def auroc_per_class(scores: ArrayLike, labels: ArrayLike) -> Floats:
    """One-vs-rest AUROC of every column: `scores` [n, k], `labels` [n] of column numbers, returns [k].

    NaN for a class that is absent (or the only one present). Raises InputError for shapes that do not fit.
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or s.shape[1] < 2:
        raise InputError(f"scores must be [n, k] with at least 2 classes, got shape {s.shape}")
    y = _check_labels(s, labels, s.shape[1])
    return np.array([auroc(s[:, k], y == k) for k in range(s.shape[1])])


def accuracy(predicted: Sequence[Any] | NDArray[Any], labels: Sequence[Any] | NDArray[Any]) -> float:
    """Share of predictions equal to their label; None (an unparseable answer) counts as wrong.

    NaN for no rows. Raises InputError when the lengths differ.
    """
    if len(predicted) != len(labels):
        raise InputError(f"got {len(predicted)} predictions for {len(labels)} labels; pass one for each")
    if len(labels) == 0:
        return math.nan
    return sum(p is not None and bool(p == y) for p, y in zip(predicted, labels)) / len(labels)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion of `n` independent trials (Wilson, 1927).

    For rows that share scenarios use `clustered_bootstrap`. NaN with a reason when n is 0. Raises InputError
    unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise InputError(f"successes must lie between 0 and n, got {successes} of {n}")
    _check_confidence(confidence)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, 0, confidence, "no trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The end points are exact at 0 and n; arithmetic would leave 1e-17 there.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(p, low, high, n, n, confidence)


def newcombe(a: Interval, b: Interval) -> Interval:
    """Interval of the difference p_a - p_b of two independent proportions, from their Wilson intervals.

    Newcombe's hybrid score method (1998, method 10), at the confidence of `a` and `b`. NaN with a reason where one of
    them has no trials.
    """
    n, estimate = a.n + b.n, a.estimate - b.estimate
    if not (a.defined and b.defined):
        return Interval(estimate, math.nan, math.nan, n, n, a.confidence, a.reason or b.reason)
    low = estimate - math.hypot(a.estimate - a.low, b.high - b.estimate)
    high = estimate + math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(estimate, max(low, -1.0), min(high, 1.0), n, n, a.confidence)


def rank_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike | None = None, *, fewest: int = 3) -> float:
    """Spearman's correlation of two lists where both are defined, ties at their mean rank; partial with `given`.

    NaN for fewer than `fewest` values, or where a list does not vary.
    """
    columns = np.asarray([x, y] if given is None else [x, y, given], dtype=np.float64)
    columns = columns[:, ~np.isnan(columns).any(0)]
    if columns.shape[1] < fewest:
        return math.nan
    ranks = np.stack([_midranks(column) for column in columns])
    if (ranks.std(1) == 0).any():
        return math.nan
    if given is not None:
        ranks = np.stack([r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]])
        if any(np.allclose(r, 0) for r in ranks):
            return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def holm(pvalues: ArrayLike) -> Floats:
    """Holm-adjusted p values [m] in the given order, controlling family-wise error (Holm, 1979).

    NaN entries are tests not made: they stay NaN and do not count. Raises InputError outside [0, 1].
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or bool(((p < 0) | (p > 1)).any()):
        raise InputError("p values must be one flat list of numbers between 0 and 1")
    adjusted = np.full(len(p), math.nan)
    made = np.flatnonzero(~np.isnan(p))
    order = made[np.argsort(p[made], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


# ---------------------------------------------------------------------------------------------- resampling


def _bootstrap_means(
    values: NDArray[Any], codes: NDArray[np.intp], n_clusters: int, n_boot: int, rng: np.random.Generator
) -> Floats:
    """Means of resamples, from cluster sums and sizes alone: a resample is a vector of cluster counts."""
    sums = np.bincount(codes, weights=values.astype(np.float64), minlength=n_clusters)
    sizes = np.bincount(codes, minlength=n_clusters).astype(np.float64)
    even = np.full(n_clusters, 1 / n_clusters)
    blocks = []
    for size in _blocks(n_boot, n_clusters):
        counts = rng.multinomial(n_clusters, even, size=size).astype(np.float64)
        blocks.append((counts @ sums) / (counts @ sizes))
    return np.concatenate(blocks)


def _bootstrap(
    values: NDArray[Any],
    codes: NDArray[np.intp],
    n_clusters: int,
    statistic: Statistic,
    n_boot: int,
    rng: np.random.Generator,
) -> Floats:
    """Any statistic of the resampled rows, one call per resample."""
    members = [np.flatnonzero(codes == c) for c in range(n_clusters)]
    draws = np.empty(n_boot)
    for i in range(n_boot):
        chosen = rng.integers(0, n_clusters, size=n_clusters)
        draws[i] = statistic(values[np.concatenate([members[c] for c in chosen])])
    return draws


def _all_signs(n_clusters: int) -> Iterator[Floats]:
    """Every sign pattern of the clusters, in blocks [m, n_clusters]."""
    bits = np.arange(n_clusters)
    start = 0
    for size in _blocks(2**n_clusters, n_clusters):
        codes = np.arange(start, start + size)[:, None]
        yield np.where((codes >> bits) & 1, -1.0, 1.0)
        start += size


def _random_signs(n_clusters: int, n_perm: int, rng: np.random.Generator) -> Iterator[Floats]:
    """`n_perm` random sign patterns, in blocks [m, n_clusters]."""
    for size in _blocks(n_perm, n_clusters):
        yield np.where(rng.random((size, n_clusters)) < 0.5, -1.0, 1.0)


def _blocks(total: int, width: int) -> Iterator[int]:
    """Split `total` rows of `width` numbers into block sizes of bounded memory."""
    step = max(1, _CELLS_AT_ONCE // width)
    for start in range(0, total, step):
        yield min(step, total - start)


def _midranks(values: Floats) -> Floats:
    """Ranks from 1, tied values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# -------------------------------------------------------------------------------------------------- checks


def cluster_codes(clusters: Sequence[Any] | NDArray[Any], n: int) -> tuple[NDArray[np.intp], int]:
    """Number the clusters in order of first appearance; labels may be of any hashable kind."""
    labels = clusters.tolist() if isinstance(clusters, np.ndarray) else list(clusters)
    if len(labels) != n:
        raise InputError(f"got {len(labels)} cluster labels for {n} values; pass one for each")
    number: dict[Any, int] = {}
    codes = [number.setdefault(tuple(x) if isinstance(x, list) else x, len(number)) for x in labels]
    return np.array(codes, dtype=np.intp), len(number)


def _why_undefined(rows: NDArray[Any]) -> str:
    """Why no statistic of these rows can be trusted, or an empty string."""
    if len(rows) == 0:
        return "no values"
    if np.issubdtype(rows.dtype, np.floating):
        bad = int((~np.isfinite(rows.reshape(len(rows), -1))).any(axis=1).sum())
        if bad:
            return f"{bad} of {len(rows)} values are NaN or infinite"
    return ""


def _check_labels(scores: Floats, labels: ArrayLike, n_classes: int) -> NDArray[np.intp]:
    y = np.asarray(labels)
    if scores.ndim not in (1, 2) or y.shape != scores.shape[:1]:
        raise InputError(f"scores and labels do not fit: shapes {scores.shape} and {y.shape}")
    as_int = y.astype(np.intp) if y.dtype.kind in "biuf" and np.isfinite(y).all() else None
    if as_int is None or (as_int != y).any() or ((as_int < 0) | (as_int >= n_classes)).any():
        raise InputError(f"labels must be whole numbers from 0 to {n_classes - 1}")
    return cast("NDArray[np.intp]", as_int)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
