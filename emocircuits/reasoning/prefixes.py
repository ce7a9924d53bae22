"""Many texts with a common beginning: what was read once is kept, and a prefix of it costs a slice of its cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..serving.batch import Decoder, repeated

SLICED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
"""Kinds of cache layer that hold keys and values per token, or nothing; others are recurrent and cannot be cut."""
SEAM = 16
"""A text that leaves the kept one by fewer tokens is that text cut elsewhere, not another one."""


@dataclass(frozen=True)
class Read:
    """A text that was read: its tokens, the next logits [vocabulary], and its cache of one row."""

    ids: tuple[int, ...]
    logits: Tensor
    cache: Any


class Prefixes:
    """Reads token sequences one after the other and computes only what the longest kept one does not hold.

    A tokenizer may merge across the place where a text is cut; then reading goes back to the last common token. Caches
    that can be cut keep every token here, also those that a sliding window would evict; recurrent states can only be
    extended, so going back starts again. `computed` counts the tokens that passed through the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._config = decoder, decoder.module.config
        self._sliced = {type(layer).__name__ for layer in DynamicCache(config=self._config).layers} <= SLICED
        self._kept: Read | None = None
        self.computed = 0

    def read(self, ids: Sequence[int], *, keep: bool = True) -> Read:
        """Read a sequence of at least one token; with `keep`, later ones may continue it."""
        ids = tuple(ids)
        if self._kept is not None and self._kept.ids == ids:
            return self._kept
        common = self._common(ids)
        new = torch.tensor([ids[common:]], device=self._decoder.device)
        seen = torch.ones(1, len(ids), dtype=torch.long, device=self._decoder.device)
        logits, cache = self._decoder(new, seen, self._cut(common))
        self.computed += len(ids) - common
        found = Read(ids, logits[0], cache)
        if keep and (self._kept is None or len(ids) > len(self._kept.ids) or len(ids) - common > SEAM):
            self._kept = found
        return found

    def rows(self, read: Read, n: int) -> Any:
        """A cache of `n` rows that all hold the text read; the text's own stays as it is."""
        if self._sliced:
            return repeated(read.cache, n, len(read.ids), self._config)
        cache = copy.deepcopy(read.cache)
        cache.reorder_cache(torch.zeros(n, dtype=torch.long, device=self._decoder.device))
        return cache

    def _common(self, ids: tuple[int, ...]) -> int:
        """Tokens of `ids` that need no reading; the last one always does, for its logits."""
        kept = self._kept.ids if self._kept else ()
        common = next((i for i, (a, b) in enumerate(zip(kept, ids)) if a != b), min(len(kept), len(ids)))
        return min(common, len(ids) - 1) if self._sliced else common * (common == len(kept) < len(ids))

    def _cut(self, length: int) -> Any:
        """A cache of the first `length` kept tokens, free to grow."""
        if not self._sliced:
            return copy.deepcopy(self._kept.cache) if self._kept and length else None
        cache = DynamicCache()  # without a config no layer evicts, so that any length can be cut from it
        for i, layer in enumerate(self._kept.cache.layers if self._kept and length else ()):
            if layer.is_initialized:
                cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], i)
        return cache
