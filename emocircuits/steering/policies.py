"""How attention is shared out anew: each policy turns the attention masses of regions of keys into weights on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..activations.attention import Call, probabilities
from ..errors import InputError

TINY = 1e-9
"""Masses below this are no attention at all: nothing is moved to or from them."""
NONE = -1e4
"""exp of it is 0."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies. Regions are disjoint sets of keys, [B, R, K]; masses are their attention, [..., R]."""

    keeps_mass: ClassVar[bool] = True
    """Whether what regions gain others lose, so that rows need no renormalising."""

    def spans(self) -> tuple[str, ...]:
        """Names of the spans it needs."""
        raise NotImplementedError

    def idle(self) -> bool:
        """Whether it changes nothing, so that the model runs untouched."""
        return False

    def regions(self, masks: Mapping[str, Tensor], sinks: Tensor | None) -> Tensor:  # noqa: ARG002
        """[B, R, K] from {span: [B, K]}."""
        return torch.stack([masks[name] for name in self.spans()], dim=1)

    def weights(self, masses: Tensor) -> Tensor:
        """[..., R] factor of each region's attention, before the row is renormalised."""
        raise NotImplementedError

    def attention(self, call: Call, regions: Tensor) -> Tensor:
        """Probabilities [B, H, n, K] of a few queries under the policy; each row keeps its sum."""
        p, regions = probabilities(call), regions.float()[:, None]
        changed = p * (1 + (self.weights(p @ regions.mT) - 1) @ regions)
        if self.keeps_mass:
            return changed
        total = changed.sum(-1, keepdim=True)
        if call.kwargs.get("s_aux") is not None:
            total = total + 1 - p.sum(-1, keepdim=True)  # what a learned attention sink takes
        return changed / total.clamp_min(TINY)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Policy:
        """What `dataclasses.asdict` wrote."""
        return cls(**data)


@dataclass(frozen=True)
class Multiply(Policy):
    """Attention to each span times a fixed factor, then renormalised: p' = w p / sum(w p).

    factors: {span: factor}, 0 or more; 0 hides a span. Raises InputError for a negative or infinite factor.
    """

    factors: Mapping[str, float]
    keeps_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            if not (factor >= 0 and math.isfinite(factor)):
                raise InputError(f"the factor of {name!r} must be a finite number that is not negative, got {factor}")

    def spans(self) -> tuple[str, ...]:
        return tuple(self.factors)

    def idle(self) -> bool:
        return all(f == 1 for f in self.factors.values())

    def log_weights(self, regions: Tensor) -> Tensor:
        """[B, K] log factor of each key; that of 0 is finite, so that a gate of 0 leaves it alone."""
        logs = torch.tensor([math.log(f) if f else NONE for f in self.factors.values()], device=regions.device)
        return (regions.float() * logs[:, None]).sum(1)

    def weights(self, masses: Tensor) -> Tensor:
        return torch.tensor(list(self.factors.values()), device=masses.device).expand_as(masses)


@dataclass(frozen=True)
class _Between(Policy):
    """Base of policies that move attention from one span to another; the two together keep their mass."""

    source: str
    target: str

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise InputError(f"source and target are both {self.source!r}; attention must move between two spans")

    def spans(self) -> tuple[str, ...]:
        return (self.source, self.target)

    def _moved(self, masses: Tensor, moved: Tensor) -> Tensor:
        """Weights that take `moved` (negative: the other way) from source to target."""
        both = (masses > TINY).all(-1)
        source, target = masses.clamp_min(TINY).unbind(-1)
        weights = torch.stack([1 - moved / source, 1 + moved / target], dim=-1)
        return torch.where(both[..., None], weights, 1.0)


