"""Emotion label sets, and the hierarchy that lets labels of one set be scored in another.

Three tiers: the fine labels of GoEmotions (Demszky et al., 2020), the basic emotions of Plutchik (1980) and
of Ekman (1992), and the quadrants of the valence-arousal plane (Russell, 1980). Ekman parents follow the
grouping published with GoEmotions; Plutchik parents and all coordinates are our own approximate placement.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emocircuits.errors import InputError, unknown

EKMAN6 = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
PLUTCHIK8 = ("joy", "trust", "fear", "surprise", "sadness", "disgust", "anger", "anticipation")
QUADRANTS = ("positive_high", "negative_high", "negative_low", "positive_low")
VALENCE2 = ("positive", "negative")
NEUTRAL = "neutral"


class Emotion(NamedTuple):
    """Where an emotion stands: its basic parents (None if it has none), valence and arousal in [-1, 1]."""

    plutchik: str | None
    ekman: str | None
    valence: float
    arousal: float


_FINE = {
    "admiration": Emotion("trust", "happiness", 0.6, 0.2),
    "amusement": Emotion("joy", "happiness", 0.7, 0.4),
    "anger": Emotion("anger", "anger", -0.7, 0.7),
    "annoyance": Emotion("anger", "anger", -0.5, 0.4),
    "approval": Emotion("trust", "happiness", 0.5, -0.1),
    "caring": Emotion("trust", "happiness", 0.6, -0.2),
    "confusion": Emotion("surprise", "surprise", -0.2, 0.3),
    "curiosity": Emotion("anticipation", "surprise", 0.3, 0.4),
    "desire": Emotion("anticipation", "happiness", 0.5, 0.5),
    "disappointment": Emotion("sadness", "sadness", -0.6, -0.2),
    "disapproval": Emotion("anger", "anger", -0.5, 0.2),
    "disgust": Emotion("disgust", "disgust", -0.7, 0.3),
    "embarrassment": Emotion("sadness", "sadness", -0.5, 0.3),
    "excitement": Emotion("joy", "happiness", 0.7, 0.8),
    "fear": Emotion("fear", "fear", -0.7, 0.7),
    "gratitude": Emotion("joy", "happiness", 0.7, -0.1),
    "grief": Emotion("sadness", "sadness", -0.8, -0.2),
    "joy": Emotion("joy", "happiness", 0.8, 0.5),
    "love": Emotion("joy", "happiness", 0.8, 0.3),
    "nervousness": Emotion("fear", "fear", -0.4, 0.6),
    "optimism": Emotion("anticipation", "happiness", 0.6, 0.2),
    "pride": Emotion("joy", "happiness", 0.7, 0.3),
    "realization": Emotion("surprise", "surprise", 0.1, 0.2),
    "relief": Emotion("joy", "happiness", 0.5, -0.5),
    "remorse": Emotion("sadness", "sadness", -0.6, -0.1),
    "sadness": Emotion("sadness", "sadness", -0.7, -0.5),
    "surprise": Emotion("surprise", "surprise", 0.2, 0.7),
}
_BASIC = {
    "trust": Emotion("trust", None, 0.5, -0.2),
    "anticipation": Emotion("anticipation", None, 0.3, 0.4),
}
# The vocabulary of the hierarchy; "happiness" and other synonyms are looked up through `canonical`.
_EMOTIONS = _FINE | _BASIC

GOEMOTIONS27 = tuple(_FINE)

_SETS = {
    "ekman6": EKMAN6,
    "plutchik8": PLUTCHIK8,
    "goemotions27": GOEMOTIONS27,
    "quadrants": QUADRANTS,
    "valence2": VALENCE2,
}

_SYNONYMS = {
    "joy": ("happiness", "happy", "happily", "joyful", "joyous", "glad"),
    "sadness": ("sad", "sadly", "unhappy", "unhappiness", "sorrow", "sorrowful"),
    "anger": ("angry", "angered", "angrily", "mad", "rage", "fury", "furious"),
    "fear": ("afraid", "fearful", "scared", "frightened", "terror", "terrified"),
    "surprise": ("surprised", "astonishment", "astonished", "amazement", "amazed"),
    "disgust": ("disgusted", "revulsion", "revolted"),
    "trust": ("trusting", "acceptance"),
    "anticipation": ("anticipating", "expectation", "expectant"),
    "admiration": ("admiring",),
    "amusement": ("amused",),
    "annoyance": ("annoyed", "irritation", "irritated", "frustration", "frustrated"),
    "approval": ("approving",),
    "caring": ("compassion", "compassionate"),
    "confusion": ("confused",),
    "curiosity": ("curious", "interest", "interested"),
    "desire": ("longing",),
    "disappointment": ("disappointed",),
    "disapproval": ("disapproving",),
    "embarrassment": ("embarrassed", "shame", "ashamed"),
    "excitement": ("excited",),
    "gratitude": ("grateful", "thankful"),
    "grief": ("grieving",),
    "love": ("loving", "affection"),
    "nervousness": ("nervous", "anxiety", "anxious", "worry", "worried"),
    "optimism": ("optimistic", "hope", "hopeful"),
    "pride": ("proud",),
    "realization": ("realisation",),
    "relief": ("relieved",),
    "remorse": ("remorseful", "guilt", "guilty", "regret"),
    NEUTRAL: ("none", "no emotion"),
}
_CANONICAL = {word: concept for concept, words in _SYNONYMS.items() for word in words}

VALENCE_AROUSAL: dict[str, tuple[float, float]] = {
    **{name: (emotion.valence, emotion.arousal) for name, emotion in _EMOTIONS.items()},
    "happiness": (_FINE["joy"].valence, _FINE["joy"].arousal),
    "positive_high": (0.5, 0.5),
    "negative_high": (-0.5, 0.5),
    "negative_low": (-0.5, -0.5),
    "positive_low": (0.5, -0.5),
    "positive": (0.5, 0.0),
    "negative": (-0.5, 0.0),
    NEUTRAL: (0.0, 0.0),
}
"""(valence, arousal) of every label of every set, each in [-1, 1]: unpleasant to pleasant, calm to excited.

