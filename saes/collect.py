"""One vector per reasoning step, from every wanted layer in one pass over each trace, into a store on disk.

RISE (arXiv 2512.23988) reads the token that closes a step. Each row's record says which step it is, where it stands,
how long it is and what it is about, so that controls for position and length need no second look at the text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.progress import Progress

from emocircuits import artefact
from emocircuits.activations import batches, expand_sites
from emocircuits.activations.sites import Key, SiteRequest
from emocircuits.activations.store import ActivationStore
from emocircuits.errors import InputError
from emocircuits.models.anatomy import resolve, unwrap
from emocircuits.models.fingerprint import check_fits, fingerprint
from emocircuits.reasoning.traces import Trace

from .tokens import Splitter, paragraphs, place_steps, read_steps
from .vectors import Scaling

SCALINGS = "scalings.safetensors"


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
    the model's input), tokens (the step's length), label and text, and with "all" piece, the token's own text. The
    model runs as far as the last wanted layer. `scalings` reads the centre and scale of every layer. Raises InputError
    for texts that do not fit the model, and with `resume` unless model, traces and settings are those of the store.
    """
    given = [Trace("", split(t)) if isinstance(t, str) else t for t in traces]
    items = place_steps(model, tokenizer, given, reduce)
    keys = expand_sites(sites, layers, resolve(model))
    if resume and (Path(path) / "index.json").exists():
        check_fits(ActivationStore.open(path).header.get("model", {}), unwrap(model), strict=True)
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
                found = read_steps(model, tokenizer, batch, keys)
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
