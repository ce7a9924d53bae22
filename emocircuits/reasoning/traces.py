"""A reasoning trace cut into steps, and what was sampled from its prefixes: the types every part of this room shares.

Boundary k stands before step k, and boundary n after the last one. Rollouts sampled at boundary k know steps 0..k-1,
so step i is "not fixed" in the rollouts at i and "fixed" in those at i + 1 (Thought Anchors, arXiv 2506.19143).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from ..errors import InputError

FINISHES = ("answer", "stop", "length", "error")


@dataclass(frozen=True)
class Steps:
    """A text cut into n steps that tile it: step i is text[bounds[i] : bounds[i + 1]], white space included."""

    text: str
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or self.bounds[-1] != len(self.text):
            raise InputError(f"step bounds must run from 0 to the text's length {len(self.text)}, not {self.bounds}")
        if any(a >= b for a, b in zip(self.bounds, self.bounds[1:])):
            raise InputError("step bounds must rise: an empty step has no text to measure")

    @classmethod
    def of(cls, pieces: Iterable[str]) -> Steps:
        """Steps that are the pieces, one after the other."""
        given = list(pieces)
        return cls("".join(given), tuple(accumulate(map(len, given), initial=0)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The steps without the white space around them."""
        return tuple(self.text[a:b].strip() for a, b in zip(self.bounds, self.bounds[1:]))

    def token_bounds(self, offsets: Sequence[tuple[int, int]], start: int = 0) -> tuple[int, ...]:
        """Token positions where the steps begin and the last one ends, n + 1 numbers that tile its tokens.

        offsets: character spans of the tokens of (whatever comes before, `start` characters) + text; special tokens
        have empty spans. A token belongs to the step of its last character, so a step may be left with no token of
        its own when the tokeniser merges across its end.
        """
        ends = list(accumulate((max(0, end - start) for _, end in offsets), max))  # characters seen after each token
        return tuple(bisect_right(ends, bound) for bound in self.bounds)


@dataclass(frozen=True)
class Trace:
    """A prompt, the model's reasoning in steps, and what followed it.

    prompt: exactly what the model saw before the reasoning. ending: what came after it (closing tag, answer).
    answer: the final answer as extracted, None when there was none. truth: the right one, if known.
    """

    prompt: str
    steps: Steps
    ending: str = ""
    answer: str | None = None
    truth: str | None = None
    labels: tuple[str | None, ...] | None = None  # a category per step
    depends_on: tuple[tuple[int, ...], ...] | None = None  # earlier steps that each step builds on
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("labels", "depends_on"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.steps):
                raise InputError(f"{name} has {len(given)} entries, but the trace has {len(self.steps)} steps")
        for i, sources in enumerate(self.depends_on or ()):
            if any(not 0 <= s < i for s in sources):
                raise InputError(f"step {i} can depend on earlier steps only, not on {list(sources)}")

    def __len__(self) -> int:
        return len(self.steps)

    def prefix(self, boundary: int) -> str:
        """All text before the boundary, 0 <= boundary <= n: the prompt and steps 0..boundary-1."""
        if not 0 <= boundary <= len(self):
            raise InputError(f"a trace of {len(self)} steps has boundaries 0..{len(self)}, not {boundary}")
        return self.prompt + self.steps.text[: self.steps.bounds[boundary]]


@dataclass(frozen=True)
class Rollout:
    """One continuation sampled from a boundary of a trace.

    text: what was sampled, the prefix left out. step: its first step (the resampled one), as the splitter cuts it.
    answer: extracted and normalised, None when none was given. probabilities: {answer: p} where the answer was scored
    by likelihood instead of drawn. finish: one of `FINISHES`. n_tokens: sampled tokens. reason: why finish is "error".
    """

    boundary: int
    index: int
    text: str
    step: str = ""
    answer: str | None = None
    correct: bool | None = None
    probabilities: Mapping[str, float] | None = field(default=None, hash=False)
    finish: str = "stop"
    n_tokens: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if self.finish not in FINISHES:
            raise InputError(f"finish must be one of {', '.join(FINISHES)}, not {self.finish!r}")


@dataclass(frozen=True)
class Rollouts:
    """All rollouts of one trace; `n` is its number of steps. Errors are kept, and left out by `at`."""

    n: int
    items: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        seen: set[tuple[int, int]] = set()
        for r in self.items:
            if not 0 <= r.boundary <= self.n:
                raise InputError(f"a trace of {self.n} steps has boundaries 0..{self.n}; a rollout says {r.boundary}")
            if (r.boundary, r.index) in seen:
                raise InputError(f"rollout {r.index} at boundary {r.boundary} is there twice")
            seen.add((r.boundary, r.index))

    @cached_property
    def _by_boundary(self) -> tuple[tuple[Rollout, ...], ...]:
        groups: list[list[Rollout]] = [[] for _ in range(self.n + 1)]
        for r in sorted(self.items, key=lambda r: r.index):
            if r.finish != "error":
                groups[r.boundary].append(r)
        return tuple(map(tuple, groups))

    def at(self, boundary: int) -> tuple[Rollout, ...]:
        """The rollouts sampled at a boundary in order of their index, errors left out."""
        return self._by_boundary[boundary]

    def plus(self, more: Iterable[Rollout]) -> Rollouts:
        """These and more."""
        return Rollouts(self.n, (*self.items, *more))
