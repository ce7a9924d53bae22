"""How much each step of a trace moves the final answer, with intervals, a noise floor and the headroom there was.

Every black-box importance compares two sets of rollouts: without the step fixed, and with it. Each rollout is a row of
answer probabilities (one-hot where the answer was drawn), so one function does them all (arXiv 2506.19143):

    resampling       rollouts at i                      against rollouts at i + 1
    counterfactual   those at i with another step       against rollouts at i + 1 (`pooled`: and the others at i)
    forced           forced answers at i                against forced answers at i + 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, unknown
from ..evaluation.embeddings import SentenceEncoder
from .traces import Rollout, Rollouts, Trace

Floats = NDArray[np.float64]
NONE = "<none>"
"""The outcome of a rollout that gave no answer: counted as wrong, never dropped silently."""
KINDS = ("resampling", "counterfactual", "forced")
METRICS = ("kl", "accuracy")
EXACT = 1e-12
"""Smoothing of chances that are known: only there so that a chance of exactly 0 gives no infinity."""


@dataclass(frozen=True)
class Importance:
    """Importance of each step, arrays [n]; NaN with a reason where it is undefined.

    value: in nats (kl) or as a difference of accuracies, with the step minus without (accuracy). low, high: percentile
    bootstrap over rollouts. floor: mean value of two samples of the same sizes from the rollouts with the step.
    p: share of those null values at least as large. headroom: entropy in nats of the answers without the step: no
    step can resolve more. n_without, n_with: rollouts on each side. none_rate: share of them without an answer.
    """

    kind: str
    metric: str
    value: Floats
    low: Floats
    high: Floats
    floor: Floats
    p: Floats
    headroom: Floats
    n_without: NDArray[np.int64]
    n_with: NDArray[np.int64]
    none_rate: Floats
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.value)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per step, as JSON takes it."""
        names = [f.name for f in fields(self) if f.name not in ("kind", "metric", "reasons")]
        columns = {name: getattr(self, name).tolist() for name in names} | {"reason": list(self.reasons)}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def anchors(self, level: float = 0.05) -> list[int]:
        """Steps whose importance passes the null at `level` after Holm's correction, largest first."""
        from ..evaluation.statistics import holm

        kept = np.flatnonzero(holm(self.p) <= level)
        return sorted(kept.tolist(), key=lambda i: -abs(self.value[i]))


