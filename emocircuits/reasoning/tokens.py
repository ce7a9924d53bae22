"""Steps and phrases as token positions: found in a text, checked, averaged over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, unknown
from .traces import Trace

Span = tuple[int, int]
"""Token positions (start, stop)."""
ALIGN = ("predict", "compat")
"""Rows of a token: the one that predicts it (the position before), or its own, as some published code has it."""


def trace_tokens(tokenizer: Any, trace: Trace, tail: str = "") -> tuple[list[int], tuple[int, ...]]:
    """Ids [T] of prompt + steps + tail, and the n + 1 token positions that bound the steps.

    A token over the end of a step belongs to the step of its last character. Raises InputError for a tokenizer that
    does not tell where its tokens stand.
    """
    ids, offsets = with_offsets(tokenizer, trace.prompt + trace.steps.text + tail)
    return ids, trace.steps.token_bounds(offsets, len(trace.prompt))


def with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Ids [T] of a text, and the character span of each; raises InputError for a tokenizer that does not tell."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer does not give character offsets; load the fast one (use_fast=True)")
    encoded = tokenizer(text, return_offsets_mapping=True)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def one_text(ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids of one text as [1, T]; raises InputError for anything else."""
    tokens = torch.as_tensor(ids)
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.dim() != 2 or len(tokens) != 1 or tokens.is_floating_point():
        raise InputError(f"token ids must be those of one text, [T] or [1, T]; these have shape {list(tokens.shape)}")
    return tokens


def checked(ids: Tensor | Sequence[int], bounds: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids [1, T] and n + 1 step bounds that fit them, n >= 2; raises InputError where they do not."""
    tokens, found = one_text(ids), tuple(int(b) for b in bounds)
    if len(found) < 3:
        raise InputError(
            f"{max(len(found) - 1, 0)} step(s) were given; steps act on one another, so at least 2 are needed, as n + 1"
            " bounds"
        )
    if found[0] < 0 or found[-1] > tokens.shape[1] or any(a > b for a, b in zip(found, found[1:])):
        raise InputError(
            f"step bounds must rise within the text's {tokens.shape[1]} tokens, but go from {min(found)} to"
            f" {max(found)}: take them from the same tokens (Steps.token_bounds)"
        )
    if found[0] == found[-1]:
        raise InputError("no step has a token; take the bounds from the tokens of this text (Steps.token_bounds)")
    return tokens, found


def shift_of(align: str) -> int:
    """How many positions before a token its row is; raises InputError for an unknown alignment."""
    if align not in ALIGN:
        raise unknown("alignment", align, ALIGN)
    return int(align == "predict")


def step_means(spans: Sequence[Span], length: int) -> Tensor:
    """[length, n] weights that average over the tokens of each span; all 0 for a span without tokens."""
    weights = torch.zeros(length, len(spans))
    for step, (start, stop) in enumerate(spans):
        weights[max(start, 0) : max(stop, 0), step] = 1 / max(stop - start, 1)
    return weights


def far(n: int, min_distance: int) -> Tensor:
    """[n, n] True where row i is at least `min_distance` steps after column j."""
    if min_distance < 1:
        raise InputError(f"min_distance must be at least 1, not {min_distance}: a step does not look back to itself")
    return torch.ones(n, n, dtype=torch.bool).tril(-min_distance)


def token_spans(text: str, phrases: Sequence[str], offsets: Sequence[Span]) -> list[Span]:
    """Token positions of phrases of a text: the tokens that hold any of their characters.

    offsets: character spans of the text's tokens (special tokens: empty). Raises InputError for a phrase that is not in
    the text, or is there more than once: which one is meant must be said by hand.
    """
    found = []
    for phrase in phrases:
        count = text.count(phrase) if phrase else 0
        if count != 1:
            raise InputError(
                f"the phrase {phrase!r} is in the text {count} times; give one that is there once, or its tokens"
            )
        start = text.index(phrase)
        inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < start + len(phrase) and b > start]
        if not inside:
            raise InputError(f"no token covers the phrase {phrase!r}; are the offsets those of this text?")
        found.append((inside[0], inside[-1] + 1))
    return found
