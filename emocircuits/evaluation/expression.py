"""Does a text express an emotion, without naming it and without falling apart? Pure numpy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emocircuits.data.emotions import EKMAN6, NEUTRAL
from emocircuits.errors import InputError, unknown

if TYPE_CHECKING:
    from emocircuits.evaluation.judges import Judge

JUDGE_LABELS = (*EKMAN6, NEUTRAL)
"""The forced choice, in the order of every judge's columns."""

EMOTION_FORMS: dict[str, str] = {
    "anger": r"anger(s|ed|ing)?|angr(y|ier|iest|ily|iness)",
    "sadness": r"sad(der|dest|ly|ness|nesses|den|dens|dened|dening|deningly)?",
    "happiness": r"happ(y|ier|iest|ily|iness)",
    "fear": r"fear(s|ed|ing|ful|fully|fulness|some)?",
    "surprise": r"surpris(e|es|ed|ing|ingly|edly)",
    "disgust": r"disgust(s|ed|ing|edly|ingly|ful|fully)?",
    "neutral": r"neutral(s|ly|ity)?",
}
"""Per emotion, a regular expression of its noun and inflections; add an entry to name your own emotion."""

_SUFFIXES = r"(s|es|d|ed|ing|ingly|edly|r|er|st|est|ly|ily|ness|ful|fully|ous|ously)?"
# Unlike \b, these see through Markdown emphasis such as _angry_, where "_" counts as a word character.
_WORD_START, _WORD_END = r"(?<![^\W_])", r"(?![^\W_])"


def names_emotion(text: str, emotion: str) -> bool:
    """True if `text` holds the emotion's noun or an inflection of it, in any case, as a whole word.

    Emotions outside `EMOTION_FORMS` are matched by forms derived from the label. Raises InputError if it is
    empty.
    """
    key = emotion.strip().casefold()
    return _compiled(EMOTION_FORMS.get(key) or _derived_forms(key)).search(text) is not None


@lru_cache(maxsize=256)
def _compiled(forms: str) -> re.Pattern[str]:
    return re.compile(f"{_WORD_START}(?:{forms}){_WORD_END}", re.IGNORECASE)


def _derived_forms(label: str) -> str:
    """Regular English inflections of a label's last word; "self_pity" also finds "self-pitying"."""
    words = re.findall(r"[^\W_]+", label)
    if not words:
        raise InputError(f"emotion label {label!r} holds no word; give it a name such as 'pride'")
    last = words[-1].removesuffix("ness") if len(words[-1]) > 6 else words[-1]
    head = "".join(re.escape(word) + r"[\W_]+" for word in words[:-1])
    if last[-1] in "yi" and len(last) > 2 and last[-2] not in "aeiou":
        tail = rf"{re.escape(last[:-1])}(y(ing|ingly)?|i(es|ed|er|est|ly|ness|ful|fully|ous|ously))"
    elif last.endswith("e"):
        tail = rf"{re.escape(last)}{_SUFFIXES}|{re.escape(last[:-1])}(ing|ingly|ous|ously)"
    else:
        tail = re.escape(last) + _SUFFIXES
    return f"{head}(?:{tail})"


@dataclass(frozen=True, eq=False)
class ExpressionScores:
    """Per-text scores of n texts; every array has shape [n], every rate is a mean over the n texts (NaN if n
    = 0).

    `predicted` is "" and `target_probability` NaN where the judge gave no usable answer; such texts count as
    wrong.
    """

    labels: tuple[str, ...]
    targets: NDArray[np.str_]
    predicted: NDArray[np.str_]
    target_probability: NDArray[np.float64]
    expressed: NDArray[np.bool_]
    named: NDArray[np.bool_]
    degenerate: NDArray[np.bool_]

    @property
    def coherent(self) -> NDArray[np.bool_]:
        """Expressed, without naming the emotion, in text that is not degenerate."""
        return self.expressed & ~self.named & ~self.degenerate

    @property
    def unparseable(self) -> NDArray[np.bool_]:
        """The judge gave no usable answer."""
        return self.predicted == ""

    @property
    def expression_rate(self) -> float:
        return _rate(self.expressed)

    @property
    def coherent_expression_rate(self) -> float:
        return _rate(self.coherent)

    @property
    def named_rate(self) -> float:
        return _rate(self.named)

    @property
    def degenerate_rate(self) -> float:
        return _rate(self.degenerate)

    @property
    def unparseable_rate(self) -> float:
        return _rate(self.unparseable)

    def summary(self) -> dict[str, float]:
        """Every rate by name, with the number of texts, ready for JSON or a table."""
        names = ("coherent_expression", "expression", "named", "degenerate", "unparseable")
        return {"n": len(self.targets), **{f"{name}_rate": getattr(self, f"{name}_rate") for name in names}}

    def confusion(self, rows: Sequence[str] | None = None, *, normalise: bool = False) -> NDArray[np.float64]:
        """Confusion matrix [rows x labels]; see `confusion_matrix`. Rows default to `labels`."""
        rows = self.labels if rows is None else rows
        return confusion_matrix(self.targets, self.predicted, rows, self.labels, normalise=normalise)


