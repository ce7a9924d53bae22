"""Sets of prompts: batches to train on, and held-out sets in which one, both or conflicting modalities speak.

Reliability is a property of training: in an audio-visual clip each modality shows the clip's emotion with its own
probability, and otherwise another one at random. The model's trust, and so its bias on conflict, follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from clips import EMOTIONS, Knobs, face, voice
from model import Item, pictures, sounds
from numpy.typing import NDArray

TRAINING, VALIDATION, HELD_OUT = 0, 10_000, 20_000
"""First person of each split; persons are never shared between splits."""
KINDS = ("audio", "image", "consistent", "conflict")
_CHUNK = 256
Whole = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Recipe:
    """What the model is trained on.

    reliable: probability that the voice, and the face, of an audio-visual clip shows the clip's emotion. alone: share
    of batches' rows with audio alone, and with an image alone. named: share of audio-visual rows whose question names
    a modality (voice and face are then independent).
    """

    voices: Knobs = Knobs()
    faces: Knobs = Knobs()
    reliable: tuple[float, float] = (0.95, 0.75)
    alone: tuple[float, float] = (0.15, 0.35)
    named: float = 0.4
    clips: int = 7200
    persons: int = 1200

    def expected_gap(self) -> float:
        """Preference gap of the posterior given two clear and different cues: what ideal training would reach."""
        (a, v), others = self.reliable, len(EMOTIONS) - 1
        voice_right, face_right = a * (1 - v) / others, v * (1 - a) / others
        neither = (others - 1) * (1 - a) * (1 - v) / others**2
        return (voice_right - face_right) / (voice_right + face_right + neither)


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts with what each modality shows (numbers in EMOTIONS, -1 when absent) and whose clip it is."""

    items: list[Item]
    heard: Whole
    seen: Whole
    persons: Whole


def media(kind: Any, emotions: Whole, persons: Whole, seeds: Whole, knobs: Knobs) -> list[Any]:
    """Features of faces (kind `face`) or voices (kind `voice`), in chunks so that memory stays flat."""
    made = []
    for start in range(0, len(emotions), _CHUNK):
        chosen = slice(start, start + _CHUNK)
        raw = [kind(EMOTIONS[e], p, s, knobs) for e, p, s in zip(emotions[chosen], persons[chosen], seeds[chosen])]
        made += sounds(raw) if kind is voice else pictures(raw)
    return made


class Pool:
    """Training clips by emotion, made once; rows of a batch draw from them."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.rng = recipe, np.random.default_rng([5, seed])
        emotions = np.arange(recipe.clips) % len(EMOTIONS)
        persons = TRAINING + self.rng.integers(recipe.persons, size=recipe.clips)
        seeds = self.rng.integers(2**31, size=recipe.clips)
        self.emotions = emotions
        self.sounds = media(voice, emotions, persons, seeds, recipe.voices)
        self.pictures = media(face, emotions, persons, seeds, recipe.faces)

    def batch(self, size: int) -> tuple[list[Item], list[str]]:
        """Prompts and their one-word answers."""
        rows = [self._row() for _ in range(size)]
        return [item for item, _ in rows], [EMOTIONS[answer] for _, answer in rows]

    def _row(self) -> tuple[Item, int]:
        rng, recipe = self.rng, self.recipe
        truth, kind, audio_first = int(rng.integers(len(EMOTIONS))), rng.random(), bool(rng.integers(2))
        if kind < recipe.alone[0]:
            return Item(str(rng.choice(["person", "voice"])), sound=self._of(self.sounds, truth)), truth
        if kind < sum(recipe.alone):
            return Item(str(rng.choice(["person", "face"])), picture=self._of(self.pictures, truth)), truth
        if rng.random() < recipe.named:
            heard, seen = (int(n) for n in rng.integers(len(EMOTIONS), size=2))
            question, truth = ("voice", heard) if rng.random() < 0.5 else ("face", seen)
        else:
            question = "person"
            heard, seen = (truth if rng.random() < p else self._other(truth) for p in recipe.reliable)
        return Item(question, self._of(self.sounds, heard), self._of(self.pictures, seen), audio_first), truth

    def _of(self, features: list[Any], emotion: int) -> Any:
        members = len(features) // len(EMOTIONS)  # clip i shows emotion i % 6
        return features[emotion + len(EMOTIONS) * int(self.rng.integers(members))]

    def _other(self, emotion: int) -> int:
        return int((emotion + self.rng.integers(1, len(EMOTIONS))) % len(EMOTIONS))


def evaluation_sets(
    first: int, persons: int, seed: int, recipe: Recipe, kinds: Sequence[str] = KINDS, question: str = "person"
) -> dict[str, EvaluationSet]:
    """{kind: set} of `persons` people counted from `first`, each with six prompts of a kind, one for each emotion.

    Conflict: voice and face of one person show different emotions; the question names no modality. Which modality
    comes first alternates.
    """
    return {kind: _evaluation_set(kind, first, persons, seed, recipe, question) for kind in kinds}


def _drawn(kind: str, persons: int, seed: int) -> tuple[Whole, Whole, Whole]:
    """What is heard and seen in each prompt of a set [6 persons], and the seeds of its clips."""
    n = persons * len(EMOTIONS)
    rng = np.random.default_rng([6, seed, KINDS.index(kind)])
    heard = np.arange(n) % len(EMOTIONS)
    seen = (heard + rng.integers(1, len(EMOTIONS), size=n)) % len(EMOTIONS) if kind == "conflict" else heard
    return heard, seen, rng.integers(2**31, size=n)


def clip_seeds(kind: str, persons: int, seed: int) -> Whole:
    """The seeds of the clips of an evaluation set, with which `face` and `voice` make them again."""
    return _drawn(kind, persons, seed)[2]


def _evaluation_set(kind: str, first: int, persons: int, seed: int, recipe: Recipe, question: str) -> EvaluationSet:
    heard, seen, seeds = _drawn(kind, persons, seed)
    n = len(heard)
    people = first + np.arange(n) // len(EMOTIONS)
    absent: list[Any] = [None] * n
    voices = absent if kind == "image" else media(voice, heard, people, seeds, recipe.voices)
    faces = absent if kind == "audio" else media(face, seen, people, seeds, recipe.faces)
    firsts = (np.arange(n) + people) % 2 == 0
    items = [Item(question, v, f, bool(a)) for v, f, a in zip(voices, faces, firsts)]
    none = np.full(n, -1)
    return EvaluationSet(items, none if kind == "image" else heard, none if kind == "audio" else seen, people)


def knob_sweep(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(name, recipe) of conflict clips made with one knob changed: length of the voice, clarity of either cue."""
    for seconds in (0.4, 0.6, 0.8, 1.0):
        yield f"voice of {seconds} s", replace(recipe, voices=replace(recipe.voices, seconds=(seconds, seconds)))
    for strength in (0.25, 0.5, 0.75):
        yield f"voice at {strength} strength", replace(recipe, voices=replace(recipe.voices, strength=strength))
        yield f"face at {strength} strength", replace(recipe, faces=replace(recipe.faces, strength=strength))
