"""A batch that rows join and leave between two tokens: left-padded rows over one key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from ..models.anatomy import unwrap
from ..steering.steerer import Steerer

ACTING = {"prompt": ("all", "prompt", "last"), "generated": ("all", "generated", "last")}
"""Positions policies that act on a pass over prompts, and on a pass over one generated token per row."""


class Row(Protocol):
    """What the batch needs to know of a request."""

    @property
    def ids(self) -> list[int]:
        """The prompt's tokens."""
        ...

    token: int
    """The newest token, not yet read by the model."""
    steerer: Steerer | None


def in_phase(steerer: Steerer | None, phase: str) -> Steerer | None:
    """The part of a steerer that acts in a phase, for passes that hold nothing but that phase.

    The batch knows which tokens were generated, also when rows of many ages share it; hooks could only guess.
    """
    if steerer is None:
        return None
    acting = [t for t in steerer.terms if t.positions in ACTING[phase]]
    on_last = "last" if phase == "prompt" else "all"
    return replace(
        steerer, terms=tuple(replace(t, positions=on_last if t.positions == "last" else "all") for t in acting)
    )


class Decoder:
    """One pass over new tokens of left-padded rows: the next logits, and the cache that holds them too."""

    def __init__(self, model: Any) -> None:
        """Raises InputError for a model whose forward is not that of a transformers decoder."""
        self.module: Any = unwrap(model)
        self._takes = set(inspect.signature(type(self.module).forward).parameters)
        if not {"input_ids", "attention_mask", "past_key_values"} <= self._takes:
            raise InputError(f"{type(self.module).__name__} has no forward of a transformers decoder, so no server")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def __call__(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, vocabulary] after tokens [B, n]; mask [B, columns of the cache + n], 1 on real tokens."""
        n = tokens.shape[1]
        given = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -n:], "logits_to_keep": 1}
        out = self.module(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{k: v for k, v in given.items() if k in self._takes},
        )
        return out.logits[:, -1], out.past_key_values


class Batch:
    """Rows in generation. `join` reads prompts, `step` reads each row's newest token, `keep` drops the others.

    The model carries hooks only while steered rows are here, and none after `clear`.
    """

    def __init__(self, model: Any, pad_id: int = 0) -> None:
        self._forward = Decoder(model)
        self.module: Any = self._forward.module
        self._pad, self._device = pad_id, self._forward.device
        self._steering: ExitStack | None = None
        self.rows: list[Any] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        """[B, columns of the cache] 1 on real tokens."""

    @property
    def can_join(self) -> bool:
        """Whether rows may be added now: always to an empty batch, else where caches can be padded (not recurrent)."""
        return not self.rows or all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in self._cache.layers)

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Read the prompts of new rows and add them; their next logits [n, vocabulary]. On an error none is added."""
        self._detach()
        width = max(len(r.ids) for r in rows)
        tokens = torch.tensor([[self._pad] * (width - len(r.ids)) + r.ids for r in rows], device=self._device)
        mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rows], device=self._device)
        with ExitStack() as stack:
            self._attach(stack, rows, "prompt")
            logits, cache = self._forward(tokens, mask, None)
        self.admit(rows, cache, mask)
        return logits

    def admit(self, rows: Sequence[Row], cache: Any, mask: Tensor) -> None:
        """Add rows whose prompts were read already: their cache, and mask [n, columns]. On an error none is added."""
        self._detach()
        if self.rows:
            length = max(mask.shape[1], self._mask.shape[1])
            _join_caches(self._cache, cache, length)
            self._mask = torch.cat([_columns(self._mask, length), _columns(mask, length)])
        else:
            self._cache, self._mask = cache, mask
        self.rows += rows

    def step(self) -> Tensor:
        """Read every row's newest token; the next logits [B, vocabulary]."""
        if self._steering is None:
            self._steering = ExitStack()
            self._attach(self._steering, self.rows, "generated")
        tokens = torch.tensor([[row.token] for row in self.rows], device=self._device)
        mask = pad(self._mask, (0, 1), value=1)
        logits, self._cache = self._forward(tokens, mask, self._cache)
        self._mask = mask
        return logits

    def keep(self, rows: Sequence[Row]) -> None:
        """Drop all rows but these, and columns that are padding everywhere then."""
        kept = [i for i, row in enumerate(self.rows) if any(row is other for other in rows)]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        self._detach()
        index = torch.tensor(kept, device=self._device)
        self._cache.reorder_cache(index)
        self.rows, self._mask = [self.rows[i] for i in kept], self._mask[index]
        length = int(self._mask.sum(-1).max())
        if self.can_join and length < self._mask.shape[1]:
            for layer in self._cache.layers:
                _set_layer(layer, _fitted(layer, length), length)
            self._mask = _columns(self._mask, length)

    def clear(self) -> None:
        """Drop everything and leave no hook on the model."""
        self._detach()
        self.rows, self._cache = [], None

    def _attach(self, stack: ExitStack, rows: Sequence[Row], phase: str) -> None:
        parts = [in_phase(row.steerer, phase) for row in rows]
        if any(p is not None and p.terms for p in parts):
            # Always one vector per row and always hooks, so that a row's arithmetic does not depend on its neighbours.
            steerer = Steerer.rows(parts)
            stack.enter_context(steerer.attach(self.module, compile_to="hook", strict=False))

    def _detach(self) -> None:
        steering, self._steering = self._steering, None
        if steering is not None:
            steering.close()


def repeated(cache: Any, n: int, length: int, config: Any) -> Any:
    """`n` rows of a one-row cache of `length` tokens that evicted nothing; what windows no longer reach is left out."""
    rows = DynamicCache(config=config)
    for i, source in enumerate(cache.layers):
        if source.is_initialized:  # else it uses another one's keys
            layer: Any = rows.layers[i]
            columns = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            layer.update(*(_columns(x, columns, -2).expand(n, -1, -1, -1) for x in (source.keys, source.values)))
            _set_layer(layer, (layer.keys, layer.values), length)
    return rows


def _join_caches(running: Any, new: Any, length: int) -> None:
    """Add the rows of `new` to `running`, both left-padded to `length` columns; nothing changes on an error."""
    merged = [
        tuple(map(torch.cat, zip(_fitted(a, length), _fitted(b, length))))
        for a, b in zip(running.layers, new.layers, strict=True)
    ]
    for layer, held in zip(running.layers, merged):
        _set_layer(layer, held, length)


def _fitted(layer: Any, length: int) -> tuple[Tensor, ...]:
    """Keys and values [B, heads, columns, d] as a layer holds them for sequences of `length`; () where it is empty."""
    if not layer.is_initialized or layer.keys.numel() == 0:  # a layer that uses another one's keys
        return ()
    columns = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    return _columns(layer.keys, columns, -2), _columns(layer.values, columns, -2)


def _set_layer(layer: Any, held: tuple[Tensor, ...], length: int) -> None:
    if held:
        layer.keys, layer.values = held
        if layer.is_sliding:
            layer.cumulative_length = length


def _columns(x: Tensor, columns: int, dim: int = -1) -> Tensor:
    """The last `columns` of x along `dim` (-1 or -2), zeros before them where there are fewer."""
    missing = columns - x.shape[dim]
    if missing < 0:
        return x.narrow(dim, -missing, columns)
    return pad(x, (missing, 0) if dim == -1 else (0, 0, missing, 0))
