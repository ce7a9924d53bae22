"""Token ids of a trace and where its steps lie among them."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .traces import Trace


def trace_tokens(tokenizer: Any, trace: Trace, tail: str = "") -> tuple[list[int], tuple[int, ...]]:
    """Ids [T] of prompt + steps + tail, and the n + 1 token positions that bound the steps.

    A token over the end of a step belongs to the step of its last character. Raises InputError for a tokenizer that
    does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer does not give character offsets; load the fast one (use_fast=True)")
    encoded = tokenizer(trace.prompt + trace.steps.text + tail, return_offsets_mapping=True)
    return list(encoded["input_ids"]), trace.steps.token_bounds(encoded["offset_mapping"], len(trace.prompt))
