"""Is the text still text? Repetition, loops, diversity, and a degeneracy rule fixed on unsteered text.

The measures that need the model, `perplexity` and `kl_on_neutral`, come from `likelihood` and are offered
here too. Words are runs of letters, digits and inner apostrophes, lower-cased. Undefined values are NaN.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emocircuits.errors import InputError
from emocircuits.evaluation.likelihood import check_paired, kl_on_neutral, perplexity

__all__ = [
    "FluencyThresholds",
    "Repetition",
    "alphabetic_share",
    "content_similarity",
    "degenerate",
    "distinct_n",
    "fit_thresholds",
    "kl_on_neutral",
    "length_words",
    "loops",
    "opener_concentration",
    "perplexity",
    "repetition",
    "repetition_rate",
    "words",
]

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[Any]]

MAX_UNIT, MIN_REPEATS, LOOP_SHARE = 8, 3, 0.30
"""A loop is a unit of 1-8 words said at least 3 times in a row, covering over 30% of the words."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

# ---------------------------------------------------------------- text only


def words(text: str) -> list[str]:
    """The lower-cased words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def length_words(text: str) -> int:
    """How many words a text has."""
    return len(words(text))


class Repetition(NamedTuple):
    """Repetition in one text: share of repeated n-grams for n = 1..4, and of words in its longest loop."""

    ngrams: tuple[float, ...]
    loop: float

    @property
    def rate(self) -> float:
        """The larger of the mean n-gram share and the loop share, in [0, 1]."""
        return max(float(np.mean(self.ngrams)), self.loop)


def repetition(text: str) -> Repetition:
    """Repetition by n-gram length and by loop; every field is NaN for a text without words."""
    found = words(text)
    if not found:
        return Repetition((math.nan,) * 4, math.nan)
    return Repetition(tuple(_repeated_share(found, n) for n in range(1, 5)), _longest_loop(found) / len(found))


def repetition_rate(text: str) -> float:
    """How repetitive a text is, in [0, 1]: `repetition(text).rate`; NaN for a text without words."""
    return repetition(text).rate


def loops(text: str) -> bool:
    """Whether a unit of 1-8 words repeats at least 3 times in a row and covers over 30% of the words."""
    found = words(text)
    return bool(found) and _longest_loop(found) / len(found) > LOOP_SHARE


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts together (Li et al. 2016); NaN when there is none."""
    if n < 1:
        raise InputError(f"n is {n}; give the n-gram length, 1 or more")
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def opener_concentration(texts: Sequence[str]) -> float:
    """Share of texts that start with the most common first two words; NaN when no text has a word."""
    openers = Counter(tuple(found[:2]) for text in texts if (found := words(text)))
    return max(openers.values()) / openers.total() if openers else math.nan


def alphabetic_share(text: str) -> float:
    """Share of letters of any script among the characters that are not space; NaN if there are none."""
    visible = [char for char in text if not char.isspace()]
    return float(np.mean([unicodedata.category(c)[0] in "LM" for c in visible])) if visible else math.nan


def content_similarity(a_texts: Sequence[str], b_texts: Sequence[str], embed: Embed) -> Floats:
    """Cosine [n] of the embeddings of a_texts[i] and b_texts[i]; NaN where either is blank.

    `embed` maps n texts to vectors [n, d], for example `SentenceEncoder().encode`. Raises InputError on
    unequal lengths.
    """
    check_paired("a_texts", a_texts, "b_texts", b_texts)
    n = len(a_texts)
    if n == 0:
        return np.empty(0)
    vectors = np.asarray(embed([*a_texts, *b_texts]), dtype=np.float64)
    a, b = vectors[:n], vectors[n:]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    blank = np.array([not (x.strip() and y.strip()) for x, y in zip(a_texts, b_texts)]) | (norms == 0)
    return np.where(blank, np.nan, (a * b).sum(axis=1) / np.where(norms == 0, 1.0, norms))


