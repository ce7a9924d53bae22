"""Clips made from parameters: drawn faces and synthesised voices, by emotion and by person, without any recording.

A person's seed fixes head, features and vocal tract; a clip's seed fixes pose, light, vowels and noise. Everything is a
pure function of (emotion, person, clip seed, knobs), so a set of clips is its list of seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

Floats = NDArray[np.float32]
T = TypeVar("T")

EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
SIDE = 32
"""Pixels of a face, in height and width."""
RATE = 16_000
"""Samples of a voice per second."""


@dataclass(frozen=True)
class Expression:
    """What a face does; lengths in units of half the picture. Positive brow_slope lifts the inner ends."""

    eye_open: float = 0.09
    brow_raise: float = 0.0
    brow_slope: float = 0.0
    mouth_curve: float = 0.0
    mouth_open: float = 0.015
    mouth_width: float = 0.26
    wrinkle: float = 0.0


@dataclass(frozen=True)
class Prosody:
    """What a voice does: pitch in semitones above the speaker's own, level in dB, jitter and shimmer as ratios."""

    pitch: float = 0.0
    span: float = 2.0
    slope: float = -1.0
    syllables: float = 4.0
    level: float = 0.0
    brightness: float = 0.90
    jitter: float = 0.005
    shimmer: float = 0.05
    breath: float = 0.02
    tremor: float = 0.0


EXPRESSIONS = {
    "anger": Expression(0.06, -0.06, -0.45, -0.04, 0.01, 0.24, 0.3),
    "sadness": Expression(0.05, 0.00, 0.40, -0.14, 0.01, 0.22, 0.0),
    "happiness": Expression(0.07, 0.02, 0.00, 0.16, 0.04, 0.34, 0.0),
    "fear": Expression(0.15, 0.07, 0.35, -0.04, 0.06, 0.34, 0.0),
    "surprise": Expression(0.16, 0.12, 0.00, 0.00, 0.15, 0.15, 0.0),
    "disgust": Expression(0.04, -0.04, -0.10, -0.08, 0.03, 0.22, 1.0),
}
PROSODIES = {
    "anger": Prosody(3, 3, -2, 5.5, 8, 0.55, 0.02, 0.25, 0.02, 0.0),
    "sadness": Prosody(-3, 1, -4, 2.6, -8, 0.96, 0.01, 0.08, 0.08, 0.0),
    "happiness": Prosody(5, 6, 0, 5.0, 3, 0.80, 0.004, 0.04, 0.01, 0.0),
    "fear": Prosody(9, 1.5, 2, 6.5, -3, 0.85, 0.03, 0.15, 0.15, 1.2),
    "surprise": Prosody(4, 2, 12, 3.2, 2, 0.85, 0.004, 0.04, 0.03, 0.0),
    "disgust": Prosody(-4, 2, -6, 3.0, 0, 0.75, 0.06, 0.35, 0.05, 0.0),
}


@dataclass(frozen=True)
class Knobs:
    """How clearly clips show their emotion, and how noisy they are.

    strength: 1 shows an emotion in full, 0 leaves the face or voice neutral (no cue). variation: spread of each
    parameter around its emotion, as a share of the spread between emotions. noise: of pixels and of samples, relative
    to the signal. seconds: shortest and longest voice.
    """

    strength: float = 1.0
    variation: float = 0.25
    noise: float = 0.05
    seconds: tuple[float, float] = (0.6, 1.0)


def face(emotion: str, person: int, seed: int, knobs: Knobs = Knobs()) -> NDArray[np.uint8]:  # noqa: B008
    """RGB picture [SIDE, SIDE, 3] of a person who shows an emotion."""
    rng = np.random.default_rng([1, seed, person, EMOTIONS.index(emotion)])
    shown = expressed(EXPRESSIONS, Expression(), emotion, knobs, rng)
    looks = _looks(person)
    x, y = _pose(rng)
    light = rng.uniform(0.75, 1.1) * (1 + rng.uniform(-0.25, 0.25) * x + rng.uniform(-0.25, 0.25) * y)
    picture = _draw(x, y, shown, looks) * light[..., None]
    picture += rng.normal(0, knobs.noise, picture.shape)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def voice(emotion: str, person: int, seed: int, knobs: Knobs = Knobs()) -> Floats:  # noqa: B008
    """Waveform [samples] at RATE, within -1 and 1, of a person who speaks with an emotion."""
    rng = np.random.default_rng([2, seed, person, EMOTIONS.index(emotion)])
    shown = expressed(PROSODIES, Prosody(), emotion, knobs, rng)
    n = int(rng.uniform(*knobs.seconds) * RATE)
    pitch, level, vowels = _contours(n, shown, person, rng)
    source = _source(pitch, shown, rng)
    sound = np.concatenate([_vowel(source[a:b], person, v, shown.brightness) for a, b, v in vowels])
    sound = sound / (np.sqrt(np.mean(sound**2)) + 1e-9) * level * 0.05 * 10 ** (shown.level / 20)
    sound += rng.normal(0, knobs.noise * 0.05, n)
    return np.clip(sound, -1, 1).astype(np.float32)


