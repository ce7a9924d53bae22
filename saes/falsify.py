"""Is a latent about what its steps mean, or about a few tokens in them? Injection and removal of its own tokens.

Many "reasoning" latents answer to surface cues (arXiv 2601.05679). N-grams from where a latent fires most are tried in
texts where it is silent, and those that drive it most are put into neutral texts: a latent that fires there as it does
at its own steps is a detector of those tokens. All n-grams tried are then taken out of the latent's own steps. Random
n-grams of the same lengths at the same places, and random tokens taken out, are the controls. N-grams are chosen on
some traces and tested on others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emocircuits.activations.sites import Key
from emocircuits.errors import InputError
from emocircuits.evaluation.statistics import Interval, PairedTest, clustered_bootstrap, holm, paired_test
from emocircuits.reasoning.traces import Trace

from .cues import Cue, Ngram, find_cues, inject, rows_of, without
from .features import check_latents, encode_items
from .metrics import Coder
from .splice import check_place
from .tokens import StepTokens, place_steps

Floats = NDArray[np.float64]
SURFACE, CONTEXT, ANYWHERE = "surface cue", "needs context", "fires anywhere"
UNDECIDED, NO_CUE, SILENT = "undecided", "no cue", "silent"
ENOUGH = 0.5  # of the activation at a latent's own steps: what its tokens alone must reach to explain it


@dataclass(frozen=True)
class Settings:
    """n-grams per latent (`cues`) of at most `longest` tokens, the best of `candidates` from its `top` strongest tokens
    when tried in `trials` texts; its `steps` strongest steps are its own; `draws` random n-grams stand beside each cue.
    """

    cues: int = 3
    candidates: int = 20
    trials: int = 6
    longest: int = 3
    top: int = 50
    steps: int = 20
    draws: int = 4
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Falsified:
    """What a latent's tokens do on their own. Shares are of `genuine`, its mean activation at its own steps.

    genuine: mean over its strongest steps of their largest activation. untouched, injected, random: largest activation
    in neutral texts as they are, with its cues, and with random n-grams in their place; intervals over texts. p: of
    over_random (injected less random, paired), Holm over latents. removed, removed_random: what is left at those of its
    own steps that hold one of all n-grams `tried` when they, or as many random tokens, are taken out, over what was
    there; the step's other tokens remain.
    """

    latent: int
    cues: tuple[Cue, ...]
    tried: tuple[Cue, ...]
    genuine: float
    untouched: Interval
    injected: Interval
    random: Interval
    over_random: PairedTest
    removed: Interval
    removed_random: Interval
    p: float = math.nan
    verdict: str = UNDECIDED

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def falsify(
    model: Any,
    tokenizer: Any,
    sae: Coder,
    key: Key,
    latents: Sequence[int],
    known: Sequence[Trace],
    unseen: Sequence[Trace],
    neutral: Sequence[Trace],
    settings: Settings | None = None,
    clusters: Sequence[Any] | None = None,
) -> list[Falsified]:
    """Test each latent: cues from `known` traces, its own steps from `unseen` ones, injection into `neutral` texts.

    clusters: of the neutral texts, one each (default: its id). A latent is a "surface cue" when injected tokens reach
    at least half of its genuine activation (lower bound) and more than random ones (p <= 0.05), and "needs context"
    when they reach less than half (upper bound); one that reaches half in untouched neutral texts "fires anywhere".
    Raises InputError before any pass for latents that do not exist, and as `check_place` and `place_steps` do.
    """
    settings = settings or Settings()
    check_place(model, sae, key)
    latents = list(dict.fromkeys(latents))
    check_latents(sae, latents)
    if clusters is not None and len(clusters) != len(neutral):
        raise InputError(f"there are {len(neutral)} neutral texts and {len(clusters)} clusters; give one for each")
    placed = [place_steps(model, tokenizer, given, "all") for given in (known, unseen, neutral)]
    reader = Reader(model, tokenizer, sae, key, tuple(latents), settings)
    ids = [t.id or str(i) for i, t in enumerate(neutral)]
    cluster = dict(zip(ids, ids if clusters is None else clusters))
    names = [cluster[item.trace] for item in placed[2]]
    before, own, quiet = (reader.activations(items) for items in placed)
    found = []
    for column, latent in enumerate(latents):
        rng = np.random.default_rng([settings.seed, latent])
        values = [a[:, column] for a in before]
        tried = find_cues(
            placed[0], values, tokenizer, n=settings.candidates, longest=settings.longest, top=settings.top
        )
        test = _Test(reader, column, latent, tried, placed[0], rng)
        test = replace(test, cues=test.screened([_peak(v) for v in values]))
        steps = _strongest(placed[1], [a[:, column] for a in own], settings.steps)
        found.append(test.run(placed[2], [_peak(a[:, column]) for a in quiet], names, placed[1], steps))
    p = holm([f.over_random.p for f in found])
    return [replace(f, p=float(value), verdict=_verdict(f, float(value))) for f, value in zip(found, p)]


def _verdict(f: Falsified, p: float) -> str:
    if not f.genuine > 0:
        return SILENT
    if not f.cues:
        return NO_CUE
    if f.untouched.low >= ENOUGH:
        return ANYWHERE
    if f.injected.low >= ENOUGH and p <= 0.05 and f.over_random.difference.estimate > 0:
        return SURFACE
    return CONTEXT if f.injected.high < ENOUGH else UNDECIDED


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reader:
    """Activations of some latents at the tokens of texts; at sinks, which no SAE here was trained on, they are 0."""

    model: Any
    tokenizer: Any
    sae: Coder
    key: Key
    latents: tuple[int, ...]
    settings: Settings

    def activations(self, items: Sequence[StepTokens]) -> list[Floats]:
        """[rows, latents] of each item."""
        size = self.settings.batch_size
        codes = encode_items(self.model, self.tokenizer, self.sae, self.key, items, size)
        return [code[:, list(self.latents)].toarray().astype(np.float64) for code in codes]


def _peak(values: Floats) -> float:
    return float(values.max(initial=0.0))


@dataclass(frozen=True)
class _Step:
    """A step of an item: which one, its rows, and the latent's largest activation there."""

    item: int
    rows: tuple[int, ...]
    peak: float