def score_expression(
    texts: Sequence[str],
    targets: Sequence[str],
    judge: Judge,
    degenerate: NDArray[np.bool_] | None = None,
) -> ExpressionScores:
    """Score n texts against their n target emotions by the judge's forced choice; the judge never sees the
    targets.

    `degenerate` [n] marks texts that loop or fell apart; an empty text is degenerate anyway. Raises
    InputError where lengths differ, a target is not among the judge's labels, or the judge's answer has the
    wrong shape.
    """
    texts, wanted = list(texts), np.asarray(targets, dtype=np.str_).reshape(-1)
    labels = tuple(judge.labels)
    for target in dict.fromkeys(wanted.tolist()):
        if target not in labels:
            raise unknown("target emotion for this judge", target, labels)
    broken = _degenerate_mask(texts, degenerate)
    if len(wanted) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(wanted)} targets; give one target per text")

    probabilities = _checked(judge, texts)
    answered = np.isfinite(probabilities).all(axis=1)
    choice = np.where(answered, np.nan_to_num(probabilities, nan=-1.0).argmax(axis=1), -1)
    target_index = np.array([labels.index(t) for t in wanted.tolist()], dtype=np.intp)
    predicted = np.array([*labels, ""], dtype=np.str_)[choice]  # index -1 is ""
    target_probability = np.where(answered, probabilities[np.arange(len(texts)), target_index], np.nan)
    return ExpressionScores(
        labels=labels,
        targets=wanted,
        predicted=predicted,
        target_probability=target_probability,
        expressed=choice == target_index,
        named=np.array([names_emotion(t, e) for t, e in zip(texts, wanted.tolist())], dtype=np.bool_),
        degenerate=broken,
    )


def confusion_matrix(
    targets: Sequence[str] | NDArray[np.str_],
    predicted: Sequence[str] | NDArray[np.str_],
    rows: Sequence[str],
    labels: Sequence[str],
    *,
    normalise: bool = False,
) -> NDArray[np.float64]:
    """Counts [rows x labels] of texts by target (row) and predicted label (column).

    `normalise=True` divides by all texts of the row's target, so that a row falls short of 1 by its
    unparseable share; a row without texts is then NaN. Raises InputError where lengths differ or a target or
    prediction is unknown.
    """
    if len(targets) != len(predicted):
        raise InputError(f"{len(targets)} targets but {len(predicted)} predictions; give one of each per text")
    row_of = {name: i for i, name in enumerate(rows)}
    column_of = {name: j for j, name in enumerate(labels)} | {"": len(labels)}
    counts = np.zeros((len(rows), len(labels) + 1))
    for target, answer in zip(map(str, targets), map(str, predicted)):
        if target not in row_of:
            raise unknown("target emotion", target, rows)
        if answer not in column_of:
            raise unknown("predicted label", answer, labels)
        counts[row_of[target], column_of[answer]] += 1
    if normalise:
        totals = counts.sum(axis=1, keepdims=True)
        counts = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    return counts[:, :-1]


def _degenerate_mask(texts: list[str], degenerate: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    empty = np.array([not text.strip() for text in texts], dtype=np.bool_)
    if degenerate is None:
        return empty
    mask = np.asarray(degenerate)
    if mask.shape != empty.shape or (mask.dtype != np.bool_ and mask.size):
        raise InputError(f"degenerate must be {len(texts)} booleans, one per text; got {mask.dtype} {mask.shape}")
    return mask.astype(np.bool_) | empty


def _checked(judge: Judge, texts: list[str]) -> NDArray[np.float64]:
    shape = (len(texts), len(judge.labels))
    if not texts:
        return np.empty(shape)
    probabilities = np.asarray(judge.probabilities(texts), dtype=np.float64)
    if probabilities.shape != shape:
        raise InputError(f"judge {judge.name!r} returned shape {probabilities.shape}, not [texts, labels] = {shape}")
    return probabilities


def _rate(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if flags.size else float("nan")
