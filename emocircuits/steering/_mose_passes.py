"""Which experts each token of the pass in progress belongs to, and what is set for them, for one wrapped model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.forward import Forward, ForwardTracker, outside_compiled
from ..errors import HookError
from ..models.anatomy import Anatomy
from ..models.spans import LiveSpans, ModalitySpans


@dataclass(frozen=True)
class Pass:
    """One forward pass. index: (modality number, [n] its tokens among all rows * columns); absent ones are left out."""

    n_tokens: int
    index: tuple[tuple[int, Tensor], ...]
    balances: list[Tensor] | None = None
    """Where layers put their balance loss, None when nobody will add it to a loss."""


class _Now(local):
    current: Pass | None = None
    balances: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Now:  # noqa: ARG002
        return _Now()


class _Replay:
    """Puts a pass back while gradient checkpointing recomputes a part of it; can be entered again."""

    def __init__(self, now: _Now, done: Pass | None) -> None:
        self.now, self.done = now, done
        self.outer: list[Pass | None] = []

    def __enter__(self) -> None:
        self.outer.append(self.now.current)
        self.now.current = self.done

    def __exit__(self, *_: object) -> None:
        self.now.current = self.outer.pop()


@dataclass
class Live:
    """State of one wrapped model, shared by its layers; what belongs to a pass is kept for each thread."""

    modalities: tuple[str, ...]
    tokens: Mapping[str, int]
    given: ModalitySpans | None = None
    """Spans of the prompt given by hand, instead of the placeholders in its ids."""
    off: bool = False
    clamped: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(layer, modality) -> [E] weights that replace the gate."""
    factors: dict[tuple[int, int], float] = field(default_factory=dict)
    """(layer, modality) -> factor of omega."""
    usage: dict[tuple[int, str], dict[str, Tensor]] | None = None
    """(layer, module) -> modality -> [E] mean gates, filled while somebody reads them."""
    now: _Now = field(default_factory=_Now)
    _handles: list[Any] = field(default_factory=list)

    def install(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Follow every pass of this model until `remove()`."""
        tracker, decoder = ForwardTracker(model, anatomy), model.get_submodule(anatomy.decoder)

        @outside_compiled
        def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            forward = tracker.current
            if forward is None:
                raise HookError("the decoder ran in a thread that is not followed, so its tokens are unknown")
            device = next(t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            self.now.current = self._pass(forward, device)

        @outside_compiled
        def leave(*_: Any) -> None:
            self.now.current = None

        self._handles = [
            *tracker.install(),
            decoder.register_forward_pre_hook(enter, with_kwargs=True),
            decoder.register_forward_hook(leave, always_call=True),
        ]

    def remove(self) -> None:
        """Stop following; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _pass(self, forward: Forward, device: torch.device) -> Pass:
        spans = LiveSpans(self.tokens, self.given)
        labels, index = spans.of_pass(forward, device).flatten(), []
        for number, name in enumerate(self.modalities):
            places = (labels == spans.names.index(name)).nonzero().flatten() if name in spans.names else labels[:0]
            index += [(number, places)] if len(places) else []
        return Pass(len(labels), tuple(index), self.now.balances)

    def current(self) -> Pass:
        """The pass in progress; raises HookError outside one."""
        if self.now.current is None:
            raise HookError(
                "a MoSE layer ran outside the decoder's forward pass, so the modality of its tokens is unknown; train"
                " through the MoSE model itself, not through the model inside it"
            )
        return self.now.current

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """The balance losses of the layers in the passes of the block."""
        outer, self.now.balances = self.now.balances, []
        try:
            yield self.now.balances
        finally:
            self.now.balances = outer

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """torch.utils.checkpoint's `context_fn`: when a layer is computed again, later passes may have run."""
        return nullcontext(), _Replay(self.now, self.now.current)
