"""Whose edits are these? Two threads that steer one model must not mix silently."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..errors import HookError


@dataclass(frozen=True, eq=False)
class _Claim:
    owner: tuple[int, int]
    """Thread, and asyncio task where there is one: tasks of one thread take turns in the middle of a block."""
    own_passes: bool
    lasting: bool

    def bears(self, other: _Claim) -> bool:
        """Whether edits of another owner may be on the model, too."""
        if self.own_passes:
            return other.own_passes or other.lasting
        return self.lasting and (other.own_passes or other.lasting)


_LOCK = threading.Lock()
_HELD: weakref.WeakKeyDictionary[nn.Module, list[_Claim]] = weakref.WeakKeyDictionary()


@contextmanager
def holding(module: nn.Module, own_passes: bool, lasting: bool) -> Iterator[None]:
    """Claim a model for edits by the caller; raises HookError while another thread's or task's edits would mix in.

    Edits normally act on every pass of the model, whoever runs it (a streamer runs generate() in a thread of its own),
    so two owners may only share a model when both keep to their own passes, or when edits are `lasting` (installed for
    everybody) and the other's are not for everybody.
    """
    mine = _Claim(_owner(), own_passes, lasting)
    with _LOCK:
        others = [claim for claim in _HELD.get(module, []) if claim.owner != mine.owner]
        if not all(mine.bears(claim) for claim in others):
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


def _owner() -> tuple[int, int]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), id(task) if task is not None else 0
