"""Choosing layers and strengths on validation scenarios, and the dose-response curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .data.prompts import completion_prompt
from .evaluation.scoring import median, rate

if TYPE_CHECKING:
    from .demo import Demo

Row = dict[str, Any]


def tune(demo: Demo) -> dict[str, Any]:
    """Every band and strength for every emotion, all as rows of shared batches; see `choose` for the rule.

    The prompting baseline is tuned too: its best wording competes.
    """
    base = demo.prompts_of(demo.validation, demo.plan.n_validation)
    directions = demo.directions()
    rows, steerers = [], []
    for band in demo.plan.bands:
        layers = demo.layers(band)
        for dose in demo.plan.doses:
            strength = dose / len(layers)
            for emotion in demo.plan.emotions:
                steerer = directions.steerer(emotion, strength, layers)
                rows += [{**r, "emotion": emotion, "layers": layers, "strength": strength} for r in base]
                steerers += [steerer] * len(base)
    scored = demo.scored(rows, steerers, "choosing strengths")
    candidates = [summary(group) for group in grouped(scored, ("emotion", "layers", "strength"))]
    chosen = {}
    for emotion in demo.plan.emotions:
        best = choose([c for c in candidates if c["emotion"] == emotion])
        chosen[emotion] = {k: best[k] for k in ("layers", "strength", "coherent")}
    return {
        "candidates": candidates,
        "chosen": chosen,
        "n_scenarios": len(base),
        "prompting": _tune_prompting(demo, base),
    }


def choose(candidates: list[Row]) -> Row:
    """The candidate with the best `gain`, smoothed over the neighbouring strengths of its band.

    A dozen scenarios give a rate to within 0.14, so a peak that its neighbours do not share is mostly luck. Weights
    are 1/2 for a strength itself and 1/4 for each neighbour (itself again at the ends); ties go to lower perplexity.
    """
    smooth: dict[int, float] = {}
    for layers in {tuple(c["layers"]) for c in candidates}:
        band = sorted((c for c in candidates if tuple(c["layers"]) == layers), key=lambda c: c["strength"])
        gains = [c["gain"] for c in band]
        padded = [gains[0], *gains, gains[-1]]
        for i, candidate in enumerate(band):
            smooth[id(candidate)] = (padded[i] + 2 * padded[i + 1] + padded[i + 2]) / 4
    return max(candidates, key=lambda c: (smooth[id(c)], -(c["perplexity"] or 1e9)))


def gain(rows: list[Row]) -> float:
    """Mean probability the judge gives the target, zero for texts that name it or are degenerate.

    Says what the coherent rate says with less noise, because a verdict just missed still counts.
    """
    return sum(r["target_probability"] * (not (r["named"] or r["degenerate"])) for r in rows) / len(rows)


def _tune_prompting(demo: Demo, base: list[Row]) -> dict[str, Any]:
    from .demo import LEXICAL

    rows = [
        {**r, "emotion": e, "wording": w.name, "asked": completion_prompt(r["group"], w.text(e))}
        for w in LEXICAL
        for e in demo.plan.emotions
        for r in base[: max(1, len(base) // 3)]
    ]
    scored = demo.scored(rows, [None] * len(rows), "choosing the prompt")
    rates = {g[0]["wording"]: rate(g, "coherent") for g in grouped(scored, ("wording",))}
    return {"wording": max(rates, key=lambda name: rates[name] or 0.0), "coherent": rates}


def doses(demo: Demo, relative: Sequence[float]) -> dict[str, Any]:
    """Rates and perplexity at each relative dose of each emotion's chosen strength, both signs."""
    base = demo.prompts_of(demo.validation, max(1, demo.plan.n_validation // 3))
    rows, steerers = [], []
    for dose in relative:
        for emotion in demo.plan.emotions:
            steerer = demo.steerer(emotion, dose)
            rows += [{**r, "emotion": emotion, "relative": dose, "strength": steerer.strength} for r in base]
            steerers += [steerer] * len(base)
    scored = demo.scored(rows, steerers, "dose response")
    return {"rows": [summary(group, "relative") for group in grouped(scored, ("emotion", "relative"))]}


def summary(rows: list[Row], *extra: str) -> dict[str, Any]:
    """Rates and median perplexity of one cell."""
    kept = {k: rows[0][k] for k in ("emotion", "layers", "strength", *extra) if k in rows[0]}
    rates = {n: rate(rows, k) for n, k in (("coherent", "coherent"), ("expression", "expressed"))}
    return {**kept, **rates, "named": rate(rows, "named"), "degenerate": rate(rows, "degenerate"),
            "perplexity": median(rows), "gain": gain(rows), "n": len(rows)}  # fmt: skip


def grouped(rows: list[Row], keys: tuple[str, ...]) -> list[list[Row]]:
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(str(row[k]) for k in keys), []).append(row)
    return list(cells.values())