def _strongest(items: Sequence[StepTokens], values: Sequence[Floats], n: int) -> list[_Step]:
    """The n steps where a latent fires most, strongest first."""
    found = []
    for i, (item, own) in enumerate(zip(items, values)):
        rows: dict[int, list[int]] = {}
        for row, record in enumerate(item.records):
            rows.setdefault(record["step"], []).append(row)
        found += [_Step(i, tuple(r), _peak(own[r])) for r in rows.values()]
    return sorted((s for s in found if s.peak > 0), key=lambda s: -s.peak)[:n]


# ---------------------------------------------------------------------------------------------- the test


@dataclass(frozen=True)
class _Test:
    """One latent (column of the reader's) against its n-grams, `cues` the best of them; random ones are of the pool."""

    reader: Reader
    column: int
    latent: int
    tried: tuple[Cue, ...]
    pool: Sequence[StepTokens]
    rng: np.random.Generator
    cues: tuple[Cue, ...] = ()

    def run(
        self, texts: Sequence[StepTokens], quiet: Sequence[float], clusters: Sequence[Any],
        items: Sequence[StepTokens], steps: Sequence[_Step],
    ) -> Falsified:  # fmt: skip
        genuine = float(np.mean([s.peak for s in steps])) if steps else 0.0
        if not steps or not self.cues:
            reason = "it fires at no step" if not steps else "no n-gram recurs at its strongest tokens"
            none = Interval(math.nan, math.nan, math.nan, 0, 0, reason=reason)
            test = PairedTest(none, math.nan, 0, reason)
            return Falsified(self.latent, self.cues, self.tried, genuine, none, none, none, test, none, none)
        seed = self.reader.settings.seed
        injected, random = self._injected(texts)
        shares = [np.asarray(v) / genuine for v in (quiet, injected, random)]
        untouched, own, other = (clustered_bootstrap(v, clusters, seed=seed) for v in shares)
        test = paired_test(shares[1], shares[2], clusters, seed=seed)
        return Falsified(
            self.latent, self.cues, self.tried, genuine, untouched, own, other, test, *self._removed(items, steps, seed)
        )

    def screened(self, peaks: Sequence[float]) -> tuple[Cue, ...]:
        """The n-grams that make the latent fire most, each alone in texts of the pool where it fires least.

        peaks: its largest activation in each text of the pool. No two of them share a token.
        """
        if not self.tried:
            return ()
        settings = self.reader.settings
        quiet = np.argsort(np.array(peaks), kind="stable")
        quiet = quiet[: max(settings.trials, int((np.array(peaks) == 0).sum()))]
        texts = [self.pool[i] for i in self.rng.permutation(quiet)[: settings.trials]]
        made = [inject(item, self._places(item, 1), [cue.ids]) for cue in self.tried for item in texts]
        reached = np.array(self._peaks(made)).reshape(len(self.tried), -1)
        chosen: list[Cue] = []
        for i in np.argsort(-reached.mean(1), kind="stable"):
            fresh = not any(set(self.tried[i].ids) & set(other.ids) for other in chosen)
            if fresh and len(chosen) < settings.cues:
                chosen.append(self.tried[i])
        return tuple(chosen)

    def _injected(self, texts: Sequence[StepTokens]) -> tuple[list[float], list[float]]:
        """Per text, the largest activation with the cues in it, and the mean of it over draws of random n-grams."""
        draws, made = self.reader.settings.draws, []
        for item in texts:
            places = self._places(item, len(self.cues))
            made.append(inject(item, places, [cue.ids for cue in self.cues]))
            made += [inject(item, places, [self._drawn(len(cue.ids)) for cue in self.cues]) for _ in range(draws)]
        peaks = np.array(self._peaks(made)).reshape(-1, 1 + draws)
        return peaks[:, 0].tolist(), peaks[:, 1:].mean(1).tolist()

    def _removed(self, items: Sequence[StepTokens], steps: Sequence[_Step], seed: int) -> tuple[Interval, Interval]:
        """What is left at steps with one of the n-grams when all of them, or as many random tokens, are taken out."""
        draws, made, touched = self.reader.settings.draws, [], []
        for step in steps:
            item = items[step.item]
            gone = rows_of(item, step.rows, [cue.ids for cue in self.tried])
            others = [row for row in step.rows if row not in gone]
            if gone and others:
                touched.append(step)
                made.append(without(item, step.rows, gone))
                for _ in range(draws):
                    n = min(len(gone), len(step.rows) - 1)
                    made.append(without(item, step.rows, set(self.rng.choice(step.rows, n, replace=False).tolist())))
        if not touched:
            none = Interval(
                math.nan, math.nan, math.nan, 0, 0, reason="no strong step holds one of its n-grams and other tokens"
            )
            return none, none
        left = np.array(self._peaks(made)).reshape(-1, 1 + draws) / np.array([s.peak for s in touched])[:, None]
        clusters = [items[s.item].trace for s in touched]
        own, random = (clustered_bootstrap(v, clusters, seed=seed) for v in (left[:, 0], left[:, 1:].mean(1)))
        return own, random

    def _peaks(self, items: Sequence[StepTokens]) -> list[float]:
        return [_peak(a[:, self.column]) for a in self.reader.activations(items)]

    def _places(self, item: StepTokens, n: int) -> list[int]:
        """Token positions to put n-grams before: starts of words, each at most once while there are enough."""
        at = [a for a, _ in item.read]
        words = [a for a in at[1:] if self.reader.tokenizer.decode([item.ids[a]])[:1].isspace()] or at
        return sorted(self.rng.choice(words, n, replace=len(words) < n).tolist())

    def _drawn(self, n: int) -> Ngram:
        """A random n-gram of the pool, common ones more often, that shares no token with the cues."""
        taken = {token for cue in self.cues for token in cue.ids}
        for _ in range(1000):
            item = self.pool[int(self.rng.integers(len(self.pool)))]
            first, last = item.read[0][0], item.read[-1][1]
            start = int(self.rng.integers(first, max(last - n, first) + 1))
            ngram = tuple(item.ids[start : min(start + n, last)])
            if len(ngram) == n and not taken & set(ngram):
                return ngram
        raise InputError(
            f"latent {self.latent}: the traces hold no {n} tokens in a row without its cues to compare with"
        )