def expressed(table: Mapping[str, T], neutral: T, emotion: str, knobs: Knobs, rng: np.random.Generator) -> T:
    """Parameters of one clip: from neutral towards the emotion by `strength`, with a spread around it."""
    made = {}
    for field in fields(cast(Any, neutral)):
        rest, full = getattr(neutral, field.name), getattr(table[emotion], field.name)
        spread = knobs.variation * float(np.std([getattr(e, field.name) for e in table.values()]))
        made[field.name] = rest + knobs.strength * (full - rest) + rng.normal(0, spread)
    return type(neutral)(**made)


# ------------------------------------------------------------------------------------------------------- faces


def _looks(person: int) -> dict[str, float]:
    """A person's head and features; brow_rest and mouth_rest are what the face does at rest."""
    rng = np.random.default_rng([3, person])
    ranges = {
        "width": (0.55, 0.75), "height": (0.72, 0.88), "eyes": (0.24, 0.33), "eye_y": (-0.20, -0.08),
        "eye_width": (0.09, 0.14), "brow_y": (-0.24, -0.18), "brow_thick": (0.025, 0.05), "mouth_y": (0.36, 0.48),
        "mouth_size": (0.85, 1.15), "brow_rest": (-0.06, 0.06), "mouth_rest": (-0.02, 0.02), "nose": (0.12, 0.22),
        "skin": (0.55, 0.9), "tint": (0.75, 0.95), "hair": (0.05, 0.35), "back": (0.1, 0.9),
    }  # fmt: skip
    return {name: float(rng.uniform(*r)) for name, r in ranges.items()}


def _pose(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [SIDE, SIDE] of each pixel in the frame of a shifted, turned and scaled head; y points down."""
    steps = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x, y = np.meshgrid(steps - rng.uniform(-0.1, 0.1), steps - rng.uniform(-0.1, 0.1))
    angle, scale = rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.12)
    return (x * np.cos(angle) + y * np.sin(angle)) / scale, (y * np.cos(angle) - x * np.sin(angle)) / scale


def _soft(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coverage of a shape from signed distance (negative inside), with edges one pixel wide."""
    return np.clip(0.5 - distance * SIDE / 2, 0, 1)


def _ellipse(x: NDArray, y: NDArray, width: float, height: float) -> NDArray[np.float64]:
    radius = np.sqrt((x / width) ** 2 + (y / height) ** 2)
    return _soft((radius - 1) * min(width, height))


def _draw(x: NDArray, y: NDArray, shown: Expression, looks: dict[str, float]) -> NDArray[np.float64]:
    """Picture [SIDE, SIDE, 3] of the head in even light."""
    skin = looks["skin"] * np.array([1.0, looks["tint"], looks["tint"] ** 2])
    picture = np.full((*x.shape, 3), looks["back"])

    def paint(coverage: NDArray, colour: NDArray | float) -> None:
        picture[:] = picture + coverage[..., None] * (np.asarray(colour) - picture)

    paint(_ellipse(x, y + 0.12, looks["width"] * 1.1, looks["height"]), looks["hair"])
    paint(_ellipse(x, y - 0.05, looks["width"], looks["height"] * 0.92), skin)
    side = np.abs(x) - looks["eyes"]
    eye_y = y - looks["eye_y"]
    opening = max(shown.eye_open, 0.01)
    paint(_ellipse(side, eye_y, looks["eye_width"], opening), 0.98)
    paint(_ellipse(side, eye_y, 0.05, min(0.06, opening)), 0.05)
    tilt = shown.brow_slope + looks["brow_rest"]
    brow = eye_y - looks["brow_y"] + shown.brow_raise - tilt * side
    paint(_soft(np.abs(brow) - looks["brow_thick"]) * _soft(np.abs(side) - 0.15), looks["hair"] * 0.6)
    paint(_soft(np.abs(x) - 0.03) * _soft(np.abs(y - 0.1) - looks["nose"]), skin * 0.75)
    folds = np.abs(np.abs(x) - 0.12 - 0.4 * (y - 0.12)) - 0.025  # lines beside a wrinkled nose
    paint(np.clip(shown.wrinkle, 0, 1) * _soft(folds) * _soft(np.abs(y - 0.12) - 0.12), skin * 0.4)
    width = max(shown.mouth_width * looks["mouth_size"], 0.05)
    curve = (shown.mouth_curve + looks["mouth_rest"]) * (1 - 2 * (x / width) ** 2)
    mouth = y - looks["mouth_y"] - curve
    paint(_ellipse(x, mouth, width, max(shown.mouth_open, 0.0) + 0.035), np.array([0.45, 0.1, 0.1]))
    return picture


# ------------------------------------------------------------------------------------------------------ voices

_VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (300, 870, 2240), (570, 840, 2410), (400, 2000, 2550))
_WIDTHS = (80.0, 100.0, 140.0)


