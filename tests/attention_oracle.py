"""Attention written out without the library: its own masks from first principles, the matrices kept, keys hidden."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

Hidden = Callable[[int, int], Tensor]
"""(layer, T) -> [T, T] True where a query must not see a key."""
NAME = "explicit_oracle"


def explicit(model: Any, ids: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, list[Tensor]]:
    """(logits [T, V], attention [L][H, T, T]) of a text [1, T]; a query without any key keeps itself.

    In float64, but for experts, which torch multiplies in float32 only.
    """
    model, kept = copy.deepcopy(model), {}
    if not any("experts" in name for name, _ in model.named_modules()):
        model.double()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:  # noqa: ARG001
        length, groups = query.shape[2], query.shape[1] // key.shape[1]
        rows, columns = torch.arange(length)[:, None], torch.arange(length)
        seen = (columns <= rows) & (rows - columns < (kw.get("sliding_window") or length))
        if hidden is not None:
            seen &= ~hidden(module.layer_idx, length)
        seen |= ~seen.any(1, keepdim=True) & (rows == columns)
        out = torch.zeros_like(query)
        weights = torch.zeros(*query.shape[:3], length, dtype=query.dtype)
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head // groups].mT * kw["scaling"]
            if cap := kw.get("softcap"):
                scores = cap * torch.tanh(scores / cap)
            weights[:, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[:, head] = weights[:, head] @ value[:, head // groups]
        kept[module.layer_idx] = weights[0]
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation_internal = NAME
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits, [kept[layer] for layer in sorted(kept)]


class Largest(TorchDispatchMode):
    """How many numbers the largest floating tensor holds that is made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [x.numel() for x in made if isinstance(x, Tensor) and x.is_floating_point()]
        self.numel = max(self.numel, *sizes, 0)
        return result
