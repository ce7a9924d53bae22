"""Only the layers above a place, at one token of each text: its next-token logits as a function of the residual there.

What is learned at one token changes that token alone, and only above its layer. So every text is read once; then its
token runs through the upper layers alone, as the model's own code, attending to the keys and values kept of the tokens
before it. Differentiable in the residual.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError
from ..models.anatomy import resolve, unwrap
from ..reading import pad
from .capture import capture
from .restart import _handing_on, _keep, _returning
from .sites import Key, expand_layers

SITES = ("resid_pre", "resid_post")


@dataclass(frozen=True)
class UpperLayers:
    """N chosen tokens of texts that were read once, and the layers above `key` to run them through again.

    residual: [N, d_model] at `key` as the model computed it, on its device. text: [N] which of the texts a token is of;
    position: [N] its place there. One pair of keys and values [heads, T, head_dim] is kept per text and upper layer.
    """

    key: Key
    residual: Tensor
    text: Tensor
    position: Tensor
    _module: nn.Module = field(repr=False)
    _tokens: Tensor = field(repr=False)
    _forms: list[int | None] = field(repr=False)  # what each lower block returns, see `restart`
    _cache: list[dict[int, tuple[Tensor, Tensor]]] = field(repr=False)  # of each upper layer, by text

    @classmethod
    def read(
        cls, model: Any, key: Key, texts: Sequence[Sequence[int]], at: Sequence[Sequence[int]], batch_size: int = 8
    ) -> UpperLayers:
        """Read texts (token ids) and keep what their tokens `at` (positions, per text) need later.

        Raises InputError for a place that is not the stream between two blocks, no tokens, a position a text does not
        have, or a model in training mode; HookError for models without a cache of keys and values in every upper layer.
        """
        module, start = unwrap(model), check_stream(model, key)
        if len(texts) != len(at) or not any(at):
            raise InputError("there is no token to run through the upper layers; give at least one position of a text")
        for i, (ids, places) in enumerate(zip(texts, at)):
            if any(not 0 <= p < len(ids) for p in places):
                raise InputError(f"text {i} has {len(ids)} tokens, and position {max(places)} is none of them")
        forms: list[int | None] = []
        cache: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(resolve(module).n_layers - start)]
        used = [i for i, places in enumerate(at) if places]
        rows = []
        for first in range(0, len(used), batch_size):
            index = used[first : first + batch_size]
            found, kept = _read(module, key, [texts[i] for i in index], [at[i] for i in index], start, forms)
            rows += found
            for layer, pairs in zip(cache, kept):
                layer.update(zip(index, pairs))
        where = [(i, p, texts[i][p]) for i in used for p in at[i]]
        text, position, tokens = torch.tensor(where, device=rows[0].device).unbind(1)
        return cls(key, torch.cat(rows), text, position, module, tokens, forms, cache)

    def __len__(self) -> int:
        return len(self.residual)

    def logits(self, which: Tensor, residual: Tensor) -> Tensor:
        """[B, vocabulary] after tokens `which` [B] (of N) when the stream at `key` holds `residual` [B, d_model] there.

        What the whole model would say with that one token edited. Gradients flow to `residual`.
        """
        which = which.to(self.residual.device)
        anatomy, width = resolve(self._module), int(self.position[which].max())
        past = torch.arange(width, device=which.device) >= width - self.position[which, None]
        inputs = {
            "input_ids": self._tokens[which, None],
            "attention_mask": torch.cat([past, torch.ones_like(past[:, :1])], 1).long()
            if width else torch.ones(len(which), 1, dtype=torch.long, device=which.device),
            "past_key_values": self._prefix(which, width),
            "use_cache": True,
        }  # fmt: skip
        if "position_ids" in inspect.signature(type(self._module).forward).parameters:
            inputs["position_ids"] = self.position[which, None]
        given = residual.to(self.residual.dtype)[:, None]
        with ExitStack() as stack:
            for i, form in enumerate(self._forms):
                block = self._module.get_submodule(anatomy.blocks[i])
                stack.enter_context(_handing_on(block, form) if i else _returning(block, form, given))
            return self._module(**inputs).logits[:, -1]

    def _prefix(self, which: Tensor, width: int) -> Any:
        """Keys and values before each token, aligned at their ends, so that distances are those of the text."""
        from transformers import DynamicCache

        texts, ends = self.text[which].tolist(), self.position[which].tolist()
        cache = DynamicCache()
        none = torch.empty(0)
        cache.layers = [_before(none, none, width) for _ in self._forms]
        for pairs in self._cache:
            keys, values = (
                _aligned([pairs[t][side][:, :p] for t, p in zip(texts, ends)], width) for side in (0, 1)
            )  # fmt: skip
            cache.layers.append(_before(keys, values, width))
        return cache


def check_stream(model: Any, key: Key) -> int:
    """How many blocks lie below `key`, a place between two blocks; raises as `UpperLayers.read` does."""
    module, anatomy = unwrap(model), resolve(model)
    site, layer = key
    if site not in SITES or layer < 0 or key == ("resid_pre", 0):
        raise InputError(
            f"the upper layers start between two blocks, not at {site} {layer}; choose resid_post of a layer from 0 on"
        )
    expand_layers([layer], anatomy.n_layers)
    anatomy.point(site, layer)
    if module.training:
        raise InputError("the model is in training mode, where dropout makes its logits random; call model.eval()")
    start = layer + (site == "resid_post")
    if anatomy.lm_head is None or not hasattr(module, "generation_config"):
        raise HookError("logits of the upper layers need a transformers model with an LM head")
    if not all(anatomy.attention[start:]):
        raise HookError(f"an upper layer of this {anatomy.family} model has no attention whose keys could be kept")
    return start


def _read(
    module: nn.Module, key: Key, texts: Sequence[Sequence[int]], at: Sequence[Sequence[int]], start: int,
    forms: list[int | None],
) -> tuple[list[Tensor], list[list[tuple[Tensor, Tensor]]]]:  # fmt: skip
    """Residuals of each text's tokens, and keys and values [upper layers][texts], from one pass over a padded batch."""
    from transformers import DynamicCache

    anatomy, cache = resolve(module), DynamicCache()
    ids, mask = pad(texts, "right", 0)
    most = max(map(len, at))
    columns = torch.tensor([[*places, *[places[-1]] * (most - len(places))] for places in at])
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    with ExitStack() as stack:
        for i in range(start if not forms else 0):
            hook = module.get_submodule(anatomy.blocks[i]).register_forward_hook(_keep(forms, None))
            stack.callback(hook.remove)
        keys = list(dict.fromkeys([key, ("resid_post", anatomy.n_layers - 1)]))  # the last: all keys are there
        found = capture(module, inputs, keys, positions=columns)[key]
    layers: list[Any] = list(cache.layers)[start:]
    if len(layers) < anatomy.n_layers - start or not all(getattr(x, "keys", None) is not None for x in layers):
        raise HookError(f"this {anatomy.family} model does not keep keys and values of its own in every upper layer")
    pairs = [[(x.keys[i, :, : len(t)], x.values[i, :, : len(t)]) for i, t in enumerate(texts)] for x in layers]
    return [row[: len(places)].detach() for row, places in zip(found, at)], pairs


def _aligned(parts: Sequence[Tensor], width: int) -> Tensor:
    """[B, heads, width, head_dim] of parts [heads, t, head_dim], each at the end of its row."""
    return torch.stack([nn.functional.pad(x, (0, 0, width - x.shape[1], 0)) for x in parts])


def _before(keys: Tensor, values: Tensor, length: int) -> Any:
    """A cache layer of what came before one token: that token is seen, and never kept."""
    from transformers.cache_utils import DynamicLayer

    class Before(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)  # type: ignore

        def get_seq_length(self, *_: Any) -> int:
            return length

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return length + query_length, 0

    layer = Before()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
