"""Our own emotional-reasoning problems: a short situation, and what does one person in it mainly feel?

Each theme holds one problem per emotion, so that neither theme nor emotion gives the other away. In about a third
of them a surface cue (a smile, a funeral, a great height) points to a wrong emotion, the `trap`. The hand-written
solutions follow appraisal theory (Smith & Ellsworth 1985; Scherer 2001): every sentence carries its appraisal as a
label, and none before the last names the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown
from .emotions import EKMAN6
from .loaders import read_rows

SPLITS = ("test", "shot")
ANSWER_STEM = "\nAnswer:"
ANSWER_TEXTS = tuple(f" {emotion}" for emotion in EKMAN6)
"""What follows `ANSWER_STEM`, one text per emotion of `EKMAN6`: score their likelihoods to read an answer."""


@dataclass(frozen=True)
class Problem:
    """One situation with its answer, one of `EKMAN6`, and a solution in sentences.

    cause: why the person feels so. alternatives: what a careless reader would answer, likeliest first. trap: the
    emotion that a surface cue suggests, None where there is no such cue. labels: the appraisal of each sentence.
    Raises InputError for a field that is empty, of the wrong kind, or does not fit the others.
    """

    id: str
    split: str
    theme: str
    situation: str
    person: str
    answer: str
    cause: str
    alternatives: tuple[str, ...]
    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    trap: str | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise InputError(f"problem {self.id!r}: {problem}")

    @property
    def solution(self) -> str:
        """The whole chain of thought; its last sentence names the answer."""
        return " ".join(self.sentences)

    def without(self, *labels: str) -> str:
        """The chain of thought without its sentences of these labels, such as "conclusion" or "alternative"."""
        return " ".join(text for text, label in zip(self.sentences, self.labels) if label not in labels)

    @property
    def question(self) -> str:
        """The question, with the labels to choose from."""
        return f"What does {self.person} mainly feel? ({', '.join(EKMAN6)})"

    def _problem(self) -> str:
        """What is wrong with this problem, or an empty string."""
        for name in ("id", "theme", "situation", "person", "cause"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                return f"{name} must be a text, not {value!r}"
        for name in ("alternatives", "sentences", "labels"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(isinstance(v, str) and v.strip() for v in values):
                return f"{name} must be a list of texts, not {values!r}"
        if self.split not in SPLITS:
            return f"split is {self.split!r}; choose from {', '.join(SPLITS)}"
        for emotion in (self.answer, *self.alternatives, *([self.trap] if self.trap is not None else [])):
            if emotion not in EKMAN6:
                return f"{emotion!r} is not an emotion; choose from {', '.join(EKMAN6)}"
        if self.answer in self.alternatives:
            return f"the answer {self.answer} is among its alternatives"
        if self.trap is not None and self.trap not in self.alternatives:
            return f"the trap {self.trap} must be among the alternatives"
        if self.person not in self.situation:
            return f"the situation does not mention {self.person}"
        if len(self.labels) != len(self.sentences):
            return f"{len(self.sentences)} sentences but {len(self.labels)} labels; give one for each"
        return ""


def load_problems(split: str | None = "test", path: str | Path | None = None) -> tuple[Problem, ...]:
    """The problems of a split ("test": 72; "shot": 6 worked examples; None: all), of the packaged file or your own.

    Your file holds JSON lines with the fields of `Problem`. Raises InputError that names the first unusable row.
    """
    if split not in (*SPLITS, None):
        raise unknown("split", split, SPLITS)
    problems = _packaged() if path is None else _read(Path(path).expanduser())
    return tuple(problem for problem in problems if split in (problem.split, None))


@cache
def _packaged() -> tuple[Problem, ...]:
    return _read(Path(__file__).with_name("problems.jsonl"))


def _read(file: Path) -> tuple[Problem, ...]:
    problems = tuple(_parse(row, f"{file}, line {line}") for line, row in read_rows(file))
    ids = [problem.id for problem in problems]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise InputError(f"{file}: the problem id {twice!r} is there twice; ids are unique")
    return problems


def few_shot_prompt(problem: Problem, shots: Iterable[Problem], seed: int = 0, *, reasoning: bool = True) -> str:
    """A plain-text prompt for a base model: worked shots in an order drawn by `seed`, then the problem.

    It ends in "Reasoning:", to be continued by " " + a chain of thought and `ANSWER_STEM`. Without `reasoning` the
    shots give their answers at once and the prompt ends in the question, to be continued by `ANSWER_STEM` alone.
    Raises InputError when the problem is among its own shots.
    """
    shots = list(shots)
    if problem.id in {shot.id for shot in shots}:
        raise InputError(f"problem {problem.id!r} is among its own shots; leave it out of them")
    random.Random(seed).shuffle(shots)
    told = [_asked(shot) + (f"\nReasoning: {shot.solution}" if reasoning else "") for shot in shots]
    ended = [f"{text}{ANSWER_STEM} {shot.answer}\n\n" for text, shot in zip(told, shots)]
    return "".join(ended) + _asked(problem) + ("\nReasoning:" if reasoning else "")


def _asked(problem: Problem) -> str:
    return f"Situation: {problem.situation}\nQuestion: {problem.question}"


def _parse(row: dict[str, Any], where: str) -> Problem:
    """A row of a problem file; InputError names the keys that are missing or not known."""
    known = {f.name for f in fields(Problem)}
    needed = {f.name for f in fields(Problem) if f.default is MISSING}
    if missing := sorted(needed - row.keys()):
        raise InputError(f"{where}: {', '.join(missing)} missing; a problem needs them")
    if extra := sorted(row.keys() - known):
        raise InputError(f"{where}: {unknown('field', extra[0], sorted(known))}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    try:
        return Problem(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
