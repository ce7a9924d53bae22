"""Neurons by what moving them would do to a readout; what they write along a direction is in `units.Units.neurons`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..activations.edit import edit
from ..activations.edits import Patch
from ..errors import InputError
from . import gradients
from .readout import Readout


def attribution(model: Any, inputs: Mapping[str, Any], readout: Readout, *, baseline: Tensor | None = None) -> Tensor:
    """[B, L, d_mlp, E] first-order effect of every neuron on the readout: gradient x (activation - baseline).

    All positions count; baseline [L, d_mlp] is zero when None; NaN above the readout. One forward pass, E backward.
    """
    return gradients.attribution(model, inputs, readout, {"mlp_post": baseline})["mlp_post"]


def integrated_gradients(
    model: Any,
    inputs: Mapping[str, Any],
    readout: Readout,
    layer: int,
    *,
    baseline: Tensor | None = None,
    steps: int = 8,
) -> Tensor:
    """[B, d_mlp, E] integrated gradients of one layer's neurons between baseline [d_mlp] (or zero) and activation.

    Exact to the number of steps: summed over neurons they give the readout's change when the whole layer is put to
    baseline (Sundararajan et al., arXiv 1703.01365). Where a norm follows the MLP (Gemma, OLMo 2) the way to zero is
    flat until it ends, so give a mean as baseline there. Raises InputError for fewer than one step.
    """
    if steps < 1:
        raise InputError("integrated gradients need at least one step")
    a = gradients.gradients(model, inputs, readout, ["mlp_post"])["mlp_post"][layer][0]
    rest = torch.zeros_like(a) if baseline is None else baseline.to(a).expand_as(a)
    total = torch.zeros(len(readout.emotions), *a.shape, device=a.device)
    for step in range(steps):
        at = rest + (a - rest) * (step + 0.5) / steps
        with edit(model, Patch(site="mlp_post", layer=layer, value=at.detach().requires_grad_()), compile_to="hook"):
            total += gradients.gradients(model, inputs, readout, ["mlp_post"])["mlp_post"][layer][1] / steps
    return (total * (a - rest)).sum(2).permute(1, 2, 0).detach().cpu()