@dataclass(frozen=True)
class Transfer(_Between):
    """A share of the source's attention moves to the target, where the source has more than `threshold` of the two.

    share in [0, 1]; threshold 0 always acts. Raises InputError for values outside.
    """

    share: float = 0.5
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.share <= 1 and 0 <= self.threshold <= 1):
            raise InputError("`share` and `threshold` of a transfer lie between 0 and 1")

    def idle(self) -> bool:
        return self.share == 0

    def weights(self, masses: Tensor) -> Tensor:
        source = masses[..., 0]
        acts = source > self.threshold * masses.sum(-1)
        return self._moved(masses, torch.where(acts, self.share * source, 0.0))


@dataclass(frozen=True)
class SetPoint(_Between):
    """The two spans share their attention at a fixed ratio, source : target, in every head and query.

    strength: how much of the way to that ratio (1: all of it). Raises InputError for a ratio or strength outside.
    """

    ratio: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ratio > 0 and math.isfinite(self.ratio) and 0 <= self.strength <= 1):
            raise InputError("a set point needs a positive, finite ratio and a strength between 0 and 1")

    def idle(self) -> bool:
        return self.strength == 0

    def weights(self, masses: Tensor) -> Tensor:
        wanted = masses.sum(-1) * self.ratio / (1 + self.ratio)
        return self._moved(masses, self.strength * (masses[..., 0] - wanted))


@dataclass(frozen=True)
class Sinks(Policy):
    """Attention sinks give part of their attention to a span (VAR): w = keep on sinks, what is freed to the rest.

    A token is a sink in a layer when a dimension of its normalised input, |RMSnorm(h)|, exceeds `size`; dims: which
    dimensions count (None: all; published: two, measured for each checkpoint). Acts on heads and queries where the
    span has at least `least` of the attention, of which at most `most_sinks` is on sinks.
    """

    target: str
    keep: float = 0.6
    size: float = 20.0
    least: float = 0.2
    most_sinks: float = 0.5
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.keep <= 1 and self.size > 0 and 0 <= self.least <= 1 and 0 <= self.most_sinks <= 1):
            raise InputError("`keep`, `least` and `most_sinks` lie between 0 and 1, and `size` is positive")

    def spans(self) -> tuple[str, ...]:
        return (self.target,)

    def idle(self) -> bool:
        return self.keep == 1

    def found(self, x: Tensor) -> Tensor:
        """[B, T] True on the sinks of a residual stream [B, T, d_model]."""
        x = x.detach().float()
        normed = x.abs() * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        return (normed if self.dims is None else normed[..., list(self.dims)]).amax(-1) > self.size

    def regions(self, masks: Mapping[str, Tensor], sinks: Tensor | None) -> Tensor:
        """Sinks outside the span, sinks inside it, and the rest of the span."""
        span = masks[self.target]
        sinks = torch.zeros_like(span) if sinks is None else sinks.to(span.device)
        return torch.stack([sinks & ~span, sinks & span, span & ~sinks], dim=1)

    def weights(self, masses: Tensor) -> Tensor:
        outside, inside, rest = masses.unbind(-1)
        span = inside + rest
        acts = (span >= self.least) & (inside <= self.most_sinks * span) & (rest > TINY)
        freed = (1 - self.keep) * (outside + inside)
        keep = torch.full_like(rest, self.keep)
        weights = torch.stack([keep, keep, 1 + freed / rest.clamp_min(TINY)], dim=-1)
        return torch.where(acts[..., None], weights, 1.0)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Sinks:
        return cls(**{**data, "dims": None if data["dims"] is None else tuple(data["dims"])})


@dataclass(frozen=True)
class Boost(Policy):
    """Scores of a span's keys grow by alpha times their size, s + alpha |s|, at the last query of each pass (PAI)."""

    target: str
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise InputError(f"`alpha` must be a finite number, got {self.alpha}")

    def spans(self) -> tuple[str, ...]:
        return (self.target,)

    def idle(self) -> bool:
        return self.alpha == 0

    def attention(self, call: Call, regions: Tensor) -> Tensor:
        keys = regions[:, 0, None, None]
        return probabilities(call, lambda s: s + self.alpha * s.abs() * keys)


POLICIES: dict[str, type[Policy]] = {p.__name__: p for p in (Multiply, Transfer, SetPoint, Sinks, Boost)}