class Similarity:
    """Cosine of sentence embeddings; each distinct sentence is embedded once for the life of the object."""

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.floating]] | None = None) -> None:
        """encode: texts -> unit vectors [n, d]; MiniLM-L6 by default, the published choice."""
        self._encode = encode
        self._rows: dict[str, NDArray[np.floating]] = {}

    @cached_property
    def _encoder(self) -> Callable[[Sequence[str]], NDArray[np.floating]]:
        return self._encode or SentenceEncoder().encode

    def vectors(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """Unit vectors [n, d]."""
        if missing := [t for t in dict.fromkeys(texts) if t not in self._rows]:
            self._rows.update(zip(missing, self._encoder(missing)))
        return np.stack([self._rows[t] for t in texts]) if texts else np.zeros((0, 1))

    def to(self, sentence: str, texts: Sequence[str]) -> Floats:
        """Cosine of each text with the sentence, [n]; a text without words is like nothing (-1)."""
        if not texts:
            return np.zeros(0)
        cosines = self.vectors(texts) @ self.vectors([sentence])[0]
        return np.where([bool(t.strip()) for t in texts], cosines, -1.0).astype(np.float64)


# ---------------------------------------------------------------- the one comparison


def answer_rows(groups: Sequence[Sequence[Rollout]]) -> tuple[list[Floats], list[str]]:
    """Answer probabilities of the rollouts of each group, [R, V] each, and the vocabulary they share."""
    vocabulary: dict[str, int] = {}
    chances = [[r.probabilities or {NONE if r.answer is None else r.answer: 1.0} for r in group] for group in groups]
    for answer in (answer for group in chances for row in group for answer in row):
        vocabulary.setdefault(answer, len(vocabulary))
    tables = [np.zeros((len(group), len(vocabulary))) for group in groups]
    for table, group in zip(tables, chances):
        for row, found in zip(table, group):
            row[[vocabulary[answer] for answer in found]] = list(found.values())
    return tables, list(vocabulary)


def smoothed_kl(counts_p: Floats, counts_q: Floats, alpha: float = 0.5) -> Floats:
    """D_KL(p || q) in nats of counts [..., V] with `alpha` added to each answer that either side has, [...].

    alpha=1e-9 is the published estimator, whose values are set by answers that one side lacks.
    """
    seen = (counts_p > 0) | (counts_q > 0)
    size = seen.sum(-1, keepdims=True)
    p = (counts_p + alpha * seen) / (counts_p.sum(-1, keepdims=True) + alpha * size)
    q = (counts_q + alpha * seen) / (counts_q.sum(-1, keepdims=True) + alpha * size)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(seen & (p > 0), p * (np.log(p) - np.log(q)), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def entropy(rows: Floats) -> float:
    """Entropy in nats of the mean of answer rows [R, V]; NaN for none."""
    if not len(rows):
        return math.nan
    p = rows.mean(0)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


Statistic = Callable[[Floats, Floats], Floats]
"""(answer counts without [..., V], with [..., V]) -> importance [...]"""


def statistic_of(metric: str, right: Floats | None = None, alpha: float = 0.5) -> Statistic:
    """kl: D_KL(without || with). accuracy: with minus without, `right` [V] saying which answers are correct."""
    if metric == "kl":
        return lambda without, with_: smoothed_kl(without, with_, alpha)
    if metric != "accuracy":
        raise unknown("metric", metric, METRICS)
    if right is None:
        raise InputError("importance by accuracy needs to know which answers are right; give the trace a truth")

    def difference(without: Floats, with_: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (with_ @ right) / with_.sum(-1) - (without @ right) / without.sum(-1)

    return difference


def resampled(rows: Floats, size: int, n_boot: int, rng: np.random.Generator) -> Floats:
    """Answer counts [n_boot, V] of `size` rows drawn with replacement."""
    weights = rng.multinomial(size, np.full(len(rows), 1 / len(rows)), size=n_boot)
    return weights.astype(np.float64) @ rows


@dataclass(frozen=True)
class _Compared:
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    floor: float = math.nan
    p: float = math.nan
    reason: str = ""


def _compare(
    without: Floats, with_: Floats, statistic: Statistic, n_boot: int, confidence: float, rng: np.random.Generator
) -> _Compared:
    value = float(statistic(without.sum(0), with_.sum(0)))
    if len(without) < 2 or len(with_) < 2:
        return _Compared(value, reason="one rollout has no spread: no interval and no null")
    draws = statistic(resampled(without, len(without), n_boot, rng), resampled(with_, len(with_), n_boot, rng))
    null = statistic(resampled(with_, len(without), n_boot, rng), resampled(with_, len(with_), n_boot, rng))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    p = (1 + int((np.abs(null) >= abs(value) - 1e-12).sum())) / (1 + n_boot)
    return _Compared(value, float(low), float(high), float(null.mean()), p)


# ---------------------------------------------------------------- importance along a trace


def importance(
    trace: Trace,
    rollouts: Rollouts,
    kind: str = "resampling",
    metric: str = "kl",
    *,
    tau: float = 0.8,
    pooled: bool = False,
    similarity: Similarity | None = None,
    alpha: float | None = None,
    drop_none: bool = False,
    n_boot: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Importance:
    """Importance of every step from the rollouts at its two boundaries.

    kind: "resampling", "counterfactual" (only rollouts at i whose first step has a cosine under `tau` with step i are
    without it; `pooled` counts the others as having it, as the released code does) or "forced" (pass the forced
    rollouts). The sign of accuracy is the same for all: with the step minus without it; the released code has the
    counterfactual one reversed. alpha: see `smoothed_kl`; by default 0.5 where answers were drawn, and next to nothing
    where they were scored, for chances are known and not counted. Raises InputError for rollouts of another trace, or
    accuracy without a truth.
    """
    if kind not in KINDS:
        raise unknown("kind of importance", kind, KINDS)
    if rollouts.n != len(trace):
        raise InputError(f"the rollouts are of a trace of {rollouts.n} steps, this one has {len(trace)}")
    groups = [rollouts.at(k) for k in range(len(trace) + 1)]
    if drop_none:
        groups = [tuple(r for r in g if r.answer is not None or r.probabilities) for g in groups]
    rows, vocabulary = answer_rows(groups)
    right = _right(vocabulary, groups, trace) if metric == "accuracy" else None
    if alpha is None:
        alpha = EXACT if all(r.probabilities for g in groups for r in g) else 0.5
    statistic = statistic_of(metric, right, alpha)
    none = vocabulary.index(NONE) if NONE in vocabulary else None
    others = _others(trace, groups, tau, similarity or Similarity()) if kind == "counterfactual" else []
    rng = np.random.default_rng(seed)
    found, counts, rates, rooms = [], [], [], []
    for i in range(len(trace)):
        without, with_, reason = rows[i], rows[i + 1], ""
        if kind == "counterfactual" and len(without):
            other = others[i]
            with_ = np.concatenate([with_, without[~other]]) if pooled else with_
            without = without[other]
            reason = "" if other.any() else f"no rollout at {i} starts with another step (cosine under {tau})"
        reason = reason or _missing(without, with_, i)
        found.append(
            _Compared(reason=reason) if reason else _compare(without, with_, statistic, n_boot, confidence, rng)
        )
        counts.append((len(without), len(with_)))
        both = np.concatenate([without, with_])
        rates.append(math.nan if not len(both) else 0.0 if none is None else float(both[:, none].mean()))
        rooms.append(entropy(rows[i]))
    columns = {name: np.array([getattr(c, name) for c in found]) for name in ("value", "low", "high", "floor", "p")}
    sizes = np.array(counts, dtype=np.int64)
    return Importance(
        kind, metric, **columns, headroom=np.array(rooms), n_without=sizes[:, 0], n_with=sizes[:, 1],
        none_rate=np.array(rates), reasons=tuple(c.reason for c in found),
    )  # fmt: skip


def _missing(without: Floats, with_: Floats, i: int) -> str:
    if not len(without):
        return f"no rollouts at boundary {i}"
    return "" if len(with_) else f"no rollouts at boundary {i + 1}"


def _right(vocabulary: Sequence[str], groups: Sequence[Sequence[Rollout]], trace: Trace) -> Floats | None:
    """Which answers are correct, as the rollouts say; labels scored by likelihood are compared with the truth."""
    known: dict[str, bool] = {NONE: False}
    for rollout in (r for g in groups for r in g):
        if rollout.answer is not None and rollout.correct is not None:
            known[rollout.answer] = rollout.correct
    if trace.truth is not None:
        known = {a: a.casefold() == trace.truth.casefold() for a in vocabulary} | known
    missing = [a for a in vocabulary if a not in known]
    return None if missing else np.array([float(known[a]) for a in vocabulary])


# ---------------------------------------------------------------- companions


def different_trajectories(
    trace: Trace, rollouts: Rollouts, *, tau: float = 0.8, similarity: Similarity | None = None
) -> Floats:
    """Share of the rollouts at each step that begin with a different one (cosine under `tau`), [n]; NaN for none."""
    groups = [rollouts.at(i) for i in range(len(trace))]
    others = _others(trace, groups, tau, similarity or Similarity())
    return np.array([float(other.mean()) if len(other) else math.nan for other in others])


def _others(
    trace: Trace, groups: Sequence[Sequence[Rollout]], tau: float, similarity: Similarity
) -> list[NDArray[np.bool_]]:
    """Of the rollouts before each step, which begin with another one."""
    similarity.vectors([*trace.steps.texts, *(r.step for group in groups for r in group)])  # all in one batch
    return [similarity.to(step, [r.step for r in group]) < tau for step, group in zip(trace.steps.texts, groups)]


def overdeterminedness(rollouts: Rollouts) -> Floats:
    """1 - (distinct first steps) / (rollouts) at every step, [n]: how often the model says exactly the same."""
    groups = [[r.step for r in rollouts.at(i)] for i in range(rollouts.n)]
    return np.array([1 - len(set(g)) / len(g) if g else math.nan for g in groups])


def accuracy_along(rollouts: Rollouts) -> Floats:
    """Share of right answers at each boundary, [n + 1]; no answer is wrong; NaN without rollouts of known truth."""
    groups = [[r.correct for r in rollouts.at(k) if r.correct is not None] for k in range(rollouts.n + 1)]
    return np.array([np.mean(g) if g else math.nan for g in groups])


def convergence(rollouts: Rollouts, *, window: int = 5, high: float = 0.95, low: float = 0.05) -> int | None:
    """The first boundary from which the next `window` accuracies are all over `high` or all under `low`."""
    curve = accuracy_along(rollouts)
    for i in range(len(curve) - window + 1):
        part = curve[i : i + window]
        if (part > high).all() or (part < low).all():
            return i
    return None


def sentence_matrix(
    trace: Trace,
    rollouts: Rollouts,
    split: Callable[[str], Sequence[str]],
    *,
    tau: float = 0.8,
    similarity: Similarity | None = None,
) -> Floats:
    """How much fixing step i raises the chance that step j's content appears later, [j, i]; NaN for j <= i.

    m_j(k) is the share of rollouts at k with any sentence of cosine >= tau with step j; the entry is m_j(i+1) - m_j(i).
    Raises InputError when rollouts hold only their first steps.
    """
    if rollouts.items and all(r.text == r.step for r in rollouts.items if r.finish != "error"):
        raise InputError("these rollouts hold their first sentences only; the matrix needs their whole texts")
    similarity, n = similarity or Similarity(), len(trace)
    spoken = [[[s for s in split(r.text) if s.strip()] for r in rollouts.at(k)] for k in range(n + 1)]
    similarity.vectors([*trace.steps.texts, *(s for group in spoken for said in group for s in said)])  # in one batch
    targets = similarity.vectors(trace.steps.texts)
    shares = np.full((n + 1, n), math.nan)
    for k, group in enumerate(spoken):
        hits = []
        for said in group:
            hits.append((similarity.vectors(said) @ targets.T >= tau).any(0) if said else np.zeros(n, dtype=bool))
        if hits:
            shares[k] = np.mean(hits, axis=0)
    moved = (shares[1:] - shares[:-1]).T  # [j, i]
    return np.where(np.tril(np.ones((n, n), dtype=bool), -1), moved, math.nan)


def detrended(values: Floats, positions: Floats, degree: int = 2) -> Floats:
    """Residuals of values on a polynomial of position; NaN stays. Needs more points than the degree."""
    known = ~np.isnan(values)
    if known.sum() <= degree + 1:
        raise InputError(f"a polynomial of degree {degree} needs more than {degree + 1} values, got {int(known.sum())}")
    rest = np.full(len(values), math.nan)
    rest[known] = values[known] - np.polyval(np.polyfit(positions[known], values[known], degree), positions[known])
    return rest


def answer_shares(rollouts: Rollouts) -> dict[str, Floats]:
    """Share of each answer at every boundary, {answer: [n + 1]}, the most frequent first; NaN without rollouts."""
    rows, vocabulary = answer_rows([rollouts.at(k) for k in range(rollouts.n + 1)])
    table = np.stack([r.mean(0) if len(r) else np.full(len(vocabulary), math.nan) for r in rows])
    order = np.argsort(-np.nan_to_num(table).sum(0), kind="stable")
    return {vocabulary[a]: table[:, a] for a in order}


def screened(rollouts_of: Mapping[str, Rollouts], minimum: float = 0.1) -> list[str]:
    """Problems whose first boundary leaves at least `minimum` nats of answer entropy: others have nothing to move."""
    kept = []
    for name, rollouts in rollouts_of.items():
        (rows,), _ = answer_rows([rollouts.at(0)])
        if len(rows) and entropy(rows) >= minimum:
            kept.append(name)
    return kept
