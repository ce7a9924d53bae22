"""Attention probabilities of chosen layers, read while the model's own kernel computes the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.anatomy import Anatomy
from .attention import Call, Proceed, around_attention, probabilities

Watcher = Callable[[int, Tensor], None]


@contextmanager
def watch_patterns(model: nn.Module, anatomy: Anatomy, layers: list[int], keep: Watcher) -> Iterator[None]:
    """Call keep(layer, probabilities [B, n_heads, Q, K]) for each wanted layer of every forward in the block.

    Raises HookError for models that do not go through transformers' attention interface.
    """

    def look(call: Call, proceed: Proceed) -> Any:
        keep(call.layer, probabilities(call))
        return proceed(call)

    with around_attention(model, anatomy, dict.fromkeys(layers, look)):
        yield
