"""When and how hard a steerer pushes: schedules, gates on the text, and closed-loop control.

``steerer.when(Ramp(0, 1, 20))``. Each control gives every row and token a factor for the steerer's strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..activations.control import Control, View
from ..errors import ArtefactError, InputError, unknown
from .meter import Meter

PHASES = ("inside", "after")


@dataclass(frozen=True)
class Ramp(Control):
    """From factor `start` (prompt, first token) to `stop`, linearly over `tokens` generated tokens, then constant."""

    start: float
    stop: float
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or not (math.isfinite(self.start) and math.isfinite(self.stop)):
            raise InputError("a ramp needs finite ends and at least one token")

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:  # noqa: ARG002
        share = (view.step().float() / self.tokens).clamp(0, 1)
        return (self.start + (self.stop - self.start) * share)[None]


@dataclass(frozen=True)
class Window(Control):
    """On for generated tokens start to stop - 1 (None: to the end); start 0 includes the prompt's last column."""

    start: int
    stop: int | None = None

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:  # noqa: ARG002
        step = view.step()
        return ((step >= self.start) & (step < (math.inf if self.stop is None else self.stop))).float()[None]


@dataclass(frozen=True)
class SkipFirst(Control):
    """Everywhere but on the first real tokens of each row.

    Most models park attention on the first token, whose residual is ten times as long as any other and means nothing;
    to take a component out of it breaks every later token.
    """

    tokens: int = 1

    timed = False

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:  # noqa: ARG002
        return (view.forward.index(view.device) >= self.tokens).float()


@dataclass(frozen=True)
class StepEnds(Control):
    """On the tokens that end a step with a blank line; see `step_ends`.

    whole: tokens that hold all of a blank line. heads: tokens that begin with a line break, after spaces at most; they
    end a step behind one of the tails, which end with a line break, before spaces at most. spaces: tokens of nothing
    else, which may stand between the two.
    """

    whole: tuple[int, ...]
    heads: tuple[int, ...] = ()
    tails: tuple[int, ...] = ()
    spaces: tuple[int, ...] = ()

    needs_ids = True

    def __post_init__(self) -> None:
        if not self.whole and not (self.heads and self.tails):
            raise InputError("no token of this tokenizer makes a blank line, so steps cannot be told apart by them")

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:  # noqa: ARG002
        assert view.ids is not None
        whole, heads, tails, spaces = (
            torch.isin(view.ids, torch.tensor(t, device=view.ids.device, dtype=view.ids.dtype))
            for t in (self.whole, self.heads, self.tails, self.spaces)
        )
        columns = torch.arange(view.ids.shape[1], device=view.ids.device)
        solid = torch.where(spaces, 0, columns).cummax(1).values  # the last token that is more than spaces
        broken = torch.nn.functional.pad(tails.gather(1, solid), (1, -1))
        on = whole | heads & broken
        return on[:, -view.forward.length :].float().to(view.device)


def step_ends(tokenizer: Any) -> StepEnds:
    """The tokens of this tokenizer that end a paragraph step. Raises InputError when it has none."""
    # Line breaks and spaces as they are, as byte-level vocabularies write them, and as fallback bytes.
    wanted = re.compile(r"\n|\u010a|<0x0A>|^(?:[ \t\u0120\u0109\u2581]|<0x(?:20|09)>)+$")
    texts = {i: tokenizer.decode([i]) for name, i in tokenizer.get_vocab().items() if wanted.search(str(name))}
    found = [
        tuple(sorted(i for i, text in texts.items() if re.search(pattern, text)))
        for pattern in (r"\n[^\S\n]*\n", r"^[^\S\n]*\n", r"\n[^\S\n]*$", r"^[^\S\n]+$")
    ]
    return StepEnds(*found)


