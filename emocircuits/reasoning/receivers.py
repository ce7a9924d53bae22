"""Receiver heads: which heads narrow their attention on few steps, and which steps they look back to.

Block means of attention between steps, vertical scores, kurtosis over steps, and their reliability, as in Thought
Anchors (arXiv 2506.19143), with two things mended: the last token counts, and a step without tokens is NaN, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations.attention import Call
from ..activations.rows import by_queries, read_attention
from ..errors import InputError, unknown
from ..models.anatomy import resolve, unwrap
from .tokens import checked, far, step_means

Head = tuple[int, int]
"""(layer, head)."""


def attention_blocks(model: Any, ids: Tensor | Sequence[int], bounds: Sequence[int]) -> Tensor:
    """[L, H, n, n] mean attention from the tokens of step i to those of step j, from one pass over ids [T] or [1, T].

    bounds: n + 1 token positions (`Steps.token_bounds`). A mean, not a sum: long steps do not count for more. Reduced
    inside the attention call a few queries at a time, so no T x T matrix exists; the model's own kernel computes the
    pass, and neither the LM head nor the tokens after the last step run. NaN for steps without tokens, whole layers of
    a hybrid model without softmax attention, and blocks above the diagonal are 0 (nothing looks ahead). Raises
    InputError for bounds that do not fit the ids, HookError as `read_attention` does.
    """
    tokens, bounds = checked(ids, bounds)
    module, anatomy = unwrap(model), resolve(model)
    start, stop = bounds[0], bounds[-1]
    n = len(bounds) - 1
    blocks = torch.full((anatomy.n_layers, anatomy.n_heads, n, n), torch.nan)
    weights = step_means(list(zip(bounds, bounds[1:])), stop)

    def look(call: Call) -> None:
        columns = weights.to(call.query.device)
        total = torch.zeros(call.query.shape[1], n, n, device=columns.device)
        for queries, keys, _, p in by_queries(call, start, stop):
            total += columns[queries].T @ (p[0] @ columns[keys])
        blocks[call.layer] = total.cpu()

    read_attention(module, tokens[:, :stop], look)
    empty = torch.tensor([a == b for a, b in zip(bounds, bounds[1:])])
    return blocks.masked_fill(empty | empty[:, None], torch.nan)


# ---------------------------------------------------------------- from blocks to scores


def vertical_scores(blocks: Tensor, min_distance: int = 4, rank: bool = False, reduce: str = "mean") -> Tensor:
    """[L, H, n] how much the steps at least `min_distance` later look back to step j; NaN where there is none.

    blocks: [L, H, n, n]. rank: first replace each row's entries by their rank among those far enough back, divided by
    their number (ties share the mean rank), which takes out that late steps have more to look at. reduce: "mean" or
    "median" over the later steps.
    """
    if reduce not in ("mean", "median"):
        raise unknown("reduction", reduce, ("mean", "median"))
    later = far(blocks.shape[-1], min_distance).to(blocks.device)
    rows = blocks.double().masked_fill(~later, torch.nan)
    rows = _ranked(rows) if rank else rows
    return rows.nanmean(-2) if reduce == "mean" else rows.nanquantile(0.5, dim=-2)


def _ranked(rows: Tensor) -> Tensor:
    """Mean rank of each entry of the last dimension among those that are not NaN, divided by their number."""
    valid = ~rows.isnan()
    ordered = rows.masked_fill(~valid, torch.inf).sort(-1).values.contiguous()
    values = rows.nan_to_num(torch.inf).contiguous()
    low = torch.searchsorted(ordered, values, right=False)
    high = torch.searchsorted(ordered, values, right=True)
    return ((low + high + 1).double() / 2 / valid.sum(-1, keepdim=True)).masked_fill(~valid, torch.nan)


def kurtosis(scores: Tensor) -> Tensor:
    """[L, H] excess kurtosis over steps of scores [L, H, n]: Fisher's, biased, NaN left out.

    NaN where fewer than two scores exist or all are equal, for then there is no shape to speak of.
    """
    x = scores.double()
    mean = x.nanmean(-1, keepdim=True)
    squared = (x - mean) ** 2
    second, fourth = squared.nanmean(-1), (squared**2).nanmean(-1)
    flat = second <= (torch.finfo(torch.float64).eps * mean[..., 0]) ** 2
    return (fourth / second**2 - 3).masked_fill(flat, torch.nan)


def receiver_heads(maps: Sequence[Tensor] | Tensor, k: int = 20, skip_layers: int = 1) -> list[Head]:
    """The k heads of greatest kurtosis on average over traces, greatest first; the first layers are left out.

    maps: kurtosis [L, H] of each trace; a trace in which a head's is undefined does not count for it. Raises InputError
    when fewer than k heads have one.
    """
    mean = mean_map(maps, skip_layers)
    defined = int((~mean.isnan()).sum())
    if not 1 <= k <= defined:
        raise InputError(f"{k} receiver heads were asked for, but {defined} heads have a kurtosis; ask for fewer")
    order = mean.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)[:k]
    return [divmod(int(i), mean.shape[1]) for i in order]


def mean_map(maps: Sequence[Tensor] | Tensor, skip_layers: int = 0) -> Tensor:
    """[L, H] kurtosis averaged over traces, NaN in the first `skip_layers` layers."""
    if not len(maps):
        raise InputError("no kurtosis map was given; compute one per trace first")
    mean = torch.stack(list(maps)).double().nanmean(0)
    mean[:skip_layers] = torch.nan
    return mean


def receiver_scores(scores: Tensor, heads: Sequence[Head]) -> Tensor:
    """[n] mean over the given heads of vertical scores [L, H, n]: how much each step is looked back to."""
    if not heads:
        raise InputError("no receiver head was given; take them from receiver_heads")
    return torch.stack([scores[layer, head] for layer, head in heads]).nanmean(0)


def split_half(maps: Sequence[Tensor] | Tensor, *, splits: int = 100, skip_layers: int = 1, seed: int = 0) -> Tensor:
    """[splits] Pearson correlation over heads between mean kurtosis maps of two random halves of the traces.

    With an odd number of traces one is left out each time. NaN where a half does not vary. Raises InputError for fewer
    than two traces.
    """
    if len(maps) < 2:
        raise InputError(f"reliability needs at least two traces, and {len(maps)} was given")
    stacked, half = torch.stack(list(maps)), len(maps) // 2
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(splits):
        order = torch.randperm(len(maps), generator=generator)
        pair = [mean_map(stacked[part], skip_layers).flatten() for part in (order[:half], order[half : 2 * half])]
        found.append(pearson(*pair))
    return torch.tensor(found, dtype=torch.float64)


def agreement(scores: Tensor, heads: Sequence[Head], skip_layers: int = 1) -> tuple[float, float]:
    """Mean pairwise correlation over steps of the given heads' vertical scores [L, H, n], and of all heads' beside it.

    Receiver heads should agree on which steps to look back to. NaN for fewer than two heads or steps that vary.
    """
    everyone = scores[skip_layers:].flatten(0, 1)
    return _pairwise(torch.stack([scores[head] for head in heads])), _pairwise(everyone[~everyone.isnan().all(1)])


def _pairwise(rows: Tensor) -> float:
    x = rows[:, ~rows.isnan().any(0)].double()
    x = x - x.mean(1, keepdim=True) if x.shape[1] else x
    x = torch.nn.functional.normalize(x[x.norm(dim=1) > 0], dim=1)
    n = len(x)
    return float((x.sum(0) ** 2).sum() - n) / (n * (n - 1)) if n > 1 else float("nan")


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors where both are defined; NaN for fewer than two values or without variation."""
    both = ~(a.isnan() | b.isnan())
    x, y = a[both].double(), b[both].double()
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else float("nan")