The values are our own approximate placement on the circumplex, good for quadrants and for plots. They were
not measured on people; use published norms where the distance between two labels matters.
"""


def canonical(label: str) -> str:
    """The name the hierarchy knows a label by: "Sad" gives "sadness", "happiness" gives "joy".

    A word the hierarchy does not know comes back in lower case.
    """
    word = _fold(label)
    return _CANONICAL.get(word, word)


def label_set(name_or_list: str | Sequence[str]) -> tuple[str, ...]:
    """Labels of a named set ("ekman6", "goemotions27+neutral", ...), or your own list, checked.

    "+neutral" after any name adds that label. Raises InputError for an unknown name, an empty list, a label
    that is not text, or a label given twice.
    """
    if isinstance(name_or_list, str):
        name, plus, extra = name_or_list.strip().lower().partition("+")
        if name not in _SETS or (plus and extra != NEUTRAL):
            raise unknown("emotion set", name_or_list, [*_SETS, *(f"{s}+{NEUTRAL}" for s in _SETS)])
        return (*_SETS[name], NEUTRAL) if plus else _SETS[name]
    labels = tuple(name_or_list)
    if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise InputError(f"an emotion set must be a list of names, got {name_or_list!r}")
    folded = [_fold(label) for label in labels]
    if twice := sorted({label for label in folded if folded.count(label) > 1}):
        raise InputError(f"an emotion set must name each emotion once, got {', '.join(twice)} more than once")
    return labels


def quadrant(label: str) -> str:
    """The valence-arousal quadrant of a label, from its own coordinates.

    Raises InputError for a label without a quadrant (an unknown one, or "neutral").
    """
    name = canonical(label)
    if name in QUADRANTS:
        return name
    if name not in _EMOTIONS:
        raise unknown("emotion", label, _EMOTIONS)
    valence, arousal = VALENCE_AROUSAL[name]
    return f"{'positive' if valence > 0 else 'negative'}_{'high' if arousal > 0 else 'low'}"


def map_labels(
    source: str | Sequence[str], target: str | Sequence[str], parents: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The label of `target` that each label of `source` counts as.

    In this order: the same word, a synonym, the basic emotion it belongs to, its quadrant, its valence; what
    has no counterpart (say "trust" among Ekman's six) counts as "neutral" if the target has it. `parents`
    places your own words, for example {"boredom": "sadness"}. Raises InputError for words the hierarchy does
    not know and for labels without a counterpart.
    """
    mapping, lost = _map(label_set(source), label_set(target), parents or {})
    if lost:
        raise _no_counterpart(lost, label_set(target))
    return mapping


