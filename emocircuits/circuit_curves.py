"""Curves of a run's circuits over their size: what is left without them, with them alone, and what they add.

Every circuit stands beside random units. Faithfulness: the emotion score with only the circuit intact, as a share of
the whole model's (all units put to their mean count as nothing). Completeness is that share without the circuit.
Enhancement adds the circuit's difference to neutral replies; its unit is the gap between an emotion's own texts and
neutral ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .circuits.assemble import KINDS, Circuit, by_counts, top
from .circuits.validate import Condition, area, ratio_interval, scores
from .evaluation import scoring

if TYPE_CHECKING:
    from .circuit_study import CircuitStudy

ATTRIBUTED = "circuit by attribution"
KEPT = ("circuit", "layer-matched random", ATTRIBUTED)
"""What is also tested alone, with everything else at its mean."""
SCOPES = ("anywhere", "in each layer")

Job = tuple[dict[str, Any], Condition]
"""What a row of the table says of itself, and the condition that fills it."""


def curves(study: CircuitStudy) -> dict[str, Any]:
    """The content of curves.json: circuits of every size of the plan, by both rules, with their controls."""
    jobs: list[Job] = []
    for size in range(len(study.plan.sizes)):
        about = _size(study, size)
        for control, circuits in _controls(study, size).items():
            actions = ["ablate", *(["keep"] if control in KEPT else [])]
            actions += ["enhance"] if control not in ("size-matched random", f"{ATTRIBUTED}, random") else []
            jobs += [({**about, "control": control}, Condition(control, circuits, action)) for action in actions]
        resampled = Condition("resample", study.circuits(size), "keep", "resample")
        jobs.append(({**about, "control": "circuit (resample)"}, resampled))
    rows = measured(study, jobs)
    return {
        "rows": rows,
        "areas": _areas(rows),
        "n_texts": len(study.texts(study.plan.n_curve_scenarios, held_out=True)),
        "readout": study.readout().what,
        "chosen": study.plan.chosen,
    }


def rank_curves(study: CircuitStudy) -> dict[str, Any]:
    """The content of rank_curves.json: the k best heads or neurons, anywhere or in each layer, k from the plan's `ks`.

    Sizes over half of what exists are left out: beside them no random control is left to draw.
    """
    from .circuit_study import RULES

    jobs: list[Job] = []
    for rule in RULES:
        for kind, values in zip(KINDS, study.scores(rule)):
            for scope in SCOPES:
                available = values[0].numel() if scope == SCOPES[0] else values.shape[-1]
                for k in (k for k in study.plan.ks if k <= available // 2):
                    best = ranked(study, rule, kind, scope, k)
                    others = {e: study.random_circuit(c) for e, c in best.items()}
                    for control, circuits in (("best", best), ("random", others)):
                        about = {"rule": rule, "kind": kind, "scope": scope, "k": k, "control": control}
                        jobs += [(about, Condition(control, circuits, action)) for action in ("ablate", "enhance")]
    return {"rows": measured(study, jobs), "readout": study.readout().what}


def ranked(study: CircuitStudy, rule: str, kind: str, scope: str, k: int) -> dict[str, Circuit]:
    """Each emotion's k best units of one kind, anywhere or in each layer that the ranking reaches."""
    heads, neurons = study.scores(rule)
    made: dict[str, Circuit] = {}
    for i, emotion in enumerate(study.units().emotions):
        if scope == SCOPES[0]:
            made[emotion] = top(emotion, heads[i], neurons[i], *(k * (kind == name) for name in KINDS))
            continue
        reached = [bool(torch.isfinite(row).any()) for row in (heads if kind == "heads" else neurons)[i]]
        counts = {name: [k * (kind == name and r) for r in reached] for name in KINDS}
        made[emotion] = by_counts(emotion, heads[i], neurons[i], counts)
    return made


def measured(study: CircuitStudy, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Rows with action, estimate and interval: each condition on held-out texts, "enhance" on the neutral replies."""
    demo, units, readout = study.demo, study.units(), study.readout()
    model, tokenizer = demo.loaded
    own = study.texts(study.plan.n_curve_scenarios, held_out=True)
    kept = [(about, c) for about, c in jobs if c.action != "enhance"]
    pushed = [(about, c) for about, c in jobs if c.action == "enhance"]
    nothing = Condition("nothing", {e: Circuit(e, (), (), (), ()) for e in units.emotions}, "keep")
    plain = {g.skeleton_id: str(r["neutral"]) for g, r in demo.heldout.reply_groups() if r.get("neutral")}
    neutral = [replace(e, response=plain[e.cluster]) for e in own if e.cluster in plain]

    def run(texts: list[Any], conditions: list[Condition], title: str) -> Any:
        return scores(
            model, tokenizer, texts, readout, units, conditions, seed=demo.plan.seed, progress=demo.progress,
            title=title,
        ).numpy()  # fmt: skip

    found = run(own, [nothing, *(c for _, c in kept)], "ablating circuits")
    rows = []
    for i, (about, condition) in enumerate(kept, 2):
        share = ratio_interval(found[:, 0], found[:, i], found[:, 1], [e.cluster for e in own], seed=demo.plan.seed)
        rows.append({**about, "action": condition.action, **share})
    if not (pushed and neutral):
        return rows
    whole = found[[e.cluster in plain for e in own], 0]
    found = run(neutral, [c for _, c in pushed], "enhancing circuits")
    for i, (about, condition) in enumerate(pushed, 1):
        share = ratio_interval(whole, found[:, i], found[:, 0], [e.cluster for e in neutral], seed=demo.plan.seed)
        rows.append({**about, "action": condition.action, **share})
    return rows


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


def _areas(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean height of each curve over log size."""
    out: dict[str, float | None] = {}
    for control, action in dict.fromkeys((r["control"], r["action"]) for r in rows):
        mine = [r for r in rows if (r["control"], r["action"]) == (control, action)]
        out[f"{control}, {action}"] = scoring.number(
            area([r["n_neurons"] for r in mine], [r["estimate"] for r in mine])
        )
    return out
