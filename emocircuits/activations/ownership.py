"""Whose edits are these? Two threads that steer one model must not mix silently."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import HookError

_LOCK = threading.Lock()
_HELD: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, bool]]] = weakref.WeakKeyDictionary()


@contextmanager
def holding(module: nn.Module, this_thread: bool) -> Iterator[None]:
    """Claim a model for edits by the calling thread; raises HookError while another thread's edits would mix in.

    Edits normally act on every pass of the model, whoever runs it (a streamer runs generate() in a thread of its own),
    so two threads may only both hold a model when both keep to their own passes.
    """
    mine = (threading.get_ident(), this_thread)
    with _LOCK:
        others = [own for thread, own in _HELD.get(module, []) if thread != mine[0]]
        if others and not (this_thread and all(others)):
            raise HookError(
                "another thread is editing this model, and its edits would mix with yours; give this_thread=True to"
                " attach() in both threads, or put the requests in one batch with Steerer.rows"
            )
        _HELD.setdefault(module, []).append(mine)
    try:
        yield
    finally:
        with _LOCK:
            _HELD[module].remove(mine)
