"""What the measures of a trace are called wherever people read them; the JSON keeps its keys."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, str] = {
    "forced": "asked at once",
    "resampling": "resampling",
    "counterfactual": "counterfactual",
    "hidden": "hidden from attention",
    "receivers": "receiver heads",
    "carried": "carries the judged emotion",
    "carried_other": "carries another emotion (control)",
    "pushed": "moves when pushed",
    "pushed_random": "moves under random pushes (control)",
    "named": "emotion words (control)",
    "position": "position (control)",
    "length": "length (control)",
}
PUSHES: Mapping[str, str] = {
    "most": "most important step",
    "least": "least important step",
    "everywhere": "all steps",
    "control_everywhere": "random direction, all steps",
    "beyond_random": "all steps less random direction",
}


def name_of(measure: str) -> str:
    """A measure in words; one that another version made keeps its key."""
    return NAMES.get(measure, measure)


def pair(row: Mapping[str, str]) -> str:
    """Two measures that were correlated, in words."""
    return f"{name_of(row['a'])} ~ {name_of(row['b'])}"
