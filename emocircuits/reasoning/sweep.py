"""Rollouts at the boundaries of a trace: all of them, as many as are needed, or with a forced answer.

Thought Anchors (arXiv 2506.19143). Work goes through a store where one is given, so that what was sampled once is
never sampled again; rollout (boundary, index) is the same in every one of these functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..errors import InputError
from ..evaluation.statistics import Interval, newcombe, wilson
from .engines import Engine, Sampling
from .source import Source, Splitter, is_scored
from .store import Key, RolloutStore
from .traces import Rollout, Rollouts, Trace

CLOSING = "\n</think>\n\n"


@dataclass(frozen=True)
class Spent:
    """What rollouts cost: tokens sampled (also in earlier runs, if a store had them), tokens that passed through the
    model in this run with shared prefixes counted once (None: the engine cannot know), and how many rollouts."""

    sampled_tokens: int
    computed_tokens: int | None
    rollouts: int


@dataclass(frozen=True)
class Adaptive:
    """Rollouts of an adaptive sweep. effects [n]: what fixing each step adds to the share of rollouts that hit the
    target, with its interval; open: the steps for which that is still too vague."""

    rollouts: Rollouts
    spent: Spent
    effects: tuple[Interval, ...]
    open: tuple[int, ...]


def sweep(
    trace: Trace,
    engine: Engine,
    answers: Any,
    *,
    sampling: Sampling,
    n: int = 100,
    store: RolloutStore | str | Path | None = None,
    boundaries: Iterable[int] | None = None,
    split: Splitter | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """`n` rollouts at every boundary 0..len(trace), or at `boundaries`; what the store has is not sampled again.

    answers: see `source.Answers`. split: cuts a continuation into steps (default: `steps.split`), the first of which is
    kept beside it. Errors of an engine are kept too, and tried again by the next call. Raises InputError for bad input
    or another trace's store, before anything is sampled.
    """
    places = _boundaries(trace, boundaries)
    source = Source(trace, engine, answers, sampling, store, split=split, progress=progress)
    return source.get(_keys(places, dict.fromkeys(places, _checked("n", n))))


def forced(
    trace: Trace,
    engine: Engine,
    answers: Any,
    stem: str = "",
    n: int = 100,
    *,
    sampling: Sampling | None = None,
    closing: str = CLOSING,
    store: RolloutStore | str | Path | None = None,
    boundaries: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """The answer given at once: `n` short continuations of prefix + closing + stem at every boundary.

    The answer is looked for in stem + continuation, never in the prefix. With answers scored by likelihood nothing is
    drawn: their own stem is used, and one rollout a boundary holds the chances. Give it a store of its own.
    """
    places, scored = _boundaries(trace, boundaries), is_scored(answers)
    counts = dict.fromkeys(places, 1 if scored else _checked("n", n))
    short = sampling or Sampling(32)
    source = Source(trace, engine, answers, short, store, progress=progress, closing=closing, stem=stem, forced=True)
    return source.get(_keys(places, counts))


def adaptive(
    trace: Trace,
    engine: Engine,
    answers: Any,
    *,
    sampling: Sampling,
    budget: int,
    width: float = 0.35,
    threshold: float = 0.2,
    confidence: float = 0.95,
    n: int = 100,
    first: int = 10,
    batch: int = 10,
    store: RolloutStore | str | Path | None = None,
    split: Splitter | None = None,
    progress: Progress | None = None,
) -> Adaptive:
    """Rollouts where the importance of a step is still vague: its interval wider than `width`, or across +-`threshold`.

    Importance is the difference between neighbouring boundaries in the share of rollouts that are correct (where the
    trace's truth is known) or else give the trace's answer (or else the most frequent one), with Newcombe's interval.
    `first` rollouts everywhere, then rounds of `batch` at the less sampled side of every vague step, the widest first,
    up to `n`, until nothing is vague or about `budget` sampled tokens are spent. A boundary's rollouts are the first
    ones of the full sweep; the result depends on nothing but seed and model.
    """
    for name, value in (("budget", budget), ("n", n), ("first", first), ("batch", batch)):
        _checked(name, value)
    source = Source(trace, engine, answers, sampling, store, split=split, progress=progress)
    before = engine.computed_tokens
    counts = dict.fromkeys(range(len(trace) + 1), min(first, n))
    while True:
        found = source.get(_keys(range(len(trace) + 1), counts))
        effects = _effects(trace, found, confidence)
        vague = [i for i, effect in enumerate(effects) if _is_vague(effect, width, threshold)]
        sampled = sum(r.n_tokens for r in found.items)
        affordable = int((budget - sampled) / max(1.0, sampled / len(found.items)) / batch)
        growing = _growing(effects, vague, counts, n)[: max(affordable, 0)]
        if not growing:
            break
        counts |= {k: min(counts[k] + batch, n) for k in growing}
    after = engine.computed_tokens
    computed = None if before is None or after is None else after - before
    return Adaptive(found, Spent(sampled, computed, len(found.items)), tuple(effects), tuple(vague))


def _effects(trace: Trace, rollouts: Rollouts, confidence: float) -> list[Interval]:
    """The difference that each step makes to the share of rollouts that hit the target."""
    groups = [rollouts.at(k) for k in range(len(trace) + 1)]
    hit = _target(trace, [r for group in groups for r in group])
    shares = [wilson(sum(map(hit, group)), len(group), confidence) for group in groups]
    return [newcombe(after, before) for before, after in zip(shares, shares[1:])]


def _target(trace: Trace, rollouts: Sequence[Rollout]) -> Callable[[Rollout], bool]:
    if trace.truth is not None and any(r.correct is not None for r in rollouts):
        return lambda r: r.correct is True
    given = Counter(r.answer for r in rollouts if r.answer is not None)
    target = trace.answer if trace.answer is not None else next((a for a, _ in given.most_common(1)), None)
    return lambda r: r.answer is not None and r.answer == target


def _is_vague(effect: Interval, width: float, threshold: float) -> bool:
    across = any(effect.low < t < effect.high for t in (-threshold, threshold))
    return not effect.defined or effect.high - effect.low > width or across


def _growing(effects: Sequence[Interval], vague: Sequence[int], counts: Mapping[int, int], n: int) -> list[int]:
    """The less sampled side of every vague step (both where they are even), the widest interval first."""
    widths: dict[int, float] = {}
    for i in vague:
        width = effects[i].high - effects[i].low if effects[i].defined else 2.0
        for k in (i, i + 1):
            if counts[k] < n and counts[k] == min(counts[i], counts[i + 1]):
                widths[k] = max(widths.get(k, 0.0), width)
    return sorted(widths, key=lambda k: (-widths[k], k))


def _checked(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")
    return value


def _boundaries(trace: Trace, wanted: Iterable[int] | None) -> list[int]:
    places = list(range(len(trace) + 1)) if wanted is None else sorted(set(wanted))
    for place in places:
        trace.prefix(place)  # raises InputError for one that is not there
    return places


def _keys(boundaries: Iterable[int], counts: Mapping[int, int]) -> list[Key]:
    return [(k, i) for k in boundaries for i in range(counts[k])]
