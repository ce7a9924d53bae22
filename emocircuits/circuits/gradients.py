"""Gradients of a readout at a site of every layer: one forward pass and one backward pass per emotion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import capture
from ..activations.forward import hook_point
from ..models.anatomy import resolve, unwrap
from .readout import Readout


def gradients(model: Any, inputs: Mapping[str, Any], readout: Readout, site: str) -> list[tuple[Tensor, Tensor]]:
    """For each layer the site's activation [B, T, ...] and the readout's gradients there [E, B, T, ...].

    The readout is taken at each row's last real position and summed over rows. Layers above the readout are left
    out. Parameters get no gradient.
    """
    module = unwrap(model)
    anatomy = resolve(module)
    points = [anatomy.point(site, layer) for layer in range(anatomy.n_layers)]
    held: dict[int, Tensor] = {}
    with frozen(module), ExitStack() as stack:
        for layer, point in enumerate(points):
            # The module's whole tensor, because autograd knows nothing of a view that the model itself never uses.
            keep = _keep(held, layer)
            stack.callback(hook_point(module.get_submodule(point.module), point.io, keep).remove)
        acts = capture(module, inputs, readout.site, readout.layer, positions="last", grad=True)
        scores = readout(next(iter(acts.values())))
        values = [held[layer] for layer in sorted(held)]
        rows = [
            torch.autograd.grad(scores[:, e].sum(), values, retain_graph=True, allow_unused=True)
            for e in range(scores.shape[1])
        ]
    found = []
    for layer, value in enumerate(values):
        grads = [torch.zeros_like(value) if row[layer] is None else row[layer] for row in rows]
        found.append((points[layer].read(value.detach()), torch.stack([points[layer].read(g) for g in grads])))
    return found


def _keep(held: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        held[layer] = x

    return keep


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through activations only: parameters need none, and the graph begins at the embedding."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
