"""Hooks and torch.compile: make dynamo notice hooks that come and go.

Dynamo does not guard on module hooks by default: a hook added after the first call of a compiled model is silently
ignored, and one present at compile time outlives its removal. While hooks are attached to a compiled model we
turn these guards on, and drop code that was compiled without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def is_compiled(model: Any) -> bool:
    """Whether calls of this model run through torch.compile (wrapped, compiled in place, its forward, or generate)."""
    if hasattr(model, "_orig_mod"):
        return True
    if not isinstance(model, nn.Module):
        return False
    own = vars(model)
    # `_compiled_call` is what generate() makes for itself when the cache is static.
    if "_compiled_call" in own or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
        return True
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


class _Guards:
    """Dynamo's guards on hooks, on while anyone needs them; blocks may end in any order."""

    def __init__(self) -> None:
        self.users = 0
        self._stack = ExitStack()

    def enter(self) -> None:
        import torch

        torch._dynamo.reset()
        if self.users == 0:
            self._stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))
        self.users += 1

    def leave(self) -> None:
        import torch

        self.users -= 1
        if self.users == 0:
            self._stack.close()
        torch._dynamo.reset()


_GUARDS = _Guards()


@contextmanager
def hooks_under_compile(*models: Any) -> Iterator[None]:
    """Inside the block, hooks on a compiled model fire; after it, none of their traces remains. No-op otherwise.

    Give the model in every form that may be called: generate() compiles the plain module behind a wrapper.
    """
    guarded = any(map(is_compiled, models))
    if guarded:
        _GUARDS.enter()
    try:
        yield
    finally:
        if guarded:
            _GUARDS.leave()
        elif any(map(is_compiled, models)):  # compiled inside the block, with our hooks in the code
            import torch

            torch._dynamo.reset()
