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

NAME = "emocircuits_watch"
Watcher = Callable[[int, Tensor], None]


@contextmanager
def watch_patterns(model: nn.Module, anatomy: Anatomy, layers: list[int], keep: Watcher) -> Iterator[None]:
    """Call keep(layer, probabilities [B, n_heads, Q, K]) for each wanted layer of every forward in the block.

    Raises HookError for models that do not go through transformers' attention interface.
    """
    modules = {id(model.get_submodule(anatomy.attention[layer])): layer for layer in layers}
    configs = {id(c): c for c in (getattr(m, "config", None) for m in map(model.get_submodule, anatomy.attention)) if c}
    if not configs or not all(hasattr(config, "_attn_implementation") for config in configs.values()):
        raise HookError("attention patterns need a transformers model with an attention interface; read 'q' and 'k'")
    with ExitStack() as stack:
        for config in configs.values():
            original = config._attn_implementation
            name = _register(f"{NAME}_{id(model)}", original, modules, keep)
            stack.callback(setattr, config, "_attn_implementation_internal", original)
            config._attn_implementation_internal = name
        yield


def _register(name: str, original: str, modules: dict[int, int], keep: Watcher) -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if id(module) in modules:
            keep(modules[id(module)], probabilities(module, query, key, attention_mask, **kwargs))
        delegate = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(module))
        return delegate(module, query, key, value, attention_mask, **kwargs)

    # Both tables, or transformers silently drops the padding mask.
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


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
    **_: Any,
) -> Tensor:
    """softmax(q k^T * scaling) under the given mask, [B, n_heads, Q, K], in float32."""
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
    return scores.softmax(-1)
