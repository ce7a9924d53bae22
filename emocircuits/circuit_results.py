"""What the circuit part of a run writes down: scores and their stability, the graph, the table of methods."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .circuits.assemble import Circuit, overlap, top
from .circuits.edges import graph
from .circuits.heads import attended_tokens
from .evaluation import scoring

if TYPE_CHECKING:
    from .circuit_study import CircuitStudy

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def discovered(study: CircuitStudy) -> dict[str, Any]:
    """The content of circuits.json."""
    units, effects, influence = study.units(), study.effects(), study.influence()
    heads, neurons = study.scores()
    circuits = study.circuits()
    ranked = neurons.flatten(1).sort(-1, descending=True).values
    ranks = [k for k in RANKS if k <= ranked.shape[1]]
    return {
        "emotions": list(units.emotions),
        "position": units.position,
        "heads": {
            "direct": _plain(heads),
            "total": _plain(effects["exact"]),
            "gradient": _plain(effects["gradient"]),
            "agreement": {
                "direct vs total": _correlation(heads, effects["exact"]),
                "gradient vs total": _correlation(effects["gradient"], effects["exact"]),
                "neurons, direct vs gradient": _correlation(neurons, effects["neurons"]),
            },
        },
        "neurons": {
            "ranks": ranks,
            "scores": ranked[:, [k - 1 for k in ranks]].tolist(),
            "share_of_layer": _plain(neurons.clamp_min(0).sum(-1)),
        },
        "influence": {
            "attn": _plain(influence.values[0]), "mlp": _plain(influence.values[1]),
            "cosine": {"attn": _plain(influence.cosine[0]), "mlp": _plain(influence.cosine[1])},
            "correlation_with_cosine": _correlation(influence.values, influence.cosine.abs()),
        },
        "members": {
            e: {"heads": len(c.heads), "neurons": len(c.neurons), "negative": sum(s < 0 for s in c.head_scores),
                "top_heads": [list(u) for u in c.heads[:8]], "top_neurons": [list(u) for u in c.neurons[:8]]}
            for e, c in circuits.items()
        },
        "reads": _reads(study, circuits),
        "overlap": {kind: _overlaps(circuits, kind, size) for kind, size in
                    (("heads", heads[0].numel()), ("neurons", neurons[0].numel()))},
        "stability": _stability(study),
    }  # fmt: skip


def _reads(study: CircuitStudy, circuits: dict[str, Circuit], n_heads: int = 3) -> dict[str, Any]:
    """Which tokens the best heads of each circuit attend to at the end of replies in their emotion."""
    model, tokenizer = study.demo.loaded
    texts = study.texts(study.plan.n_curve_scenarios)
    found = {}
    for emotion, circuit in circuits.items():
        mine = [e.prompt + e.response for e in texts if e.label == emotion]
        read = attended_tokens(model, tokenizer, mine, circuit.heads[:n_heads])
        found[emotion] = [{"head": list(head), "tokens": [list(t) for t in tokens]} for head, tokens in read.items()]
    return found


def _overlaps(circuits: dict[str, Circuit], kind: str, n_units: int) -> dict[str, Any]:
    found = [overlap(a, b, kind, n_units) for a, b in combinations(circuits.values(), 2)]
    return {k: scoring.number(np.nanmean([f[k] for f in found])) for k in ("jaccard", "chance", "excess")}


def _stability(study: CircuitStudy) -> dict[str, Any]:
    """Chance-corrected overlap of the circuits that two halves of the training themes give by themselves."""
    units, circuits = study.units(), study.circuits()
    halves = [units.folds[0::2], units.folds[1::2]]
    if not all(halves):
        return {"heads": None, "neurons": None, "reason": "one theme only"}
    halved = [study.scores(folds=half) for half in halves]
    found: dict[str, list[float]] = {"heads": [], "neurons": []}
    for i, (emotion, circuit) in enumerate(circuits.items()):
        size = len(circuit.heads), len(circuit.neurons)
        a, b = (top(emotion, heads[i], neurons[i], *size) for heads, neurons in halved)
        for kind, n in (("heads", units.heads()[0].numel()), ("neurons", units.neurons()[0].numel())):
            found[kind].append(overlap(a, b, kind, n)["excess"])
    return {k: scoring.number(np.mean(v)) for k, v in found.items()}


def graphs(study: CircuitStudy) -> dict[str, Any]:
    """The content of graphs.json: each emotion's units by attribution, with edges by path attribution.

    An edge [sender, receiver, value] is the part of the emotion score that one member gives through another.
    """
    model, (heads, neurons) = study.demo.loaded.model, study.scores("attribution")
    baselines = {site: study.units().baseline(site) for site in ("z", "mlp_post")}
    texts, out = study.texts(study.plan.n_effect_scenarios), {}
    for i, emotion in enumerate(study.units().emotions):
        best = top(emotion, heads[i], neurons[i], *study.plan.graph_size)
        (inputs,) = study.batches([e.prompt + e.response for e in texts if e.label == emotion], len(texts))
        out[emotion] = graph(model, inputs, study.readout(), best, baselines).as_data()
    return {"graphs": out, "readout": study.readout().what}


def evaluate(study: CircuitStudy) -> dict[str, Any]:
    """The content of circuits/evaluation.json."""
    from .evaluation.embeddings import SentenceEncoder

    demo, seed = study.demo, study.demo.plan.seed
    texts = {m: study.method_texts(m) for m in study.plan.methods}
    kept = {r["skeleton_id"] for rows in texts.values() for r in rows}
    main = demo.texts()
    names = {"steered": "direction steering", "prompted": "prompting", "random": "random direction"}
    for method, name in names.items():
        texts[name] = [r for r in main if r["method"] == method and r["skeleton_id"] in kept]
    unsteered = {r["skeleton_id"]: r["text"] for r in main if r["method"] == "unsteered"}
    embed, labels = SentenceEncoder().encode, list(demo.judge.labels)
    circuit = texts["circuit"]
    return {
        "methods": {
            name: scoring.summarise(rows, demo.plan.emotions, labels, unsteered, embed, seed)
            for name, rows in texts.items()
        },
        "comparisons": [
            scoring.compare(circuit, rows, "coherent", ("circuit", name), seed)
            for name, rows in texts.items() if name != "circuit"
        ],
        "strengths": {m: study.tuning(m)["chosen"] for m in study.plan.methods},
        "n_scenarios": len(kept),
    }  # fmt: skip


def _plain(x: Tensor) -> list[Any]:
    return [[[scoring.number(v) for v in row] if isinstance(row, list) else scoring.number(row) for row in rows]
            for rows in x.tolist()]  # fmt: skip


def _correlation(a: Tensor, b: Tensor) -> float | None:
    x, y = a.flatten(), b.flatten()
    keep = torch.isfinite(x) & torch.isfinite(y)
    if keep.sum() < 3:
        return None
    return scoring.number(np.corrcoef(x[keep].numpy(), y[keep].numpy())[0, 1])
