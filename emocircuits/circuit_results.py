"""What the circuit part of a run writes down: scores and their stability, curves with controls, the table."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .circuits.assemble import Circuit, overlap, top
from .circuits.heads import attended_tokens
from .circuits.validate import Condition, area, ratio_interval, scores
from .evaluation import scoring

if TYPE_CHECKING:
    from .circuit_study import CircuitStudy

ATTRIBUTED = "circuit by attribution"
KEPT = ("circuit", "layer-matched random", ATTRIBUTED)
"""What is also tested alone, with everything else at its mean."""
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


def curves(study: CircuitStudy) -> dict[str, Any]:
    """The content of curves.json: for every size what keeping, ablating and enhancing the circuit does.

    Circuits are chosen by direct effect (they steer) and by attribution to the score, each beside random units.
    Faithfulness: the emotion score with only the circuit intact, as a share of the whole model's (all units put to
    their mean count as nothing). Completeness is that share without the circuit. Enhancement adds the circuit's
    difference to neutral replies; its unit is the gap between an emotion's own texts and neutral ones.
    """
    demo, units, readout = study.demo, study.units(), study.readout()
    model, tokenizer = demo.loaded
    nobody = {e: Circuit(e, (), (), (), ()) for e in units.emotions}
    conditions, keys = [Condition("nothing", nobody, "keep")], []
    for size in range(len(study.plan.sizes)):
        for control, circuits in _controls(study, size).items():
            for action in ("keep", "ablate"):
                if control in KEPT or action == "ablate":
                    conditions.append(Condition(f"{control} {action}", circuits, action))
                    keys.append((size, control, action))
        conditions.append(Condition("resample", study.circuits(size), "keep", "resample"))
        keys.append((size, "circuit (resample)", "keep"))
    texts = study.texts(study.plan.n_curve_scenarios, held_out=True)
    found = scores(
        model, tokenizer, texts, readout, units, conditions, seed=demo.plan.seed, progress=demo.progress,
        title="ablating circuits",
    ).numpy()  # fmt: skip
    clusters = [e.cluster for e in texts]
    rows = []
    for column, (size, control, action) in enumerate(keys, 2):
        share = ratio_interval(found[:, 0], found[:, column], found[:, 1], clusters, seed=demo.plan.seed)
        rows.append({**_size(study, size), "control": control, "action": action, **share})
    rows += _enhancement(study)
    return {
        "rows": rows,
        "areas": _areas(rows),
        "n_texts": len(texts),
        "readout": readout.what,
        "chosen": study.plan.chosen,
    }


def _size(study: CircuitStudy, size: int) -> dict[str, Any]:
    circuit = next(iter(study.circuits(size).values()))
    return {"size": size, "n_heads": len(circuit.heads), "n_neurons": len(circuit.neurons)}


def _controls(study: CircuitStudy, size: int) -> dict[str, dict[str, Circuit]]:
    circuits, attributed = study.circuits(size), study.circuits(size, "attribution")
    emotions = list(circuits)
    return {
        "circuit": circuits,
        "layer-matched random": {e: study.random_circuit(c) for e, c in circuits.items()},
        "size-matched random": {e: study.random_circuit(c, sizes=True) for e, c in circuits.items()},
        ATTRIBUTED: attributed,
        f"{ATTRIBUTED}, random": {e: study.random_circuit(c) for e, c in attributed.items()},
        "another emotion's": {e: circuits[emotions[(i + 1) % len(emotions)]] for i, e in enumerate(emotions)},
    }


def _enhancement(study: CircuitStudy) -> list[dict[str, Any]]:
    from dataclasses import replace

    demo, units, readout = study.demo, study.units(), study.readout()
    model, tokenizer = demo.loaded
    own = study.texts(study.plan.n_curve_scenarios, held_out=True)
    plain = {g.skeleton_id: r.get("neutral") for g, r in demo.heldout.reply_groups()}
    own = [e for e in own if plain.get(e.cluster)]
    if not own:
        return []
    neutral = [replace(e, response=str(plain[e.cluster])) for e in own]
    conditions, keys = [], []
    for size in range(len(study.plan.sizes)):
        for control, circuits in _controls(study, size).items():
            if control not in ("size-matched random", f"{ATTRIBUTED}, random"):
                conditions.append(Condition(control, circuits, "enhance"))
                keys.append((size, control))
    whole = scores(model, tokenizer, own, readout, units, []).numpy()[:, 0]
    found = scores(
        model, tokenizer, neutral, readout, units, conditions, seed=demo.plan.seed, progress=demo.progress,
        title="enhancing circuits",
    ).numpy()  # fmt: skip
    rows = []
    for column, (size, control) in enumerate(keys, 1):
        share = ratio_interval(whole, found[:, column], found[:, 0], [e.cluster for e in neutral], seed=demo.plan.seed)
        rows.append({**_size(study, size), "control": control, "action": "enhance", **share})
    return rows


def _areas(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean height of each curve over log size."""
    out: dict[str, float | None] = {}
    for control, action in dict.fromkeys((r["control"], r["action"]) for r in rows):
        mine = [r for r in rows if (r["control"], r["action"]) == (control, action)]
        out[f"{control}, {action}"] = scoring.number(
            area([r["n_neurons"] for r in mine], [r["estimate"] for r in mine])
        )
    return out


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
