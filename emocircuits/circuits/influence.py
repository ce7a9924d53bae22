"""How strongly a push along the local emotion direction at each sublayer moves the emotion at the end of the model.

Wang et al. (arXiv 2510.11328, their section on sublayer influence) inject at four doses and difference; the dose is so
small that this is a derivative, so one backward pass gives all sublayers. Their measure nearly is the cosine of the
local direction to the reference it is read out with, so that cosine is returned beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import capture
from ..activations.edit import edit
from ..activations.edits import Add
from ..activations.forward import last_real
from ..directions import DirectionSet
from ..errors import InputError
from .gradients import gradients
from .readout import Readout

SUBLAYERS = {"attn": "attn_out", "mlp": "mlp_out"}


@dataclass(frozen=True)
class Influence:
    """`values` [2, E, L] (attn, mlp): change of the end score per unit pushed; `cosine` [2, E, L] to the reference."""

    emotions: tuple[str, ...]
    values: Tensor
    cosine: Tensor

    def shares(self, kind: str) -> Tensor:
        """[E, L] influence clipped at zero and normalised per emotion; uniform where nothing is positive."""
        positive = self.values[list(SUBLAYERS).index(kind)].clamp_min(0)
        total = positive.sum(-1, keepdim=True)
        return torch.where(
            total > 0, positive / total.clamp_min(1e-20), torch.full_like(positive, 1 / positive.shape[1])
        )


def reference(sets: Sequence[DirectionSet], layers: Sequence[int]) -> Tensor:
    """[E, d_model] unit reference: sum of sign-aligned unit directions of these sets at these layers.

    Raises InputError for sets of different emotions, or for zero directions.
    """
    if len({s.emotions for s in sets}) != 1:
        raise InputError("the reference needs direction sets of the same emotions")
    stack = torch.cat([s.units[:, s.slots(list(layers))] for s in sets], dim=1)  # [E, n, d]
    if not bool((stack.norm(dim=-1) > 0).all()):
        raise InputError("a direction of the reference is zero; leave out sites that the model does not have")
    sign = torch.sign((stack * stack[:, :1]).sum(-1, keepdim=True))
    return torch.nn.functional.normalize((stack * sign).sum(1), dim=-1)


def sublayer_influence(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    directions: Mapping[str, DirectionSet],
    reference: Tensor,
    *,
    verify_dose: float | None = None,
) -> Influence:
    """Mean influence over the texts in `batches`: one forward and E backward passes each.

    directions: "attn" (residual after attention) and "mlp" (residual after the block), each at every layer; reference
    [E, d_model] is projected on the final norm's output at the last position, as published. verify_dose: use finite
    differences with pushes of this norm instead (2L forward passes per batch and emotion), to check the derivative.
    """
    sets = [directions[kind] for kind in SUBLAYERS]
    readout = Readout(sets[0].emotions, "final_norm", 0, reference, "reference")
    local = torch.stack([_aligned(s.units, reference) for s in sets])  # [2, E, L, d]
    total, rows = torch.zeros(local.shape[:3]), 0
    for inputs in batches:
        for k, site in enumerate(SUBLAYERS.values()):
            if verify_dose is None:
                total[k] += _by_gradient(model, inputs, readout, site, local[k])
            else:
                total[k] += _by_difference(model, inputs, readout, site, local[k], verify_dose)
        rows += len(inputs["input_ids"])
    cosine = (local * reference[None, :, None]).sum(-1)
    return Influence(readout.emotions, total / rows, cosine)


def _aligned(units: Tensor, reference: Tensor) -> Tensor:
    sign = torch.sign((units * reference[:, None]).sum(-1, keepdim=True))
    return units * torch.where(sign == 0, torch.ones_like(sign), sign)


def _by_gradient(model: Any, inputs: Mapping[str, Any], readout: Readout, site: str, local: Tensor) -> Tensor:
    """[E, L] sum over rows of <local direction, d readout / d output at the last position>."""
    mask = inputs.get("attention_mask")
    out = torch.zeros(local.shape[:2])
    for layer, (value, grad) in enumerate(gradients(model, inputs, readout, [site])[site]):
        rows, last = torch.arange(len(value)), last_real(mask, value)
        own = torch.stack([grad[e, rows, last] @ local[e, layer].to(value) for e in range(len(local))])
        out[:, layer] = own.sum(1).cpu()
    return out


@torch.no_grad()
def _by_difference(
    model: Any, inputs: Mapping[str, Any], readout: Readout, site: str, local: Tensor, dose: float
) -> Tensor:
    base = readout(capture(model, inputs, "final_norm")["final_norm", 0])
    out = torch.zeros(local.shape[:2])
    for e in range(local.shape[0]):
        for layer in range(local.shape[1]):
            push = Add(site=site, layer=layer, vector=local[e, layer] * dose, positions="last")
            with edit(model, push, compile_to="hook"):
                moved = readout(capture(model, inputs, "final_norm")["final_norm", 0])
            out[e, layer] = ((moved - base)[:, e] / dose).sum()
    return out
