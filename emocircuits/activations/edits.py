"""The kinds of write: each edit is data that says where, when, for which rows, and what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .control import Control

POSITIONS = ("all", "prompt", "generated", "last")
HEAD_SITES = ("q", "k", "v", "z")
SIDES = ("both", "above", "below")


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One write: where (`site`, `layer`, `units`), when (`positions`), for which `rows`, and what (the subclass).

    units: heads at q/k/v/z, else dimensions or neurons; None means all. positions: "all", "prompt", "generated",
    "last" (the last token of each forward pass), or (start, stop) spans per row. rows: batch rows to edit, None
    means all. control: how much of the edit applies, by row and token (see `control.Control`); None means all of it.
    Tensors with a leading batch dimension hold one value per row. Under beam search or several return
    sequences, rows are those of the batch given to generate(), and each stands for all its repeats.
    """

    site: str = "resid_post"
    layer: int = 0
    units: Sequence[int] | None = None
    positions: str | Sequence[Any] = "all"
    rows: Sequence[int] | None = None
    control: Control | None = None

    def transform(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """New values of x [B, T, width] (head sites: [B, T, heads, head_dim]); `units` are already selected."""
        raise TypeError("use a subclass of Edit, such as Add or Ablate")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the fields that hold tensors (moved to the model's device when compiled)."""
        return ()

    def described(self) -> str:
        return f"{type(self).__name__} at {self.site!r}, layer {self.layer}"


def _rowwise(value: Tensor | float, x: Tensor, per_row_dim: int) -> Tensor | float:
    """Broadcast `value` over x [B, T, ...]: a leading batch dimension becomes [B, 1, ...] (repeated for beams)."""
    if not isinstance(value, Tensor) or value.dim() < per_row_dim:
        return value
    if value.shape[0] != x.shape[0]:
        if x.shape[0] % value.shape[0]:
            raise InputError(f"the edit holds values for {value.shape[0]} rows, but the batch has {x.shape[0]}")
        value = value.repeat_interleave(x.shape[0] // value.shape[0], dim=0)
    return value[:, None]


def _per_row(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one number per row [B], as it broadcasts over x [B, T, ...]."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return _rowwise(value.reshape(-1, *(1,) * (x.dim() - 2)), x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Edit):
    """x + coefficient * vector.

    vector: [width] or per row [B, width] (heads: [units, head_dim]); coefficient: number or [B].
    """

    vector: Tensor
    coefficient: float | Tensor = 1.0

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("vector", "coefficient")

    def delta(self) -> Tensor:
        """coefficient * vector, with a leading batch dimension when either has one."""
        if not isinstance(self.coefficient, Tensor) or self.coefficient.dim() == 0:
            return self.vector * self.coefficient
        shape = (-1,) + (1,) * (2 if self.site in HEAD_SITES else 1)
        per_row = self.coefficient.reshape(shape)
        return per_row * (self.vector if self.vector.dim() == len(shape) else self.vector[None])

    def transform(self, x: Tensor) -> Tensor:
        return x + _rowwise(self.delta(), x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """x * factor; factor: number, [width], or per row [B, width]."""

    factor: float | Tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("factor",)

    def transform(self, x: Tensor) -> Tensor:
        return x * _rowwise(self.factor, x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Project(Edit):
    """Move the component along `direction` [width] or [B, width] to `target` (0 removes it), by share `amount`.

    target, amount: number or [B]. side: "both", or only what is "above" the target (a cap) or "below" it (a floor).
    """

    direction: Tensor
    target: float | Tensor = 0.0
    amount: float | Tensor = 1.0
    side: str = "both"

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("direction", "target", "amount")

    def transform(self, x: Tensor) -> Tensor:
        unit = _rowwise(nn.functional.normalize(self.direction, dim=-1), x, x.dim() - 1)
        target, amount = (_per_row(v, x) for v in (self.target, self.amount))
        move = target - (x * unit).sum(-1, keepdim=True)
        if self.side != "both":
            move = move.clamp(max=0) if self.side == "above" else move.clamp(min=0)
        return x + amount * move * unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Edit):
    """Keep the component along `direction` (or, without one, each unit's value) within [low, high]."""

    low: float = -torch.inf
    high: float = torch.inf
    direction: Tensor | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("direction",)

    def transform(self, x: Tensor) -> Tensor:
        if self.direction is None:
            return x.clamp(self.low, self.high)
        unit = _rowwise(nn.functional.normalize(self.direction, dim=-1), x, x.dim() - 1)
        component = (x * unit).sum(-1, keepdim=True)
        return x + (component.clamp(self.low, self.high) - component) * unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Edit):
    """Replace by zero, by a `mean` value, or by rows drawn from a pool of other activations (`resample`, seeded).

    mode "zero"; "mean": value [width] (heads: [units, head_dim]); "resample": value [N, width], one draw per row.
    """

    mode: str = "zero"
    value: Tensor | None = None
    seed: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("value",)

    def transform(self, x: Tensor) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(x)
        assert self.value is not None
        if self.mode == "mean":
            return self.value.expand_as(x)
        generator = torch.Generator().manual_seed(self.seed)
        pick = torch.randint(len(self.value), (x.shape[0],), generator=generator).to(x.device)
        return self.value[pick][:, None].expand_as(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Blend(Edit):
    """keep * x + (1 - keep) * value: units with keep 0 are replaced, so each row can lose its own set of units.

    keep and value: [width] or per row [B, width] (heads: [units, head_dim or 1]).
    """

    keep: Tensor
    value: Tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("keep", "value")

    def transform(self, x: Tensor) -> Tensor:
        keep = _rowwise(self.keep, x, x.dim() - 1)
        return keep * x + (1 - keep) * _rowwise(self.value, x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(Edit):
    """Put in activations from elsewhere: value broadcastable to [B, T, width], such as another run's capture."""

    value: Tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("value",)

    def transform(self, x: Tensor) -> Tensor:
        try:
            return self.value.expand_as(x)
        except RuntimeError as error:
            raise InputError(
                f"the patch has shape {list(self.value.shape)}, but the site holds {list(x.shape)}"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Apply(Edit):
    """Any function of x [B, T, width] that returns the same shape, such as an SAE edit."""

    function: Callable[[Tensor], Tensor]

    def transform(self, x: Tensor) -> Tensor:
        return self.function(x)