def _ngrams(found: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def _repeated_share(found: list[str], n: int) -> float:
    grams = _ngrams(found, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _longest_loop(found: list[str]) -> int:
    """Words covered by the longest run that repeats a unit of 1-8 words at least 3 times in a row."""
    longest = 0
    for unit in range(1, MAX_UNIT + 1):
        run = 0  # consecutive words equal to the word one unit earlier
        for i in range(unit, len(found)):
            run = run + 1 if found[i] == found[i - unit] else 0
            if run >= (MIN_REPEATS - 1) * unit:
                longest = max(longest, run + unit)
    return longest


# ---------------------------------------------------------------- degenerate or not


@dataclass(frozen=True, slots=True)
class FluencyThresholds:
    """Limits beyond which a text is degenerate, fixed on unsteered text only (see `fit_thresholds`).

    perplexity: the most a text may have. repetition: the highest `repetition_rate`. min_words: the fewest
    words. min_alphabetic: the smallest share of letters. quantile, factor, floor and n_texts say how the
    first two were fitted. Any loop (see `loops`) is degenerate too.
    """

    perplexity: float
    repetition: float
    min_words: int = 4
    min_alphabetic: float = 0.6
    quantile: float = 0.95
    factor: float = 3.0
    floor: float = 0.3
    n_texts: int = 0


def fit_thresholds(
    unsteered_texts: Sequence[str],
    perplexities: ArrayLike,
    quantile: float = 0.95,
    factor: float = 3.0,
    floor: float = 0.3,
) -> FluencyThresholds:
    """Thresholds from unsteered texts and their perplexities [n]; some dozens of texts make them stable.

    perplexity = factor x the quantile of the finite perplexities: a steered text may be up to `factor` times
    as odd as the oddest natural ones. repetition = the larger of the quantile of the repetition rates and
    `floor`, so that very varied unsteered text does not condemn ordinary prose. Raises InputError when no
    text has words, no perplexity is finite, or quantile, factor or floor is out of range.
    """
    if not (0 < quantile < 1 and factor >= 1 and 0 <= floor <= 1):
        raise InputError(f"need 0 < quantile < 1, factor >= 1, 0 <= floor <= 1; got {quantile}, {factor}, {floor}")
    scores = _paired_scores(unsteered_texts, perplexities)
    rates = np.array([repetition_rate(text) for text in unsteered_texts])
    scores, rates = scores[np.isfinite(scores)], rates[np.isfinite(rates)]
    if not (len(scores) and len(rates)):
        raise InputError("no unsteered text has words and a finite perplexity; give texts of the unsteered model")
    return FluencyThresholds(
        perplexity=factor * float(np.quantile(scores, quantile)),
        repetition=max(float(np.quantile(rates, quantile)), floor),
        quantile=quantile,
        factor=factor,
        floor=floor,
        n_texts=len(unsteered_texts),
    )


def degenerate(
    texts: Sequence[str], perplexities: ArrayLike, thresholds: FluencyThresholds
) -> tuple[NDArray[np.bool_], list[str]]:
    """Which texts are degenerate, bool [n], and why, n strings: reasons joined by "; ", empty when fine.

    A text is degenerate if it is too short, is not made of letters, loops, repeats itself more or is less
    likely than the thresholds allow, or has no defined perplexity. Raises InputError on unequal lengths.
    """
    scores = _paired_scores(texts, perplexities)
    reasons = ["; ".join(_reasons(text, float(score), thresholds)) for text, score in zip(texts, scores)]
    return np.array([bool(reason) for reason in reasons], dtype=np.bool_), reasons


def _reasons(text: str, score: float, limits: FluencyThresholds) -> Iterator[str]:
    found = length_words(text)
    if found < limits.min_words:
        yield f"{found} words"
    if (share := alphabetic_share(text)) < limits.min_alphabetic:
        yield f"{share:.0%} letters"
    if loops(text):
        yield "loop"
    if (rate := repetition_rate(text)) > limits.repetition:
        yield f"repetition {rate:.2f}"
    if math.isnan(score):
        yield "perplexity undefined"
    elif score > limits.perplexity:
        yield f"perplexity {score:.3g}"


def _paired_scores(texts: Sequence[str], perplexities: ArrayLike) -> Floats:
    scores = np.asarray(perplexities, dtype=np.float64)
    if scores.shape != (len(texts),):
        raise InputError(f"{len(texts)} texts but perplexities of shape {scores.shape}; give one for each text")
    return scores