@dataclass(frozen=True)
class Tags(Control):
    """On "inside" an opening and a closing run of tokens, or "after" the last closing one; see `tags`."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    phase: str = "inside"

    remembers = needs_ids = True

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise unknown("phase", self.phase, PHASES)
        if not self.opening or not self.closing:
            raise InputError("opening and closing tags must hold at least one token each")

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:  # noqa: ARG002
        assert view.ids is not None
        opened, closed = (_last_end(view.ids, run) for run in (self.opening, self.closing))
        on = opened > closed if self.phase == "inside" else (closed >= 0) & (closed > opened)
        return on[:, -view.forward.length :].float().to(view.device)


def tags(tokenizer: Any, phase: str = "inside", opening: str = "<think>", closing: str = "</think>") -> Tags:
    """Steer only inside `<think>` ... `</think>` (phase "inside") or only the answer (phase "after").

    Raises InputError for tags that this tokenizer merges with the text around them: they would never be found.
    """
    ids = []
    for tag in (opening, closing):
        alone, inside = (tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (tag, f"x{tag}x"))
        if not any(inside[i : i + len(alone)] == alone for i in range(len(inside))):
            raise InputError(
                f"this tokenizer merges {tag!r} with the text around it, so it cannot be found there; use a tag that is"
                " a token of its own, or give Tags the token ids"
            )
        ids.append(alone)
    return Tags(ids[0], ids[1], phase)


def _last_end(ids: Tensor, run: Sequence[int]) -> Tensor:
    """[B, T] column where `run` last ended at or before each column, -1 when it has not occurred."""
    n, length = len(run), ids.shape[1]
    columns = torch.arange(length, device=ids.device)
    if length < n:
        return torch.full_like(ids, -1)
    hit = (ids.unfold(1, n, 1) == torch.tensor(run, device=ids.device)).all(-1)
    hit = torch.nn.functional.pad(hit, (n - 1, 0))
    return torch.where(hit, columns, -1).cummax(1).values


class _Metered(Control):
    """A control that follows the mean activation of what a row has written so far."""

    meter: Meter
    emotion: str
    memory: int
    remembers = True

    @property
    def watch(self) -> tuple[str, int]:  # type: ignore[override]
        return self.meter.site, self.meter.layer

    def begin(self, batch: int, device: torch.device) -> dict[str, Any]:
        width = self.meter.weights.shape[1]
        return {"mean": torch.zeros(batch, width, device=device), "seen": 0, "meter": self.meter.to(device)}

    def observe(self, view: View, state: dict[str, Any], x: Tensor) -> None:
        """Only generated tokens count: the prompt's emotion is not the text's."""
        if view.last_step < 1:
            return
        state["seen"] += 1
        rate = 1 / min(state["seen"], self.memory)
        state["mean"] += rate * (x[:, -1].to(state["mean"]) - state["mean"])

    def probability(self, state: dict[str, Any]) -> Tensor | None:
        """[B] probability of the emotion in the text so far; None before its first token was read."""
        if not state["seen"]:
            return None
        return state["meter"].probabilities(state["mean"])[:, self.meter.index(self.emotion)]


@dataclass(frozen=True, eq=False)
class Until(_Metered):
    """On while the text's probability of the emotion is under `target`; `memory` is how many tokens are averaged."""

    meter: Meter
    emotion: str
    target: float = 0.8
    memory: int = 12

    def __post_init__(self) -> None:
        _check_metered(self, self.target)

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:
        p = self.probability(state)
        return torch.ones(1, 1, device=view.device) if p is None else (p < self.target).float()[:, None].to(view.device)


