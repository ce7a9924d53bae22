"""Attention a few queries at a time: the T x T matrix of a layer's heads is read without ever being there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError
from ..models.anatomy import resolve, unwrap
from .attention import Call, Proceed, around_attention, probabilities
from .capture import _quiet, _StopForward, moved
from .sites import expand_layers

CELLS = 2**22
"""Scores held at once, over all heads of a layer."""
BLOCK = 256
"""Queries that one call of a kernel computes in `in_blocks`."""
KERNELS = ("sdpa", "eager")


def attention_layers(model: Any, layers: int | str | Iterable[int] | None = None) -> list[int]:
    """The layers whose attention can be read and masked: of those asked for, or all that have softmax attention.

    Raises HookError for models without any, for a layer without, and for kernels that hide their mask (flash, flex);
    InputError for a model in training mode, whose attention is random.
    """
    module, anatomy = unwrap(model), resolve(model)
    if module.training:
        raise InputError("the model is in training mode, where dropout changes attention; call model.eval() first")
    everywhere = layers is None or layers == "all"
    wanted = expand_layers(layers, anatomy.n_layers)
    wanted = [layer for layer in wanted if anatomy.attention[layer]] if everywhere else wanted
    if not wanted:
        raise HookError(f"this {anatomy.family} model has no softmax attention, so there is nothing to read or mask")
    for layer in wanted:
        if not anatomy.attention[layer]:
            raise HookError(f"layer {layer} of this {anatomy.family} model has no softmax attention; leave it out")
        config = getattr(module.get_submodule(anatomy.attention[layer]), "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if kernel is not None and not kernel.endswith(KERNELS):
            raise HookError(f"attention under {kernel!r} hides its mask; load with attn_implementation='sdpa'")
    return wanted


def read_attention(model: Any, ids: Tensor, look: Callable[[Call], None], layers: Iterable[int] | None = None) -> None:
    """Call look(call) at the attention of each wanted layer in one pass over ids [B, T] without padding.

    The model's own kernel computes every output, so the pass is as without us, and it ends at the last attention looked
    at: nothing behind it runs, least of all the LM head. Raises as `attention_layers` does, and HookError for a model
    that does not go through transformers' attention interface.
    """
    module, anatomy = unwrap(model), resolve(model)
    wanted = attention_layers(module, layers)
    left = set(wanted)

    def handler(call: Call, proceed: Proceed) -> Any:
        look(call)
        left.discard(call.layer)
        if not left:
            raise _StopForward
        return proceed(call)

    with torch.no_grad(), around_attention(module, anatomy, dict.fromkeys(wanted, handler)), suppress(_StopForward):
        run(module, ids)
    if left:
        raise HookError(f"the attention of layer {min(left)} never ran during the forward pass; nothing was read there")


def run(module: nn.Module, ids: Tensor, **more: Any) -> Any:
    """One pass over ids [B, T] in which every token is real, also one that happens to be the padding token."""
    batch = moved(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})
    return module(**batch, **_quiet(module, batch))


def visible(call: Call) -> Tensor:
    """[B or 1, 1 or heads, Q, K] True where a query sees a key; without a mask, the last query sees every key."""
    q_len, k_len, device = call.query.shape[2], call.key.shape[2], call.query.device
    if call.mask is not None:
        mask = call.mask[..., :k_len]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if not call.causal:
        return torch.ones(1, 1, q_len, k_len, dtype=torch.bool, device=device)
    rows = torch.arange(k_len - q_len, k_len, device=device)
    return (torch.arange(k_len, device=device) <= rows[:, None])[None, None]


def some_queries(call: Call, start: int, stop: int) -> tuple[Call, slice]:
    """The call of queries start..stop-1, and the range of keys that any of them sees: the others are cut off."""
    if call.mask is None and call.causal:
        before = call.key.shape[2] - call.query.shape[2]
        keys = slice(0, before + stop)
        rows = torch.arange(before + start, before + stop, device=call.query.device)
        mask: Tensor | None = (torch.arange(keys.stop, device=rows.device) <= rows[:, None])[None, None]
    else:
        mask = None if call.mask is None else call.mask[..., start:stop, : call.key.shape[2]]
        seen = visible(replace(call, query=call.query[:, :, start:stop], mask=mask)).flatten(0, 2).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, call.key.shape[2])
        mask = None if mask is None else mask[..., keys]
    return replace(
        call, query=call.query[:, :, start:stop], key=call.key[:, :, keys], value=call.value[:, :, keys], mask=mask,
        kwargs={**call.kwargs, "scaling": call.scaling, "is_causal": False},
    ), keys  # fmt: skip


def in_blocks(call: Call, proceed: Proceed) -> Any:
    """What the kernel returns, computed for a block of queries at a time on the keys that these see.

    A kernel that is given a mask computes every score, also where the mask hides it: half of them for a causal text,
    and nearly all of a long one with a sliding window.
    """
    length = call.query.shape[2]
    if length <= BLOCK:
        return proceed(call)
    blocks = (some_queries(call, start, min(start + BLOCK, length))[0] for start in range(0, length, BLOCK))
    return torch.cat([proceed(block)[0] for block in blocks], dim=1), None


def by_queries(call: Call, start: int, stop: int) -> Iterator[tuple[slice, slice, Call, Tensor]]:
    """(queries, keys, their call, probabilities [B, n_heads, q, k]) for queries start..stop-1, a few at a time.

    Keys outside the range have probability 0. About `CELLS` scores exist at once.
    """
    call = replace(call, key=call.key.float())  # once, not for every few queries
    size = max(1, CELLS // (call.query.shape[0] * call.query.shape[1] * call.key.shape[2]))
    for first in range(start, stop, size):
        queries = slice(first, min(first + size, stop))
        part, keys = some_queries(call, queries.start, queries.stop)
        yield queries, keys, part, probabilities(part)
