"""One vector per reasoning step, from every wanted layer in one pass over each trace, into a store on disk.

RISE (arXiv 2512.23988) reads the token that closes a step. Each row's record says which step it is, where it stands,
how long it is and what it is about, so that controls for position and length need no second look at the text.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from emocircuits import artefact
from emocircuits.activations import batches, capture, expand_sites
from emocircuits.activations.sites import Key, SiteRequest
from emocircuits.activations.store import ActivationStore
from emocircuits.errors import InputError, unknown
from emocircuits.models.anatomy import resolve, text_config, unwrap
from emocircuits.models.fingerprint import check_fits, fingerprint
from emocircuits.reading import pad
from emocircuits.reasoning.traces import Steps, Trace

from .vectors import Scaling

REDUCTIONS = ("closing", "mean", "all")
SCALINGS = "scalings.safetensors"
Splitter = Callable[[str], Steps]


def paragraphs(text: str) -> Steps:
    """Steps that end with the blank lines after them, as RISE cuts them; indentation belongs to the next step."""
    if not text.strip():
        raise InputError("a text to read is empty; leave it out")
    cuts = [m.end() for m in re.finditer(r"(?<=\S)[^\S\n]*\n(?:[^\S\n]*\n)+(?=[^\S\n]*\S)", text)]
    return Steps(text, (0, *cuts, len(text)))


def collect(
    model: Any,
    tokenizer: Any,
    traces: Iterable[Trace | str],
    path: str | Path,
    *,
    layers: int | str | Iterable[int] | None = None,
    sites: SiteRequest = "resid_post",
    reduce: str = "closing",
    split: Splitter = paragraphs,
    batch_size: int = 8,
    dtype: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ActivationStore:
    """Read the steps of traces (or of plain texts, cut by `split`) and return the store of their vectors [rows, d].

    reduce: "closing" (the token with the last character of the step's delimiter), "mean" over the step's tokens, or
    "all" of them, a row each. A step without a token of its own has a closing token, but no mean. Rows are in order of
    length, not of the traces; records hold trace, step, n_steps, relative (step's place from 0 to 1), token (place in
    the model's input), tokens (the step's length), label and text. The model runs as far as the last wanted layer.
    `scalings` reads the centre and scale of every layer. Raises InputError for texts that do not fit the model, and
    with `resume` unless model, traces and settings are those of the store.
    """
    if reduce not in REDUCTIONS:
        raise unknown("reduction", reduce, REDUCTIONS)
    given = [Trace("", split(t)) if isinstance(t, str) else t for t in traces]
    items = [_item(tokenizer, trace, trace.id or str(i), reduce) for i, trace in enumerate(given)]
    items = [item for item in items if item.records]
    keys = expand_sites(sites, layers, resolve(model))
    _check(model, items, path, resume)
    header = {
        "kind": "steps",
        "model": fingerprint(unwrap(model)),
        "reduce": reduce,
        "traces": hashlib.sha256(json.dumps([[t.prompt, t.steps.text, t.ending] for t in given]).encode()).hexdigest(),
    }
    plan = batches(len(items), [len(item.ids) for item in items], batch_size)
    bar = progress.add_task("reading steps", total=len(plan)) if progress is not None else None
    with ActivationStore.create(path, keys, dtype, header=header, resume=resume) as store:
        done = store.n_committed
        for index in plan:
            batch = [items[i] for i in index]
            records = [record for item in batch for record in item.records]
            if done < len(records):
                found = _read(model, tokenizer, batch, keys)
                store.append({key: rows[done:] for key, rows in found.items()}, records[done:])
            done = max(done - len(records), 0)
            if progress is not None and bar is not None:
                progress.advance(bar)
    store = ActivationStore.open(path)
    _write_scalings(store)
    return store


def scalings(store: ActivationStore) -> dict[Key, Scaling]:
    """Centre [d] and factor of each place in a store of steps: mean zero, mean norm sqrt(d).

    The factor is NaN where all vectors are the same, as those of one delimiter are before the first layer.
    """
    tensors, header = artefact.load(store.path / SCALINGS, "step_scalings")
    return {key: Scaling(tensors[_name(key)], header["factors"][_name(key)]) for key in store.keys}


def _write_scalings(store: ActivationStore) -> None:
    tensors, factors = {}, {}
    for key in store.keys:
        x = store[key][:].float()
        try:
            scaling = Scaling.of(x)
        except InputError:
            scaling = Scaling(x[0], math.nan)
        tensors[_name(key)], factors[_name(key)] = scaling.centre, scaling.factor
    artefact.save(store.path / SCALINGS, "step_scalings", tensors, {"factors": factors})


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


# ------------------------------------------------------------------------------------------------ where steps lie


@dataclass(frozen=True)
class _Item:
    """A trace's tokens up to its last step's end, what to read of them, and a record for each of those rows."""

    trace: str
    ids: list[int]
    read: list[tuple[int, int]]  # token spans that are averaged, of one token each for "closing" and "all"
    records: list[dict[str, Any]]


def _item(tokenizer: Any, trace: Trace, name: str, reduce: str) -> _Item:
    """The model's input is tokenised whole, so that the tokens of the last step are those that the model saw."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this tokenizer does not tell where its tokens stand; load the fast one (use_fast=True)")
    encoded = tokenizer(trace.prompt + trace.steps.text + trace.ending, return_offsets_mapping=True)
    offsets, start = encoded["offset_mapping"], len(trace.prompt)
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
        records += [{**about, "token": b - 1} for _, b in own]
    end = max((b for _, b in spans), default=0)
    return _Item(name, list(encoded["input_ids"])[:end], spans, records)


def closing_tokens(offsets: Sequence[tuple[int, int]], bounds: Sequence[int]) -> list[int]:
    """The tokens that hold the character before each bound: the last ones, empty ones apart, that begin before it."""
    places = [(start, i) for i, (start, end) in enumerate(offsets) if start < end]
    return [places[max(bisect_left(places, (bound,)) - 1, 0)][1] for bound in bounds]


def _check(model: Any, items: Sequence[_Item], path: str | Path, resume: bool) -> None:
    """Everything that can be known before the first forward pass."""
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
    if resume and (Path(path) / "index.json").exists():
        check_fits(ActivationStore.open(path).header.get("model", {}), unwrap(model), strict=True)


def _read(model: Any, tokenizer: Any, batch: Sequence[_Item], keys: Sequence[Key]) -> dict[Key, Tensor]:
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
