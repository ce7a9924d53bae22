"""What the playground steers with: the run's steerers, mixed, and how fluent the result is. No Streamlit in here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboards.folders import inside
from emocircuits.artefact import read_json
from emocircuits.report import RunData

TOTAL = 0.15
"""Strength for a run that tuned none, in residual norms over all layers of the middle half together."""


def saved_steerers(data: RunData) -> dict[str, Any]:
    """Steerers of the run's emotions at the strengths it chose, from its files; empty when it saved none."""
    from emocircuits.steering import Steerer

    files = {e: inside(data.path / "steerers", f"{e}.safetensors") for e in data.emotions}
    return {e: Steerer.load(file) for e, file in files.items() if file and file.is_file()}


def from_directions(data: RunData, directions: Any) -> dict[str, Any]:
    """Steerers along the directions, at the settings that tuning chose, else a cautious one in the middle layers."""
    chosen, layers = (data.tuning or {}).get("chosen") or {}, directions.layers
    middle = list(layers[round(0.2 * len(layers)) : max(1, round(0.75 * len(layers)))])
    usual = {"strength": TOTAL / len(middle), "layers": middle}
    settings = {e: chosen.get(e) or usual for e in directions.emotions}
    fits = {e: s if set(s["layers"]) <= set(layers) else usual for e, s in settings.items()}
    return {e: directions.steerer(e, s["strength"], s["layers"]) for e, s in fits.items()}


def from_circuits(data: RunData, circuits: Mapping[str, Any], units: Any) -> dict[str, Any]:
    """Steerers that put each emotion's own difference back on its circuit, at the strength its tuning chose."""
    from emocircuits.circuits.modulation import circuit_steerer

    found = (((data.circuits or {}).get("evaluation") or {}).get("strengths") or {}).get("circuit") or {}
    return {e: circuit_steerer(c, units, strength=found.get(e, 1.0)) for e, c in circuits.items() if len(c)}


def mix(steerers: Mapping[str, Any], weights: Mapping[str, float], strength: float, positions: str) -> Any:
    """The steerers times their weights and the common strength, as one; None when nothing is left to steer."""
    from emocircuits.live import blend

    parts = [(steerers[e].at(positions), w * strength) for e, w in weights.items() if e in steerers]
    return blend(parts, "+".join(f"{w * strength:g} {e}" for e, w in weights.items() if w * strength) or "nothing")


def as_file(steerer: Any) -> bytes:
    """The steerer's file."""
    with tempfile.TemporaryDirectory() as folder:
        return steerer.save(Path(folder, "mix.safetensors")).read_bytes()


def snippet(file: str) -> str:
    """How the file is used in one's own code."""
    return (
        "from emocircuits.steering import Steerer\n\n"
        f'mix = Steerer.load("{file}")\n'
        "with mix.attach(model):  # your model and your generate()\n"
        "    model.generate(**inputs)"
    )


@dataclass(frozen=True)
class Fluency:
    """How odd a text is to the clean model, and whether the run's rule, fixed on unsteered texts, calls it broken."""

    perplexity: float
    limit: float | None
    reason: str
    """Why the text is degenerate; empty when it is not, or when the run fixed no rule."""


def fluency(texts: Sequence[str], perplexities: Sequence[float], data: RunData) -> list[Fluency]:
    """Each text against the run's thresholds (thresholds.json), where it has any."""
    from emocircuits.evaluation.fluency import FluencyThresholds, degenerate

    file = data.path / "thresholds.json"
    if not file.is_file():
        return [Fluency(p, None, "") for p in perplexities]
    limits = FluencyThresholds(**read_json(file))
    _, reasons = degenerate(list(texts), list(perplexities), limits)
    return [Fluency(p, limits.perplexity, reason) for p, reason in zip(perplexities, reasons)]
