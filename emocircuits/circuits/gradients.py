"""Gradients of a readout at a site of every layer: one forward pass and one backward pass per emotion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import capture
from ..activations.forward import hook_point
from ..models.anatomy import resolve, unwrap
from .readout import Readout


def gradients(
    model: Any, inputs: Mapping[str, Any], readout: Readout, sites: Sequence[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each site and layer its activation [B, T, ...] and the readout's gradients there [E, B, T, ...].

    One forward pass and E backward passes, however many sites. The readout is taken at each row's last real position
    and summed over rows. Layers above the readout are left out. Parameters get no gradient.
    """
    module = unwrap(model)
    anatomy = resolve(module)
    points = {(site, layer): anatomy.point(site, layer) for site in sites for layer in range(anatomy.n_layers)}
    held: dict[tuple[str, int], Tensor] = {}
    with frozen(module), ExitStack() as stack:
        for key, point in points.items():
            # The module's whole tensor, because autograd knows nothing of a view that the model itself never uses.
            stack.callback(hook_point(module.get_submodule(point.module), point.io, _keep(held, key)).remove)
        acts = capture(module, inputs, readout.site, readout.layer, positions="last", grad=True)
        scores = readout(next(iter(acts.values())))
        values = list(held.values())
        rows = [
            torch.autograd.grad(scores[:, e].sum(), values, retain_graph=e + 1 < scores.shape[1], allow_unused=True)
            for e in range(scores.shape[1])
        ]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}
    at = {key: i for i, key in enumerate(held)}
    for key in sorted(held, key=lambda k: k[1]):
        i, point = at[key], points[key]
        grads = [torch.zeros_like(values[i]) if row[i] is None else row[i] for row in rows]
        found[key[0]].append((point.read(values[i].detach()), torch.stack([point.read(g) for g in grads])))
    return found


def attribution(
    model: Any, inputs: Mapping[str, Any], readout: Readout, baselines: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """First-order effect of all units on the readout by site: "z" [B, L, heads, E], "mlp_post" [B, L, d_mlp, E].

    Gradient x (activation - baseline), summed over all positions. baselines: {site: [L, ...] or None for zero}. NaN
    above the readout.
    """
    n_layers = resolve(model).n_layers
    out = {}
    for site, layers in gradients(model, inputs, readout, list(baselines)).items():
        base, per_layer = baselines[site], []
        for layer, (x, grad) in enumerate(layers):
            effect = grad * (x if base is None else x - base[layer].to(x))
            effect = effect.sum(4) if site == "z" else effect
            per_layer.append(effect.sum(2).permute(1, 2, 0).cpu())
        per_layer += [torch.full_like(per_layer[0], torch.nan)] * (n_layers - len(per_layer))
        out[site] = torch.stack(per_layer, dim=1)
    return out


def _keep(held: dict[tuple[str, int], Tensor], key: tuple[str, int]) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        held[key] = x

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
