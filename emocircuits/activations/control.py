"""Edits whose strength changes while a text is written: what a controller sees, and how its factor gets to hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HookError
from .forward import Forward

_outside: Any = torch.compiler.disable


@dataclass
class View:
    """One forward pass as a controller sees it: `ids` [B, past + length] of all tokens so far, None if unknown."""

    forward: Forward
    ids: Tensor | None
    device: torch.device

    def step(self) -> Tensor:
        """[length] which generated token each column leads to: 0 for the last column of the prompt, negative before."""
        return self.forward.columns(self.device) - (self.forward.prompt_length - 1)


class Control:
    """How much of an edit applies to each row and token: frozen data; state lives in the `Pace` of one attach.

    Subclasses give `factor`. Those that remember things per row set `remembers`: beam search, which shuffles rows, is
    then refused. Those that read activations name a site and layer in `watch` and get them by `observe`.
    """

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

    def factor(self, current: Forward | None, device: torch.device) -> Tensor:
        """[B or 1, length] for the pass in progress; worked out once, whatever the number of edits that ask."""
        if current is None:
            raise HookError(f"{type(self.control).__name__} needs the decoder to run before the steered site")
        if self._pass is not current:
            self._enter(current, device)
        assert self._factor is not None
        return self._factor.to(device)

    def observe(self, current: Forward | None, x: Tensor) -> None:
        """Hand the watched activation to the control."""
        if current is None:
            return
        if self._pass is not current:  # watched below the first steered layer
            self._enter(current, x.device)
        assert self._view is not None
        self.control.observe(self._view, self._state, x.detach())

    def _enter(self, current: Forward, device: torch.device) -> None:
        name = type(self.control).__name__
        if self.control.remembers and current.beams > 1:
            raise HookError(f"{name} follows each row of a batch, but beam search shuffles them; use num_beams=1")
        if self.control.watch and current.length > 1 and current.past + current.length > current.prompt_length:
            raise HookError(
                f"{name} steers by what it read one token ago, so tokens must come one by one through the KV cache;"
                " use use_cache=True and no assistant model"
            )
        if current.past == 0 or not self._state:
            self._state = {"": None} | self.control.begin(current.batch, device)
        self._ids = self._history(current)
        if self.control.needs_ids and self._ids is None:
            raise HookError(f"{name} reads the tokens, but this model was called without input_ids")
        self._view = View(current, self._ids, device)
        self._pass, self._factor = current, self.control.factor(self._view, self._state)

    def _history(self, current: Forward) -> Tensor | None:
        """All tokens so far; what assisted decoding took back is dropped."""
        if current.ids is None or not self.control.needs_ids:
            return None
        if current.past == 0:
            return current.ids
        if self._ids is None or self._ids.shape[1] < current.past or len(self._ids) != current.batch:
            return None
        return torch.cat([self._ids[:, : current.past].to(current.ids.device), current.ids], 1)


@_outside
def factor_of(pace: Pace, current: Forward | None, device: torch.device) -> Tensor:
    """`Pace.factor` outside compiled code, because its state changes with every pass."""
    return pace.factor(current, device)


@_outside
def show(pace: Pace, current: Forward | None, x: Tensor) -> None:
    """`Pace.observe` outside compiled code."""
    pace.observe(current, x)
