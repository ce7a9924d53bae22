"""The n-grams where a latent fires most, and texts with n-grams put in or taken out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokens import StepTokens

Floats = NDArray[np.float64]
Ngram = tuple[int, ...]


@dataclass(frozen=True)
class Cue:
    """An n-gram: its tokens, how many of the latent's strongest tokens end it, and how much commoner it is there."""

    ids: Ngram
    text: str
    count: int
    lift: float


def _ngrams(item: StepTokens, longest: int) -> Iterator[tuple[int, Ngram]]:
    """(row, n-gram that ends at it) for every row; n-grams stay within what is read."""
    for row, (at, _) in enumerate(item.read):
        first = item.read[0][0]
        for n in range(1, longest + 1):
            if at - n + 1 >= first:
                yield row, tuple(item.ids[at - n + 1 : at + 1])


def find_cues(
    items: Sequence[StepTokens],
    values: Sequence[Floats],
    tokenizer: Any,
    *,
    n: int = 20,
    longest: int = 3,
    top: int = 50,
) -> tuple[Cue, ...]:
    """At most n n-grams of a latent's strongest tokens: half of them tell these tokens best from all others (count x
    log lift), the others are those where it fires most on average.

    values: the latent's activation at each row of each item; its strongest tokens are the `top` first. An n-gram that
    ends fewer than two of them is no cue.
    """
    flat = np.concatenate([*values, np.zeros(0)])
    strong = int(min(top, (flat > 0).sum()))
    if strong == 0:
        return ()
    least = np.sort(flat)[-strong]
    inside: Counter[Ngram] = Counter()
    everywhere: Counter[Ngram] = Counter()
    total: Counter[Ngram] = Counter()
    for item, own in zip(items, values):
        for row, ngram in _ngrams(item, longest):
            everywhere[ngram] += 1
            inside[ngram] += bool(own[row] >= least)
            total[ngram] += own[row]
    share = float((flat >= least).mean())
    lift = {g: c / everywhere[g] / share for g, c in inside.items() if c > 1}
    told = sorted((g for g in lift if lift[g] > 1), key=lambda g: (-inside[g] * math.log(lift[g]), g))
    driven = sorted(lift, key=lambda g: (-total[g] / everywhere[g], g))
    both = dict.fromkeys(g for pair in zip_longest(told, driven) for g in pair if g is not None)
    return tuple(Cue(g, tokenizer.decode(list(g)), inside[g], lift[g]) for g in list(both)[:n])


def inject(item: StepTokens, places: Sequence[int], ngrams: Sequence[Ngram]) -> StepTokens:
    """The item with each n-gram put before the token at its place; the tokens put in are read, too."""
    ids, moved = list(item.ids), [a for a, _ in item.read]
    for place, ngram in sorted(zip(places, ngrams), reverse=True):
        ids[place:place] = ngram
        moved = [*(a + len(ngram) if a >= place else a for a in moved), *range(place, place + len(ngram))]
    return replace(item, ids=ids, read=[(a, a + 1) for a in sorted(moved)], records=[{}] * len(moved))


def without(item: StepTokens, rows: Sequence[int], gone: AbstractSet[int]) -> StepTokens:
    """The item up to the end of a step (`rows`) less the tokens at the rows `gone`; the rest of the step is read."""
    place = {row: item.read[row][0] for row in rows}
    out = {place[row] for row in gone}
    kept, read = [], []
    for at in range(max(place.values()) + 1):
        if at not in out:
            if at in place.values():
                read.append((len(kept), len(kept) + 1))
            kept.append(item.ids[at])
    return replace(item, ids=kept, read=read, records=[{}] * len(read))


def rows_of(item: StepTokens, rows: Sequence[int], ngrams: Sequence[Ngram]) -> set[int]:
    """Rows of a step that belong to one of the n-grams."""
    ids, found = [item.ids[item.read[row][0]] for row in rows], set()
    for ngram in ngrams:
        for i in range(len(ids) - len(ngram) + 1):
            if tuple(ids[i : i + len(ngram)]) == ngram:
                found |= set(rows[i : i + len(ngram)])
    return found
