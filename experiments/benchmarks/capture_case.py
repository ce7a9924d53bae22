"""Capture: resid_post of every layer at the last token."""

from __future__ import annotations

from typing import Any

import peers
import torch
from harness import MIB, Cell, Line, Memory, Table, Timing, Way, build, interleaved, memory_of
from torch import Tensor
from workloads import demo, text_ids

from emocircuits.activations import Moments, capture
from emocircuits.models.anatomy import resolve

BATCH, LENGTH = 16, 64
OURS, FULL, BODY = "emocircuits capture", "HF full forward", "HF body, no LM head"
TO_BODY, TO_FULL, PEAK = "time, x body", "time, x full forward", "peak memory, x full forward"
TARGETS = {TO_BODY: 1.03, TO_FULL: 0.5, PEAK: 0.1}


def run(repetitions: int) -> list[Table]:
    """Time and memory against the bare model and other packages, then memory over many batches."""
    return [_against_peers(repetitions), _over_batches()]


def _against_peers(repetitions: int) -> Table:
    loaded, ids = demo(), text_ids(BATCH, LENGTH)
    ours = {OURS: lambda: capture(loaded.model, ids, "resid_post").stack("resid_post")}
    others, missing = _others(loaded, ids)
    ways: dict[str, Way] = {**_plain(loaded.model, ids), **ours, **others}
    timing = interleaved(ways, repetitions)
    memory = {name: memory_of(way) for name, way in ways.items()}
    lines = [_line(name, timing, memory) for name in ways]
    workload = f"{BATCH} x {LENGTH} tokens of scenario text, resid_post of all layers, last token, {loaded.name}"
    return Table("Capture", workload, lines + missing)


def _plain(model: Any, ids: Tensor) -> dict[str, Way]:
    def hidden_states() -> Tensor:
        """The last layer's entry has been through the final norm, so it is left out."""
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack([state[:, -1] for state in states[1:-1]])

    return {
        FULL: torch.no_grad()(lambda: model(ids, use_cache=False)),
        BODY: torch.no_grad()(lambda: model.model(ids, use_cache=False)),
        "HF output_hidden_states": torch.no_grad()(hidden_states),
    }


def _others(loaded: Any, ids: Tensor) -> tuple[dict[str, Way], list[Line]]:
    model, tokenizer, n_layers = loaded.model, loaded.tokenizer, resolve(loaded.model).n_layers
    factories = {
        "nnsight trace": lambda: peers.nnsight_capture(peers.nnsight_model(model, tokenizer), ids, stop=False),
        "nnsight trace, explicit stop": lambda: peers.nnsight_capture(
            peers.nnsight_model(model, tokenizer), ids, stop=True
        ),
        "TransformerBridge, filtered": lambda: peers.bridge_capture(
            peers.bridge_model(model, tokenizer), ids, n_layers, tuned=False
        ),
        "TransformerBridge, filtered and last position": lambda: peers.bridge_capture(
            peers.bridge_model(model, tokenizer), ids, n_layers, tuned=True
        ),
    }
    ways, missing = build(factories)
    return ways, missing + peers.not_compared()


def _line(name: str, timing: Timing, memory: dict[str, Memory]) -> Line:
    def target(column: str) -> float | None:
        return TARGETS[column] if name == OURS else None

    cells = {
        TO_BODY: timing.ratio(name, BODY, target(TO_BODY)),
        TO_FULL: timing.ratio(name, FULL, target(TO_FULL)),
        PEAK: Cell(memory[name].peak / memory[FULL].peak, target=target(PEAK)),
        "peak MiB": Cell(memory[name].peak / MIB),
        "held MiB": Cell(memory[name].held / MIB),
    }
    return Line(name, cells, _agreement(timing.results[name], timing.results[OURS]) if name != OURS else "")


def _agreement(found: Any, ours: Tensor) -> str:
    """How far another way's activations are from ours, relative to the largest; nothing for ways that read none."""
    if not isinstance(found, Tensor):
        return ""
    reference = ours[: len(found)]
    return f"differs from ours by {float((found - reference).abs().max() / reference.abs().max()):.0e}"


def _over_batches() -> Table:
    model, ids = demo().model, text_ids(BATCH, LENGTH)

    def fold(n_batches: int) -> Way:
        def run() -> Moments:
            moments = Moments()
            for _ in range(n_batches):
                capture(model, ids, "resid_post", into=moments)
            return moments

        return run

    fold(1)()
    memory = {n: memory_of(fold(n)) for n in (1, 8)}
    lines = [
        Line(
            f"{n} batch{'es' * (n > 1)} into Moments",
            {
                "peak, x one batch": Cell(m.peak / memory[1].peak, target=1.05 if n > 1 else None),
                "held, x one batch": Cell(m.held / memory[1].held, target=1.05 if n > 1 else None),
                "held MiB": Cell(m.held / MIB),
            },
        )
        for n, m in memory.items()
    ]
    workload = f"batches of {BATCH} x {LENGTH} tokens, running means of resid_post at every layer"
    return Table("Capture: memory over many batches", workload, lines)