def map_probabilities(
    probs: ArrayLike,
    source: str | Sequence[str],
    target: str | Sequence[str],
    parents: Mapping[str, str] | None = None,
) -> NDArray[np.float64]:
    """Probabilities over `source` [n, len(source)] summed to `target` [n, len(target)]; rows keep their mass.

    Labels map as in `map_labels`. A row that holds NaN becomes NaN. Raises InputError for a shape that does
    not fit, negative numbers, or mass on labels without a counterpart.
    """
    sources, targets = label_set(source), label_set(target)
    p = np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != len(sources):
        raise InputError(f"probabilities must have shape [n, {len(sources)}], got {list(p.shape)}")
    if bool((p < 0).any()):
        raise InputError("probabilities must not be negative; pass probabilities, not logits")
    mapping, lost = _map(sources, targets, parents or {})
    if carrying := [label for label in lost if bool((p[:, sources.index(label)] != 0).any())]:
        raise _no_counterpart(carrying, targets)
    assign = np.zeros((len(sources), len(targets)))
    for row, label in enumerate(sources):
        if label in mapping:
            assign[row, targets.index(mapping[label])] = 1.0
    out = np.nan_to_num(p) @ assign
    out[np.isnan(p).any(axis=1)] = math.nan
    return out


def _map(
    source: tuple[str, ...], target: tuple[str, ...], parents: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Every source label with its target label, and the source labels that have none."""
    # The words themselves come last and so win; reversed, so that of two synonyms the first one stands.
    known = {canonical(label): label for label in reversed(target)} | {_fold(label): label for label in target}
    placed = {_fold(word): parent for word, parent in parents.items()}
    mapping: dict[str, str] = {}
    lost: list[str] = []
    for label in source:
        word = _fold(label)
        names = [word] if word in known else _ancestors(label, placed.get(word, label), known)
        found = next((known[name] for name in names if name in known), known.get(NEUTRAL))
        if found is None:
            lost.append(label)
        else:
            mapping[label] = found
    return mapping, lost


def _ancestors(label: str, place: str, known: Container[str]) -> Iterator[str]:
    """The concepts at and above `place`, nearest first. Raises InputError if the hierarchy lacks it."""
    name = canonical(place)
    yield name
    if name in _EMOTIONS:
        emotion = _EMOTIONS[name]
        yield from (canonical(parent) for parent in (emotion.plutchik, emotion.ekman) if parent)
        yield quadrant(name)
        yield "positive" if emotion.valence > 0 else "negative"
    elif name in QUADRANTS:
        yield name.partition("_")[0]
    elif name not in known and name not in (*VALENCE2, NEUTRAL):
        raise unknown("emotion", label, [*_EMOTIONS, *QUADRANTS, *VALENCE2, NEUTRAL])


def _no_counterpart(lost: Sequence[str], target: Sequence[str]) -> InputError:
    return InputError(
        f"{', '.join(lost)} have no counterpart among {', '.join(target)}; add 'neutral' to the target, "
        "or place them with parents={...}"
    )


def _fold(label: str) -> str:
    return label.strip().lower()
