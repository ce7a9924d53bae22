"""The weights around heads and neurons: what one unit writes, and the norm that may stand between it and the residual.

In Gemma 2/3 and OLMo 2 a norm P follows each sublayer, so what head h adds is not W_O z_h but its share of P(W_O z).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import HookError
from ..models.anatomy import Anatomy, is_quantised, resolve, unwrap


@dataclass(frozen=True)
class Sublayer:
    """One sublayer's output side: `project` (o_proj or down_proj) and the norm after it, if any."""

    project: nn.Module
    norm: nn.Module | None
    weight: Tensor
    """[d_model, width]: columns are what one unit of the input writes."""

    def written(self, x: Tensor) -> Tensor:
        """What the sublayer writes before any norm, for inputs [..., width]."""
        return self.project.forward(x.to(self.weight.dtype))  # past hooks: this may run inside one

    def added(self, y: Tensor) -> Tensor:
        """What reaches the residual stream when y [..., d_model] was written."""
        return y if self.norm is None else self.norm.forward(y)

    def gain(self) -> Tensor:
        """[d_model] factor per dimension of the norm (ones without one)."""
        if self.norm is None:
            return torch.ones(self.weight.shape[0], device=self.weight.device)
        return self.norm.forward(
            torch.ones(1, self.weight.shape[0], device=self.weight.device, dtype=self.weight.dtype)
        )[0]

    def scale(self, y: Tensor, added: Tensor | None = None) -> Tensor:
        """[...] the norm's factor on y: added(y) = scale * gain * y, so that units still add up exactly."""
        if self.norm is None:
            return torch.ones(y.shape[:-1], device=y.device)
        plain = self.gain() * y
        return ((self.added(y) if added is None else added) * plain).sum(-1) / (plain * plain).sum(-1).clamp_min(1e-20)


def attention_side(model: nn.Module, layer: int) -> Sublayer:
    """o_proj of a layer and the norm after it. Raises HookError where the architecture has no per-head z."""
    return _side(unwrap(model), resolve(model), "z", "attn_out", layer)


def mlp_side(model: nn.Module, layer: int) -> Sublayer:
    """down_proj of a layer and the norm after it. Raises HookError where there is none (fused experts)."""
    return _side(unwrap(model), resolve(model), "mlp_post", "mlp_out", layer)


def _side(model: nn.Module, anatomy: Anatomy, site: str, out: str, layer: int) -> Sublayer:
    point = anatomy.point(site, layer)
    project = model.get_submodule(point.module)
    if anatomy.hook_points or not isinstance(getattr(project, "weight", None), Tensor):
        raise HookError(
            f"the weights behind {site!r} of layer {layer} are not one projection; pass the Hugging Face model"
        )
    weight = project.weight
    assert isinstance(weight, Tensor)
    if is_quantised(weight):
        raise HookError(f"the projection behind {site!r} of layer {layer} is quantised; load the model unquantised")
    is_conv1d = type(project).__name__ == "Conv1D"
    norm = (
        model.get_submodule(anatomy.point(out, layer).module)
        if anatomy.structure in ("sandwich", "post-norm")
        else None
    )
    return Sublayer(project, norm, weight.detach().T if is_conv1d else weight.detach())


def head_writes(side: Sublayer, z: Tensor) -> Tensor:
    """What each head writes [M, heads, d_model] for z [M, heads, head_dim] (biases left out)."""
    weight = side.weight.unflatten(1, z.shape[1:]).permute(1, 2, 0).to(z.dtype)
    return torch.einsum("mhk,hkd->mhd", z, weight)
