"""Total effects of heads: take a head out, run the rest of the model, see what changes at the end.

Direct effects come from `units.collect` without extra passes; these include everything downstream. Published code runs
one whole forward pass per head and prompt; here a sweep restarts at the ablated layer (`activations.restart`), many
heads per pass, and gradients screen all heads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..activations import capture
from ..activations.restart import Checkpoint
from ..data.prompts import encode_prompt
from ..errors import InputError, unknown
from ..models.anatomy import resolve
from . import gradients
from .readout import Readout
from .sublayers import attention_side


@torch.no_grad()
def total_effects(
    model: Any,
    inputs: Mapping[str, Any],
    readout: Readout,
    *,
    layers: Sequence[int] | None = None,
    mode: str = "zero",
    baseline: Tensor | None = None,
    positions: str = "all",
    rows: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """[B, L, heads, E] readout of the clean pass less the readout without each head, for one batch of texts.

    mode: "zero", "mean" (baseline [L, heads, head_dim], see `Units.baseline`), or "resample" (z of another row of the
    batch). positions: "all", or "last": only the last position loses the head, over the clean KV cache, which costs
    one token per row; rows must then end in the same column. `rows` bounds the rows of one pass (with "last" one text
    in all layers is the least). NaN in layers left out, or above the readout. Raises InputError for a bad request.
    """
    if mode not in ("zero", "mean", "resample"):
        raise unknown("ablation mode", mode, ("zero", "mean", "resample"))
    if positions not in ("all", "last"):
        raise unknown("positions", positions, ("all", "last"))
    if mode == "mean" and baseline is None:
        raise InputError("ablation by mean needs `baseline`, for example units.baseline('z')")
    anatomy = resolve(model)
    start = Checkpoint(model, inputs, cached=positions == "last")
    if mode == "resample" and start.batch < 2:
        raise InputError("ablation by resampling needs at least two rows, to take values from another one")
    clean = readout(start.read(readout.site, readout.layer))
    wanted = list(range(anatomy.n_layers)) if layers is None else list(layers)
    out = torch.full((start.batch, anatomy.n_layers, anatomy.n_heads, len(readout.emotions)), torch.nan)
    order = _other_rows(start.batch, seed)
    reached = [n for n in wanted if readout.site == "final_norm" or n <= readout.layer]

    def change(layer: int, source: Tensor, heads: Tensor) -> Tensor:
        """[R, T, d] attention output of rows `source` without `heads`."""
        z = start.z[layer]
        rest = None if mode == "zero" else z[order] if mode == "resample" else baseline[layer].to(z)  # type: ignore[index]
        return _removed(attention_side(model, layer), z, rest, source, heads)(start.attention[layer])

    total = len(reached) * start.batch * anatomy.n_heads
    task = progress.add_task("ablating heads", total=total) if progress else None
    sweep = _sweep_last if positions == "last" else _sweep_all
    for layer, source, heads, found in sweep(start, anatomy.n_heads, sorted(reached), rows, readout, change):
        out[source.cpu(), layer, heads.cpu()] = (clean[source] - readout(found)).cpu()
        if progress is not None and task is not None:
            progress.advance(task, len(source))
    return out


Part = tuple[int, Tensor, Tensor, Tensor]
"""Layer, source rows, heads, and what the readout's site held without them."""


def _sweep_all(
    start: Checkpoint, n_heads: int, layers: Sequence[int], rows: int, readout: Readout, change: Any
) -> Iterator[Part]:
    """Layer by layer, restarted there, `rows` rows at a time."""
    groups = _row_groups(start, n_heads, rows)
    for layer in layers:
        for source, heads, given in groups:
            found = start.resume(layer, change(layer, source, heads), source, readout.site, readout.layer, given)
            yield layer, source, heads, found


def _sweep_last(
    start: Checkpoint, n_heads: int, layers: Sequence[int], rows: int, readout: Readout, change: Any
) -> Iterator[Part]:
    """All layers of a few texts in one pass: with one token per row, a block mostly waits for its weights."""
    texts = torch.arange(start.batch, device=start.resid_pre[0].device)
    for some in texts.split(max(1, rows // (n_heads * max(1, len(layers))))):
        pairs = torch.cartesian_prod(some, torch.arange(n_heads, device=some.device))
        source, heads = pairs[:, 0], pairs[:, 1]
        entering = {layer: (source, change(layer, source, heads)) for layer in layers}
        found = start.sweep(entering, readout.site, readout.layer) if layers else torch.empty(0)
        for layer, part in zip(layers, found.split(len(source))):
            yield layer, source, heads, part


def _removed(side: Any, z: Tensor, rest: Tensor | None, source: Tensor, heads: Tensor) -> Any:
    """A function that takes attention outputs [B, T, d] to those of rows `source` without `heads`."""
    lost = z if rest is None else z - rest
    lost = lost[source, :, heads]  # [R, T, head_dim]
    weight = side.weight.unflatten(1, (z.shape[2], z.shape[3]))[:, heads].permute(1, 2, 0)
    return lambda attention: attention[source] - torch.bmm(lost, weight.to(lost.dtype))


def _other_rows(batch: int, seed: int) -> Tensor:
    """A permutation of the rows without fixed points."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(order)
    out[order] = order.roll(1)
    return out


def _row_groups(start: Checkpoint, n_heads: int, rows: int) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """(source row, head) of every pass, with the inputs made once and used at every layer."""
    device = start.resid_pre[0].device
    pairs = torch.cartesian_prod(torch.arange(start.batch), torch.arange(n_heads)).to(device)
    return [(p[:, 0], p[:, 1], start.rows(p[:, 0])) for p in pairs.split(max(1, rows))]


def attribution(model: Any, inputs: Mapping[str, Any], readout: Readout, *, baseline: Tensor | None = None) -> Tensor:
    """[B, L, heads, E] first-order estimate of `total_effects` for all heads at once, from E backward passes.

    Gradient of the readout at z, times z less the baseline [L, heads, head_dim] (zero when None), all positions; NaN
    above the readout.
    """
    return gradients.attribution(model, inputs, readout, {"z": baseline})["z"]


@torch.no_grad()
def attended_tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], heads: Sequence[tuple[int, int]], *, top: int = 8
) -> dict[tuple[int, int], list[tuple[str, float]]]:
    """What heads read: for each (layer, head) the tokens its last position attends to, with their mean attention.

    Attention to a token is summed within a text and averaged over texts, so that shares add up to 1 over all tokens.
    Raises InputError for a head that does not exist.
    """
    anatomy = resolve(model)
    for layer, head in heads:
        if not (0 <= layer < anatomy.n_layers and 0 <= head < anatomy.n_heads):
            raise InputError(f"head {head} of layer {layer} does not exist; the model has {anatomy.n_heads} heads in"
                             f" {anatomy.n_layers} layers")  # fmt: skip
    shares: dict[tuple[int, int], dict[str, float]] = {head: {} for head in heads}
    for text in texts:
        ids = encode_prompt(tokenizer, text)
        patterns = capture(model, torch.tensor([ids]), "pattern", sorted({layer for layer, _ in heads}))
        for (layer, head), found in shares.items():
            for token, weight in zip(ids, patterns["pattern", layer][0, head, -1].tolist()):
                name = tokenizer.decode([token])
                found[name] = found.get(name, 0.0) + weight / len(texts)
    return {head: sorted(found.items(), key=lambda pair: -pair[1])[:top] for head, found in shares.items()}
