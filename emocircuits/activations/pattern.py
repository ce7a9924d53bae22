"""Attention probabilities without switching the model to eager attention.

transformers calls one registered function with q, k, v of every layer. While patterns are watched, a
function of ours stands there: it recomputes the probabilities of the wanted layers and delegates the output to
the model's own kernel, so the forward pass itself is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError
from ..models.anatomy import Anatomy

PREFIX = "emocircuits_watch_"
Watcher = Callable[[int, Tensor], None]
_WATCHERS: dict[int, list[tuple[int, Watcher]]] = {}
"""id of an attention module -> (its layer, who wants its probabilities), while they are watched."""


@contextmanager
def watch_patterns(model: nn.Module, anatomy: Anatomy, layers: list[int], keep: Watcher) -> Iterator[None]:
    """Call keep(layer, probabilities [B, n_heads, Q, K]) for each wanted layer of every forward in the block.

    Raises HookError for models that do not go through transformers' attention interface.
    """
    for layer in layers:
        if not anatomy.attention[layer]:
            anatomy.point("pattern", layer)  # raises with the reason
    modules = [model.get_submodule(path) for path in anatomy.attention if path]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c}
    if not configs or not all(hasattr(config, "_attn_implementation") for config in configs.values()):
        raise HookError("attention patterns need a transformers model with an attention interface; read 'q' and 'k'")
    with ExitStack() as stack:
        for config in configs.values():
            original = config._attn_implementation
            stack.callback(setattr, config, "_attn_implementation_internal", original)
            config._attn_implementation_internal = _registered(original)
        for layer in layers:
            key, entry = id(model.get_submodule(anatomy.attention[layer])), (layer, keep)
            _WATCHERS.setdefault(key, []).append(entry)
            stack.callback(_forget, key, entry)
        yield


def _forget(key: int, entry: tuple[int, Watcher]) -> None:
    _WATCHERS[key].remove(entry)
    if not _WATCHERS[key]:
        del _WATCHERS[key]


def _registered(original: str) -> str:
    """Name of the attention function that tells the watchers and then does what `original` does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original.startswith(PREFIX):  # a watch inside a watch
        return original

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if id(module) in _WATCHERS:
            weights = probabilities(module, query, key, attention_mask, **kwargs)
            for layer, keep in list(_WATCHERS[id(module)]):
                keep(layer, weights)
        delegate = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(module))
        return delegate(module, query, key, value, attention_mask, **kwargs)

    # Both tables, or transformers silently drops the padding mask.
    AttentionInterface.register(PREFIX + original, forward)
    AttentionMaskInterface.register(PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return PREFIX + original


def _eager_of(module: nn.Module) -> Any:
    """The eager attention function of the module's own file."""
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """softmax(q k^T * scaling) under the given mask, [B, n_heads, Q, K], in float32.

    `s_aux` [n_heads] are attention sinks: they take their share of each row, so that it sums to less than one.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query.float() @ key.float().mT) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q_len, k_len = scores.shape[-2:]
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and q_len > 1:  # a lone query sees every key; longer ones start at column 0
            keep = torch.ones(q_len, k_len, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~keep, -torch.inf)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., :k_len], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[..., :k_len]
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)