def _tract(person: int) -> tuple[float, float, float]:
    """A speaker's own pitch (Hz), formant scale and speaking rate relative to others."""
    rng = np.random.default_rng([4, person])
    size = rng.uniform(0, 1)  # small speakers are high in both pitch and formants
    return 100 * 2 ** (1.1 * size + rng.normal(0, 0.08)), 0.88 + 0.26 * size, rng.uniform(0.9, 1.1)


def _contours(
    n: int, shown: Prosody, person: int, rng: np.random.Generator
) -> tuple[NDArray, NDArray, list[tuple[int, int, int]]]:
    """Pitch [n] in Hz, amplitude [n] in 0..1, and (start, stop, vowel) of each syllable."""
    own, _, rate = _tract(person)
    t = np.arange(n) / RATE
    beat = t * max(shown.syllables, 1.5) * rate + rng.uniform(0, 0.3)
    place = beat - np.floor(beat)
    semitones = shown.pitch + shown.slope * (t / t[-1] - 0.5) + shown.span * np.sin(2 * np.pi * (0.5 * beat))
    semitones += max(shown.tremor, 0) * np.sin(2 * np.pi * 9 * t)
    pitch = own * 2 ** (semitones / 12)
    level = 0.12 + 0.88 * np.sin(np.pi * place) ** 0.7
    edges = [0, *(np.flatnonzero(np.diff(np.floor(beat))) + 1).tolist(), n]
    return pitch, level, [(a, b, int(rng.integers(len(_VOWELS)))) for a, b in zip(edges, edges[1:])]


def _source(pitch: NDArray, shown: Prosody, rng: np.random.Generator) -> NDArray[np.float64]:
    """Glottal source [n]: a sawtooth with jitter in period and shimmer in level, and breath noise."""
    n = len(pitch)
    knots = np.linspace(0, n - 1, max(2, n // 160))  # 100 changes a second
    wobble = np.interp(np.arange(n), knots, rng.normal(0, 1, len(knots)))
    loud = np.interp(np.arange(n), knots, rng.normal(0, 1, len(knots)))
    phase = np.cumsum(pitch * (1 + max(shown.jitter, 0) * wobble)) / RATE
    saw = 2 * (phase - np.floor(phase)) - 1
    return saw * (1 + max(shown.shimmer, 0) * loud) + max(shown.breath, 0) * 3 * rng.normal(0, 1, n)


def _vowel(source: NDArray, person: int, vowel: int, brightness: float) -> NDArray[np.float64]:
    """The source through spectral tilt (a one-pole low pass; 0 is bright) and the formants of a vowel."""
    pole = float(np.clip(brightness, 0, 0.98))
    sound = np.asarray(lfilter([1 - pole], [1, -pole], source))
    for centre, width in zip(_VOWELS[vowel], _WIDTHS):
        r, angle = np.exp(-np.pi * width / RATE), 2 * np.pi * centre * _tract(person)[1] / RATE
        resonance = np.asarray(lfilter([1 - r], [1, -2 * r * np.cos(angle), r * r], source if width == 80 else sound))
        sound = sound + resonance
    return sound
