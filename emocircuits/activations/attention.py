"""A function of ours around the attention of chosen layers, without switching the model to another implementation.

transformers calls one registered function with q, k, v of every layer. Inside `around_attention` a function of
ours stands there: it hands the call to the handlers of that layer, and the innermost one is the model's own kernel. So
a handler that only looks leaves the pass bit-identical, and layers and towers without a handler run as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError
from ..models.anatomy import Anatomy

PREFIX = "emocircuits_around_"


@dataclass(frozen=True)
class Call:
    """One attention call of a layer: query [B, n_heads, Q, D], key and value [B, n_kv_heads, K, D], and its mask.

    mask: None (causal, or a lone query that sees every key), bool (True is seen) or added to the scores, [B, 1, Q, K].
    """

    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """What q k^T is multiplied with."""
        given = self.kwargs.get("scaling")
        return float(given) if given is not None else self.query.shape[-1] ** -0.5

    @property
    def causal(self) -> bool:
        """Whether, without a mask, query i sees keys up to i only."""
        given = self.kwargs.get("is_causal")
        return self.mask is None and self.query.shape[2] > 1 and bool(
            getattr(self.module, "is_causal", True) if given is None else given
        )  # fmt: skip

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values [B, n_kv_heads, K, D] as every head sees them, [B, n_heads, K, D]."""
        return x.repeat_interleave(self.query.shape[1] // x.shape[1], dim=1)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, n_heads, Q, D] as [B, n_kv_heads, G * Q, D], G being the heads that share a key/value head.

        So that keys and values need not be repeated, which would copy the whole cache.
        """
        return x.reshape(len(x), self.key.shape[1], -1, x.shape[-1])

    def attended(self, p: Tensor) -> Tensor:
        """Output [B, Q, n_heads, D] for probabilities [B, n_heads, Q, K]."""
        out = self.grouped(p.to(self.value.dtype)) @ self.value
        return out.reshape(*p.shape[:3], -1).transpose(1, 2)

    def bias(self) -> Tensor | None:
        """The mask as a float32 tensor that is added to the scores, [B or 1, 1, Q, K] (or None)."""
        q_len, k_len = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            if not self.causal:
                return None
            columns = torch.arange(k_len, device=self.query.device)
            hidden = columns > torch.arange(q_len, device=self.query.device)[:, None]
            return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, _lowest())[None, None]
        mask = self.mask[..., :k_len]
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, _lowest())
        return mask.float()


def _lowest() -> float:
    return torch.finfo(torch.float32).min


Proceed = Callable[[Call], Any]
Handler = Callable[[Call, Proceed], Any]
"""(call, proceed) -> what the kernel returns: (output [B, Q, n_heads, D], weights or None)."""
_HANDLERS: dict[int, list[tuple[int, Handler]]] = {}
"""id of an attention module -> (its layer, handler), innermost first."""


@contextmanager
def around_attention(model: nn.Module, anatomy: Anatomy, handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Put a handler around the attention of each layer in `handlers` for every forward pass in the block.

    Blocks may nest and end in any order; afterwards the model has its own implementation back. Raises HookError for
    layers without attention and for models that do not go through transformers' attention interface.
    """
    for layer in handlers:
        if not anatomy.attention[layer]:
            anatomy.point("pattern", layer)  # raises with the reason
    modules = [model.get_submodule(path) for path in anatomy.attention if path]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c}
    if not configs or not all(hasattr(config, "_attn_implementation") for config in configs.values()):
        raise HookError("attention is not reached: the model has no attention interface of transformers")
    with ExitStack() as stack:
        for config in configs.values():
            stack.enter_context(_standing_in(config))
        for layer, handler in handlers.items():
            key, entry = id(model.get_submodule(anatomy.attention[layer])), (layer, handler)
            _HANDLERS.setdefault(key, []).append(entry)
            stack.callback(_forget, key, entry)
        yield


_STANDING: dict[int, tuple[int, str]] = {}
"""id of a config -> (how many blocks have it, the implementation it had)."""


@contextmanager
def _standing_in(config: Any) -> Iterator[None]:
    """Our function as the config's attention implementation, until the last block that needs it ends."""
    count, original = _STANDING.get(id(config), (0, config._attn_implementation))
    _STANDING[id(config)] = (count + 1, original)
    config._attn_implementation_internal = _registered(original)
    try:
        yield
    finally:
        count, original = _STANDING.pop(id(config))
        if count > 1:
            _STANDING[id(config)] = (count - 1, original)
        else:
            config._attn_implementation_internal = original


def _forget(key: int, entry: tuple[int, Handler]) -> None:
    _HANDLERS[key].remove(entry)
    if not _HANDLERS[key]:
        del _HANDLERS[key]


def _registered(original: str) -> str:
    """Name of the attention function that asks the handlers and ends in what `original` does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Parameters have the names by which some models pass them.
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(module))

        proceed: Proceed = lambda c: stock(module, c.query, c.key, c.value, c.mask, **c.kwargs)  # noqa: E731
        for layer, handler in _HANDLERS.get(id(module), ()):
            proceed = _inside(handler, layer, proceed)
        return proceed(Call(-1, module, query, key, value, attention_mask, kwargs))

    # Both tables, or transformers silently drops the padding mask.
    AttentionInterface.register(PREFIX + original, forward)
    AttentionMaskInterface.register(PREFIX + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return PREFIX + original


def _inside(handler: Handler, layer: int, proceed: Proceed) -> Proceed:
    def handled(call: Call) -> Any:
        return handler(replace(call, layer=layer), proceed)

    return handled


def _eager_of(module: nn.Module) -> Any:
    """The eager attention function of the module's own file."""
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def probabilities(call: Call, boost: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """softmax(q k^T * scaling) under the call's mask, [B, n_heads, Q, K], in float32; `boost` changes the scores first.

    With attention sinks (`s_aux`), which take their share of each row, rows sum to less than one.
    """
    scores = call.grouped(call.query.float()) @ call.key.float().mT * call.scaling
    scores = scores.reshape(*call.query.shape[:3], -1)
    if softcap := call.kwargs.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if boost is None else boost(scores)
    bias = call.bias()
    scores = scores if bias is None else scores + bias
    sinks = call.kwargs.get("s_aux")
    if sinks is not None:
        sinks = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def one_query(call: Call, rows: Tensor) -> Call:
    """The call of one query of each text only, rows [B], as the mask shows it its keys."""
    index, keys = rows[:, None, None, None], torch.arange(call.key.shape[2], device=rows.device)
    query = call.query.gather(2, index.expand(-1, call.query.shape[1], 1, call.query.shape[-1]))
    mask = call.mask
    if mask is not None:
        mask = mask[..., : len(keys)].expand(len(rows), -1, -1, -1)
        mask = mask.gather(2, index.expand(-1, 1, 1, len(keys)))
    elif call.causal:
        mask = (keys <= rows[:, None])[:, None, None]
    return replace(call, query=query, mask=mask, kwargs={**call.kwargs, "scaling": call.scaling})
