"""Steering: what a steerer adds to the time of greedy generation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import peers
import torch
from harness import Line, Table, Way, build, interleaved
from torch import Tensor
from workloads import demo, llama, random_ids, steerer, text_ids

from emocircuits.models.anatomy import resolve
from emocircuits.steering import Hold, Meter, Ramp, Steerer, Tags, Term, Until

PROMPT = 8
SHAPES = {(1, 24): "batch 1, 8 prompt and 24 new tokens", (8, 32): "batch 8, 8 prompt and 32 new tokens"}
ONE, TEN = (9,), tuple(range(4, 14))
UNSTEERED, COLUMN = "unsteered", "time, x unsteered"
TARGETS = {"hook, one layer": 1.05, "hooks, ten layers": 1.05, "bias, one layer": 1.02, "biases, ten layers": 1.02}


def run(repetitions: int) -> list[Table]:
    """The demo model with peers, a Llama-shaped model with biases too, then six emotions in one batch."""
    return [
        *(_on_demo(batch, new, repetitions) for batch, new in SHAPES),
        *(_on_llama(batch, new, repetitions) for batch, new in SHAPES),
        _rows(repetitions),
        *(_controls(batch, new, repetitions) for batch, new in SHAPES),
    ]


def _steered(model: Any, ids: Tensor, new_tokens: int, pushed: Steerer, compile_to: str) -> Way:
    def run() -> Tensor:
        with pushed.attach(model, compile_to=compile_to):
            return peers.greedy(model, ids, new_tokens)

    return run


def _ours(model: Any, ids: Tensor, new: int, kinds: Mapping[str, str]) -> dict[str, Way]:
    """{name: way} for each wanted compilation ("hook", "bias") of a one-layer and a ten-layer steerer."""
    one, ten = (steerer(model, ids, layers) for layers in (ONE, TEN))
    ways: dict[str, Way] = {}
    for kind, plural in kinds.items():
        ways[f"emocircuits {kind}, one layer"] = _steered(model, ids, new, one, kind)
        ways[f"emocircuits {plural}, ten layers"] = _steered(model, ids, new, ten, kind)
    return ways


def _raw(model: Any, ids: Tensor, new: int) -> dict[str, Way]:
    return {
        f"raw PyTorch hook{s}, {count} layer{s}": peers.raw_hooks(
            model, ids, new, _vectors(steerer(model, ids, layers))
        )
        for count, s, layers in (("one", "", ONE), ("ten", "s", TEN))
    }


def _vectors(pushed: Steerer) -> dict[int, Tensor]:
    """What a steerer adds at each layer."""
    return {layer: v * t.strength for t in pushed.terms for layer, v in zip(t.layers, t.vectors)}


def _on_demo(batch: int, new: int, repetitions: int) -> Table:
    loaded, ids = demo(), text_ids(batch, PROMPT)
    model, vector = loaded.model, _vectors(steerer(demo().model, ids, ONE))[ONE[0]]
    ours = _ours(model, ids, new, {"hook": "hooks"})
    others, missing = build(
        {
            "nnsight, one layer": lambda: peers.nnsight_steer(
                peers.nnsight_model(model, loaded.tokenizer), ids, new, ONE[0], vector
            ),
            "TransformerBridge, one layer": lambda: peers.bridge_steer(
                peers.bridge_model(model, loaded.tokenizer), ids, new, ONE[0], vector
            ),
            "repeng, one layer": lambda: peers.repeng_steer(model, ids, new, ONE[0], vector),
            "steering-vectors, one layer": lambda: peers.vectors_steer(model, ids, new, ONE[0], vector),
        }
    )
    ways = {UNSTEERED: partial(peers.greedy, model, ids, new), **ours, **_raw(model, ids, new), **others}
    return _table(f"Steering, {loaded.name}", SHAPES[batch, new], ways, repetitions, missing + peers.not_compared())


def _on_llama(batch: int, new: int, repetitions: int) -> Table:
    model = llama()
    ids = random_ids(batch, PROMPT, model.config.vocab_size)
    ours = _ours(model, ids, new, {"hook": "hooks", "bias": "biases"})
    ways = {UNSTEERED: partial(peers.greedy, model, ids, new), **ours, **_raw(model, ids, new)}
    # a run is short here and the differences are small, so more rounds are affordable and needed
    return _table("Steering, random Llama-shaped model", SHAPES[batch, new], ways, 2 * repetitions, [])


def _table(title: str, shape: str, ways: dict[str, Way], repetitions: int, missing: list[Line]) -> Table:
    timing = interleaved(ways, repetitions)
    lines = []
    for name in ways:
        target = TARGETS.get(name.removeprefix("emocircuits "))
        note = _same(timing.results[name], timing.results[_reference(name)])
        if name == _reference(name) != UNSTEERED:
            changed = float((timing.results[name] != timing.results[UNSTEERED]).float().mean())
            if not changed:
                raise RuntimeError("the push changes no token, so equal tokens would mean nothing; raise STRENGTH")
            note = f"changes {changed:.0%} of the tokens"
        lines.append(Line(name, {COLUMN: timing.ratio(name, UNSTEERED, target)}, note if name != UNSTEERED else ""))
    return Table(title, f"greedy, {shape}, a random direction in the residual stream", lines + missing)


def _reference(name: str) -> str:
    if name == UNSTEERED:
        return UNSTEERED
    return "emocircuits hooks, ten layers" if "ten" in name else "emocircuits hook, one layer"


def _same(found: Tensor, reference: Tensor) -> str:
    """Whether two ways of the same push wrote the same tokens."""
    share = float((found == reference).float().mean())
    return "same tokens" if share == 1 else f"{share:.0%} same tokens"


def _controls(batch: int, new: int, repetitions: int) -> Table:
    """Schedules, gates, closed loops and removals over ten layers, against no steering at all."""
    model, ids = demo().model, text_ids(batch, PROMPT)
    pushed, width = steerer(model, ids, TEN), resolve(model).d_model
    emotions = tuple("abcdef")
    meter = Meter(emotions, "resid_post", TEN[-1], torch.randn(len(emotions), width) / 100, torch.zeros(len(emotions)))
    removed = Steerer((Term("resid_post", TEN, pushed.terms[0].vectors, mode="cap"),))
    kinds = {
        "hooks, ten layers": pushed,
        "ramp": pushed.when(Ramp(0, 1, 16)),
        "inside tags only": pushed.when(Tags((2,), (3,))),
        "until a probability is reached": pushed.when(Until(meter, "a")),
        "closed loop": pushed.when(Hold(meter, "a")),
        "component capped": removed,
    }
    ways: dict[str, Way] = {UNSTEERED: partial(peers.greedy, model, ids, new)}
    ways |= {name: _steered(model, ids, new, one, "hook") for name, one in kinds.items()}
    timing = interleaved(ways, repetitions)
    lines = [Line(name, {COLUMN: timing.ratio(name, UNSTEERED, 1.10 if name in kinds else None)}, "") for name in ways]
    return Table("Steering with controls, demo model", f"greedy, {SHAPES[batch, new]}, ten layers", lines)


def _rows(repetitions: int) -> Table:
    """Six emotions: one batch with a steerer per row, against one steerer for all rows, and against six runs."""
    model, ids, new = demo().model, text_ids(6, PROMPT), 24
    each = [steerer(model, ids, ONE, seed) for seed in range(6)]
    per_row, common = "one batch, a steerer per row", "one batch, one steerer for all rows"
    runs = [_steered(model, ids[i : i + 1], new, pushed, "hook") for i, pushed in enumerate(each)]
    ways: dict[str, Way] = {
        common: _steered(model, ids, new, each[0], "hook"),
        per_row: _steered(model, ids, new, Steerer.rows(each), "hook"),
        "six runs, one per emotion": lambda: torch.cat([run() for run in runs]),
    }
    timing = interleaved(ways, repetitions)
    lines = [
        Line(
            name,
            {"time, x one steerer for all rows": timing.ratio(name, common, 1.05 if name == per_row else None)},
            "" if name == common else _same(timing.results[name], timing.results[per_row]),
        )
        for name in ways
    ]
    lines[1] = Line(per_row, lines[1].cells, "")
    return Table(
        f"Steering: six emotions in one batch, {demo().name}", f"greedy, 6 prompts of {PROMPT}, {new} new tokens", lines
    )
