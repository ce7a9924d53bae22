"""Attention that is not allowed: hide keys from queries in any model, through the mask its own kernel reads.

Geva et al. 2023 (arXiv 2304.14767) cut such edges to see where information flows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.anatomy import resolve, unwrap
from .attention import Call, Proceed, around_attention
from .rows import attention_layers, visible

Span = tuple[int, int]
"""Token positions (start, stop)."""


def hide(call: Call, hidden: Tensor) -> Call:
    """The call in which queries do not see keys where `hidden` [B or 1, 1 or heads, Q or 1, K] is True.

    A query that would see no key at all keeps itself: a softmax over nothing is undefined, and the kernels' way out
    would be to attend to everything, the future included.
    """
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    seen = visible(call)
    left = seen & ~hidden
    keys, queries = (torch.arange(n, device=left.device) for n in (k_len, q_len))
    left = left | (~left.any(-1, keepdim=True) & (keys == queries[:, None] + k_len - q_len))
    lowest = torch.finfo(call.query.dtype).min
    if call.mask is None or call.mask.dtype == torch.bool:
        added = torch.zeros((), dtype=call.query.dtype, device=left.device)
    else:
        added = call.mask[..., :k_len]  # with whatever else it holds, such as ALiBi
    return replace(call, mask=torch.where(left, added, lowest))


@contextmanager
def knockout(
    model: Any,
    edges: Sequence[tuple[Span, Span]],
    layers: int | str | Iterable[int] | None = None,
) -> Iterator[None]:
    """Cut attention from queries to keys, edges ((query start, stop), (key start, stop)), in every pass in the block.

    Positions are columns of the whole sequence, also with a KV cache, the same for every row; a stop beyond the end
    means up to the end. layers: where, by default everywhere. Raises InputError for a span that is empty and HookError
    as `attention_layers` does.
    """
    for span in (s for edge in edges for s in edge):
        if not 0 <= span[0] < span[1]:
            raise InputError(f"a span of token positions must be (start, stop) with 0 <= start < stop, not {span}")
    module = unwrap(model)

    def handler(call: Call, proceed: Proceed) -> Any:
        k_len, q_len = call.key.shape[2], call.query.shape[2]
        hidden = torch.zeros(q_len, k_len, dtype=torch.bool, device=call.query.device)
        for (a, b), (c, d) in edges:
            before = k_len - q_len
            hidden[max(a - before, 0) : max(b - before, 0), c:d] = True
        return proceed(hide(call, hidden[None, None]) if bool(hidden.any()) else call)

    with around_attention(module, resolve(module), dict.fromkeys(attention_layers(module, layers), handler)):
        yield
