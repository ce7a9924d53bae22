"""Attention with other weights on regions of keys, from the model's own kernel and without an attention matrix.

Regions are disjoint sets of keys, [B, R, K] bool. Three ways, all exact (the derivations are in docs/modality.md):

- weights that do not depend on attention are a bias log w on the keys, an extra feature of q and k (`biased`);
- the mass of a region is the attention output of its indicator, so extra features of v read all masses in the same pass
  (`with_masses`), and a region's output is attention over its keys alone (`reweighted`);
- few queries, as in decoding, are computed row by row (`on_rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Call, Proceed, one_query

MULTIPLE = 8
"""Kernels want head sizes that are multiples of this."""
HIDDEN = -1e30
"""Added to the scores of keys that a query does not see; finite, so that a row without any has no NaN."""


def _padded(call: Call, *, query: Tensor | None = None, key: Tensor | None = None, value: Tensor | None = None) -> Call:
    """The call with extra features [B, heads, n, extra] on q, k and v, zeros elsewhere: the same head size for all."""
    extra = max(x.shape[-1] for x in (query, key, value) if x is not None)
    sizes = {"query": call.query.shape[-1], "key": call.key.shape[-1], "value": call.value.shape[-1]}
    width = -(-(max(sizes.values()) + extra) // MULTIPLE) * MULTIPLE
    made = {}
    for name, more in (("query", query), ("key", key), ("value", value)):
        x = getattr(call, name)
        parts = [x] if more is None else [x, more.to(x.dtype).expand(*x.shape[:-1], -1)]
        made[name] = F.pad(torch.cat(parts, dim=-1), (0, width - sum(p.shape[-1] for p in parts)))
    return replace(call, **made, kwargs={**call.kwargs, "scaling": call.scaling})


def biased(call: Call, proceed: Proceed, log_weights: Tensor, gate: Tensor) -> Any:
    """Multiply attention to keys by exp(log_weights) [B, K] and renormalise, where gate [B or 1, H, Q] is 1.

    softmax(s + log w) = w p / sum(w p). In half precision log w is split over two features, so that it is not rounded.
    """
    if call.kwargs.get("softcap"):
        raise ValueError("a bias would be capped with the scores")
    high = log_weights.to(call.query.dtype)
    parts = [high] if high.dtype == torch.float32 else [high, (log_weights - high.float()).to(high.dtype)]
    key = torch.stack(parts, dim=-1)[:, None]
    query = (gate / call.scaling)[..., None].expand(-1, -1, -1, len(parts))
    size = call.value.shape[-1]
    output, *rest = proceed(_padded(call, query=query, key=key))
    return (output[..., :size], *rest)


def with_masses(call: Call, proceed: Proceed, regions: Tensor) -> tuple[Any, Tensor]:
    """What the kernel returns, and the attention mass of each region, [B, H, Q, R]."""
    indicators = regions.mT[:, None]  # [B, 1, K, R]
    size = call.value.shape[-1]
    output, *rest = proceed(_padded(call, value=indicators))
    masses = output[..., size : size + regions.shape[1]].transpose(1, 2).float()
    return (output[..., :size], *rest), masses


def reweighted(call: Call, output: Tensor, masses: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
    """The output [B, Q, H, D] with each region's attention times weights [B, H, Q, R], renormalised.

    (o + sum (w - 1) M_S o_S) / (1 + sum (w - 1) M_S), where o_S attends to the region alone.
    """
    change = (weights - 1) * masses  # [B, H, Q, R]
    total, norm = output.transpose(1, 2).float(), 1 + change.sum(-1, keepdim=True)
    for r in range(regions.shape[1]):
        touched = change[..., r].flatten(0, 1).any(0).nonzero()
        if len(touched):
            first = int(touched[0])  # earlier queries need no work
            added = change[:, :, first:, r, None] * _alone(call, regions[:, r], first)
            total = torch.cat([total[:, :, :first], total[:, :, first:] + added], dim=2)
    return (total / norm).to(output.dtype).transpose(1, 2)


def _alone(call: Call, region: Tensor, first: int) -> Tensor:
    """[B, H, Q - first, D] attention of the later queries to one region [B, K] alone; arbitrary where none is seen."""
    size, query = int(region.sum(-1).max()), call.query[:, :, first:]
    order = region.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :size]  # [B, size]
    real = region.gather(1, order)
    index = order[:, None, :, None]
    key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[-1])) for x in (call.key, call.value))
    hidden = ~real[:, None, None]
    if call.causal:
        columns = torch.arange(first, call.query.shape[2], device=order.device)
        hidden = hidden | (order[:, None, None] > columns[:, None])
    bias = torch.zeros(hidden.shape, device=order.device).masked_fill(hidden, HIDDEN)
    if call.mask is not None:
        seen = call.mask[:, :, first:].expand(len(order), -1, -1, -1)
        seen = seen.gather(3, order[:, None, None].expand(-1, seen.shape[1], seen.shape[2], -1))
        bias = bias.masked_fill(~seen, HIDDEN) if seen.dtype == torch.bool else (bias + seen).clamp_min(HIDDEN)
    key, value = call.repeated(key), call.repeated(value)
    if softcap := call.kwargs.get("softcap"):
        scores = softcap * torch.tanh(query.float() @ key.float().mT * call.scaling / softcap)
        return (scores + bias).softmax(-1) @ value.float()
    bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=call.scaling).float()


Rows = Callable[[Call], Tensor]
"""A call of a few queries -> their attention probabilities [B, H, n, K]."""


def on_rows(call: Call, result: Any, rows: Tensor, probabilities: Rows) -> Any:
    """The kernel's result, with attention of our own at one query of each text, `rows` [B]."""
    output, *rest = result
    changed = call.attended(probabilities(one_query(call, rows)))  # [B, 1, H, D]
    index = rows[:, None, None, None].expand(-1, 1, *output.shape[2:])
    return (output.scatter(1, index, changed.to(output.dtype)), *rest)
