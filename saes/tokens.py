"""Where the steps of a trace lie among the model's tokens, and reading the model there."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from emocircuits.activations import capture
from emocircuits.activations.sites import Key
from emocircuits.errors import InputError, unknown
from emocircuits.models.anatomy import text_config, unwrap
from emocircuits.reading import pad
from emocircuits.reasoning.tokens import with_offsets
from emocircuits.reasoning.traces import Steps, Trace

REDUCTIONS = ("closing", "mean", "all")
Splitter = Callable[[str], Steps]


def paragraphs(text: str) -> Steps:
    """Steps that end with the blank lines after them, as RISE cuts them; indentation belongs to the next step."""
    if not text.strip():
        raise InputError("a text to read is empty; leave it out")
    cuts = [m.end() for m in re.finditer(r"(?<=\S)[^\S\n]*\n(?:[^\S\n]*\n)+(?=[^\S\n]*\S)", text)]
    return Steps(text, (0, *cuts, len(text)))


def place_steps(
    model: Any, tokenizer: Any, traces: Iterable[Trace | str], reduce: str, split: Splitter = paragraphs
) -> list[StepTokens]:
    """The tokens of each trace or plain text; those without a step to read are left out.

    Raises InputError before any forward pass: for an unknown reduction, nothing to read, two traces of one id, or a
    trace longer than the model's context.
    """
    if reduce not in REDUCTIONS:
        raise unknown("reduction", reduce, REDUCTIONS)
    given = [Trace("", split(t)) if isinstance(t, str) else t for t in traces]
    placed = [_placed(tokenizer, trace, trace.id or str(i), reduce) for i, trace in enumerate(given)]
    placed = [one for one in placed if one.records]
    _check(model, placed)
    return placed


@dataclass(frozen=True)
class StepTokens:
    """A trace's tokens up to its last step's end, what to read of them, and a record for each of those rows."""

    trace: str
    ids: list[int]
    read: list[tuple[int, int]]  # token spans that are averaged, of one token each for "closing" and "all"
    records: list[dict[str, Any]]


def _placed(tokenizer: Any, trace: Trace, name: str, reduce: str) -> StepTokens:
    """The model's input is tokenised whole, so that the tokens of the last step are those that the model saw."""
    ids, offsets = with_offsets(tokenizer, trace.prompt + trace.steps.text + trace.ending)
    start = len(trace.prompt)
    bounds = trace.steps.token_bounds(offsets, start)
    closing = closing_tokens(offsets, [start + bound for bound in trace.steps.bounds[1:]])
    spans, records, n = [], [], len(trace)
    for step, (first, stop) in enumerate(pairwise(bounds)):
        if reduce == "closing":
            own = [(closing[step], closing[step] + 1)]
        else:
            own = [(first, stop)] if reduce == "mean" else [(t, t + 1) for t in range(first, stop)]
        about = {
            "trace": name,
            "step": step,
            "n_steps": n,
            "relative": step / (n - 1) if n > 1 else 0.0,
            "tokens": stop - first,
            "label": trace.labels[step] if trace.labels else None,
            "text": trace.steps.texts[step],
        }
        own = [(a, b) for a, b in own if a < b]
        spans += own
        text = trace.prompt + trace.steps.text
        records += [{**about, "token": b - 1} | _piece(text, offsets[a], reduce) for a, b in own]
    end = max((b for _, b in spans), default=0)
    return StepTokens(name, ids[:end], spans, records)


def _piece(text: str, span: tuple[int, int], reduce: str) -> dict[str, str]:
    """The text of the token, where every token has a row of its own."""
    return {"piece": text[span[0] : span[1]]} if reduce == "all" else {}


def closing_tokens(offsets: Sequence[tuple[int, int]], bounds: Sequence[int]) -> list[int]:
    """The tokens that hold the character before each bound: the last ones, empty ones apart, that begin before it."""
    places = [(start, i) for i, (start, end) in enumerate(offsets) if start < end]
    return [places[max(bisect_left(places, (bound,)) - 1, 0)][1] for bound in bounds]


def _check(model: Any, items: Sequence[StepTokens]) -> None:
    if not items:
        raise InputError("there are no steps to read: give traces or texts")
    names = [item.trace for item in items]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two traces are called {twice!r}; give each its own id, for traces are held out by it")
    config: Any = getattr(unwrap(model), "config", None)
    limit = getattr(text_config(config), "max_position_embeddings", None) if config is not None else None
    for item in items:
        if limit and len(item.ids) > limit:
            raise InputError(f"trace {item.trace!r} has {len(item.ids)} tokens, and this model reads {limit}; cut it")


def read_steps(model: Any, tokenizer: Any, batch: Sequence[StepTokens], keys: Sequence[Key]) -> dict[Key, Tensor]:
    """{key: [rows, d]} of a batch, rows in the order of its records."""
    ids, mask = pad([item.ids for item in batch], "right", tokenizer.pad_token_id or 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    most = max(len(item.read) for item in batch)
    real = torch.tensor([[slot < len(item.read) for slot in range(most)] for item in batch])
    if all(b - a == 1 for item in batch for a, b in item.read):
        padded = [[a for a, _ in item.read] + [0] * (most - len(item.read)) for item in batch]
        found = capture(model, inputs, keys, positions=torch.tensor(padded))
    else:
        found = capture(model, inputs, keys, positions=[item.read for item in batch], reduce="mean")
    return {key: found[key].flatten(2)[real.to(found[key].device)] for key in keys}