@dataclass(frozen=True, eq=False)
class Hold(_Metered):
    """Closed loop: raise or lower the strength so that the probability of the emotion stays at `set_point`.

    The factor begins at `start` and moves by gain x (set_point - probability) per token, within [0, limit]: an integral
    controller whose state cannot wind up. The reading includes the push, so the push gives way where the text by itself
    carries the emotion.
    """

    meter: Meter
    emotion: str
    set_point: float = 0.8
    gain: float = 0.3
    start: float = 1.0
    limit: float = 1.5
    memory: int = 12

    def __post_init__(self) -> None:
        _check_metered(self, self.set_point)
        if self.gain <= 0 or self.limit <= 0 or not 0 <= self.start <= self.limit:
            raise InputError("a closed loop needs gain > 0 and 0 <= start <= limit")

    def begin(self, batch: int, device: torch.device) -> dict[str, Any]:
        return super().begin(batch, device) | {"factor": torch.full((batch, 1), float(self.start), device=device)}

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:
        p = self.probability(state)
        if p is not None:
            state["factor"] = (state["factor"] + self.gain * (self.set_point - p[:, None])).clamp(0, self.limit)
        return state["factor"].to(view.device)


def _check_metered(control: Any, level: float) -> None:
    control.meter.index(control.emotion)
    if not 0 < level < 1:
        raise InputError(f"a probability to steer to must be between 0 and 1, got {level}")
    if control.memory < 1:
        raise InputError("memory is how many tokens are averaged; give 1 or more")


@dataclass(frozen=True)
class Both(Control):
    """The product of two controls, such as a ramp inside a window."""

    first: Control
    second: Control

    def __post_init__(self) -> None:
        if self.first.watch and self.second.watch and self.first.watch != self.second.watch:
            raise InputError("two controls that read activations must read at the same site and layer")

    @property
    def timed(self) -> bool:  # type: ignore[override]
        return self.first.timed or self.second.timed

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.first.remembers or self.second.remembers

    @property
    def needs_ids(self) -> bool:  # type: ignore[override]
        return self.first.needs_ids or self.second.needs_ids

    @property
    def watch(self) -> tuple[str, int] | None:  # type: ignore[override]
        return self.first.watch or self.second.watch

    def begin(self, batch: int, device: torch.device) -> dict[str, Any]:
        return {"first": self.first.begin(batch, device), "second": self.second.begin(batch, device)}

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:
        return self.first.factor(view, state["first"]) * self.second.factor(view, state["second"])

    def observe(self, view: View, state: dict[str, Any], x: Tensor) -> None:
        for part, own in ((self.first, "first"), (self.second, "second")):
            if part.watch:
                part.observe(view, state[own], x)


KINDS: dict[str, type[Any]] = {c.__name__: c for c in (Ramp, Window, SkipFirst, StepEnds, Tags, Until, Hold, Both)}


def to_data(control: Control, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """A control as plain JSON; its tensors go into `tensors` under names that begin with prefix."""
    if KINDS.get(type(control).__name__) is not type(control):
        raise InputError(f"a control of your own ({type(control).__name__}) cannot be saved; save the steerer without")
    out: dict[str, Any] = {"kind": type(control).__name__}
    for f in fields(control):  # type: ignore[arg-type]
        value = getattr(control, f.name)
        if isinstance(value, Control):
            value = to_data(value, tensors, f"{prefix}.{f.name}")
        elif isinstance(value, Meter):
            value = value.to_data(tensors, f"{prefix}.{f.name}")
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Control:
    """The control that `to_data` wrote; raises ArtefactError for a kind this version does not know."""
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        raise ArtefactError(f"this steerer has a control of kind {data.get('kind')!r}; upgrade emocircuits")
    values: dict[str, Any] = {}
    if missing := [f.name for f in fields(kind) if f.name not in data]:
        raise ArtefactError(f"a {kind.__name__} of this steerer lacks {', '.join(missing)}; the file is damaged")
    for f in fields(kind):
        value = data[f.name]
        if f.name in ("first", "second"):
            value = from_data(value, tensors, f"{prefix}.{f.name}")
        elif f.name == "meter":
            value = Meter.from_data(value, tensors, f"{prefix}.{f.name}")
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def combined(old: Control | None, new: Control) -> Control:
    """What a term with the control `old` gets when `new` is asked for on top."""
    return new if old is None else Both(old, new)
