"""Hooks and torch.compile: make dynamo notice hooks that come and go.

Dynamo does not guard on module hooks by default: a hook added after the first call of a compiled model is silently
ignored, and one present at compile time outlives its removal. While hooks are attached to a compiled model we
turn these guards on, and drop code that was compiled without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_compiled(model: Any) -> bool:
    """Whether calls of this model run through torch.compile (wrapped, compiled in place, or its forward)."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return True
    if isinstance(model, nn.Module):
        return hasattr(vars(model).get("forward"), "_torchdynamo_orig_callable") or any(
            getattr(child, "_compiled_call_impl", None) is not None for child in model.modules()
        )
    return False


@contextmanager
def hooks_under_compile(model: Any, reset: bool = True) -> Iterator[None]:
    """Inside the block, hooks on a compiled model fire; after it, none of their traces remains. No-op otherwise."""
    if not is_compiled(model):
        yield
        return
    import torch

    if reset:
        torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            yield
    finally:
        if reset:
            torch._dynamo.reset()
