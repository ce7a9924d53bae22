"""Edits whose strength changes while a text is written: what a controller sees, and how its factor gets to hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HookError
from .forward import Forward, ForwardTracker, outside_compiled


@dataclass
class View:
    """One forward pass as a controller sees it: `ids` [B, past + length] of all tokens so far, None if unknown."""

    forward: Forward
    ids: Tensor | None
    device: torch.device

    @property
    def last_step(self) -> int:
        """Which generated token the last column leads to; see `step`."""
        return self.forward.past + self.forward.length - self.forward.prompt_length

    def step(self) -> Tensor:
        """[length] which generated token each column leads to: 0 for the last column of the prompt, negative before."""
        return self.forward.columns(self.device) - (self.forward.prompt_length - 1)


class Control:
    """How much of an edit applies to each row and token: a frozen dataclass; state lives in the `Pace` of one attach.

    Subclasses give `factor`. Those that remember things per row set `remembers`: beam search, which shuffles rows, is
    then refused. Those that read activations name a site and layer in `watch` and get them by `observe`.
    """

    timed: bool = True
    """Whether it matters when a row's text began, so that rows of different ages cannot share a pass."""
    remembers: bool = False
    needs_ids: bool = False
    watch: tuple[str, int] | None = None

    def begin(self, batch: int, device: torch.device) -> dict[str, Any]:  # noqa: ARG002
        """State of a new batch of texts."""
        return {}

    def factor(self, view: View, state: dict[str, Any]) -> Tensor:
        """[B or 1, length] multiplier of the edit in this pass."""
        raise NotImplementedError

    def observe(self, view: View, state: dict[str, Any], x: Tensor) -> None:
        """Take in the watched activation [B, length, width] of this pass."""


@dataclass
class Pace:
    """A control at work on one model: follows the texts of a batch and gives each pass its factors."""

    control: Control
    _state: dict[str, Any] = field(default_factory=dict)
    _ids: Tensor | None = None
    _pass: Forward | None = None
    _view: View | None = None
    _factor: Tensor | None = None

    def factor(self, device: torch.device) -> Tensor:
        """[B or 1, length] for the pass in progress."""
        if self._factor is None:
            raise HookError(f"{type(self.control).__name__} needs the decoder to run before the steered site")
        return self._factor.to(device)

    def observe(self, x: Tensor) -> None:
        """Hand the watched activation to the control."""
        if self._view is not None:
            self.control.observe(self._view, self._state, x.detach())

    def enter(self, current: Forward, device: torch.device) -> None:
        """Follow a pass from its beginning, whether or not any edit acts in it, and work out its factors once."""
        name = type(self.control).__name__
        if self.control.remembers and current.beams > 1:
            raise HookError(f"{name} follows each row of a batch, but beam search shuffles them; use num_beams=1")
        if self.control.watch and current.length > 1 and current.past + current.length > current.prompt_length:
            raise HookError(
                f"{name} steers by what it read one token ago, so tokens must come one by one through the KV cache;"
                " use use_cache=True and no assistant model"
            )
        fresh = current.past == 0 or self._pass is None or current.call != self._pass.call
        if fresh:
            self._state = self.control.begin(current.batch, device)
        self._ids = self._history(current, fresh)
        if self.control.needs_ids and self._ids is None:
            raise HookError(
                f"{name} reads all tokens of a text, but this pass has no input_ids or continues a cache whose tokens"
                " were never seen"
            )
        self._view = View(current, self._ids, device)
        self._pass, self._factor = current, self.control.factor(self._view, self._state)

    def _history(self, current: Forward, fresh: bool) -> Tensor | None:
        """All tokens so far; what assisted decoding took back is dropped, what a cache held before is in the prompt."""
        if current.ids is None or not self.control.needs_ids:
            return None
        if current.past == 0:
            return current.ids
        before = self._ids
        if fresh and current.prompt_ids is not None:
            before = current.prompt_ids.repeat_interleave(current.repeats, 0)
        elif fresh:
            before = None
        if before is None or before.shape[1] < current.past or len(before) != current.batch:
            return None
        return torch.cat([before[:, : current.past].to(current.ids.device), current.ids], 1)


class Paces(threading.local):
    """The controls of one attach at work, for each thread that runs the model."""

    def __init__(self, controls: Iterable[Control]) -> None:
        self.of = {control: Pace(control) for control in controls}


@outside_compiled
def factor_of(paces: Paces, control: Control, device: torch.device) -> Tensor:
    """`Pace.factor` outside compiled code, because its state changes with every pass."""
    return paces.of[control].factor(device)


@outside_compiled
def show(paces: Paces, control: Control, x: Tensor) -> None:
    """`Pace.observe` outside compiled code."""
    paces.of[control].observe(x)


@outside_compiled
def enter(paces: Paces, tracker: ForwardTracker, device: torch.device) -> None:
    """`Pace.enter` for all controls, outside compiled code."""
    current = tracker.current
    if current is not None:
        for pace in paces.of.values():
            pace.enter(current, device)
