"""Scenarios, reasoning problems, emotion label sets and file loaders; each is imported only when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emocircuits.data.emotions import (
        EKMAN6,
        GOEMOTIONS27,
        PLUTCHIK8,
        VALENCE_AROUSAL,
        label_set,
        map_labels,
        map_probabilities,
    )
    from emocircuits.data.loaders import LabelledText, load_prompts, load_texts
    from emocircuits.data.problems import ANSWER_STEM, ANSWER_TEXTS, Problem, few_shot_prompt, load_problems
    from emocircuits.data.scenarios import Group, Scenario, ScenarioSet, discovery, heldout, load_sev

__all__ = [
    "ANSWER_STEM",
    "ANSWER_TEXTS",
    "EKMAN6",
    "GOEMOTIONS27",
    "PLUTCHIK8",
    "VALENCE_AROUSAL",
    "Group",
    "LabelledText",
    "Problem",
    "Scenario",
    "ScenarioSet",
    "discovery",
    "few_shot_prompt",
    "heldout",
    "label_set",
    "load_problems",
    "load_prompts",
    "load_sev",
    "load_texts",
    "map_labels",
    "map_probabilities",
]

_HOMES = {
    "loaders": ("LabelledText", "load_prompts", "load_texts"),
    "problems": ("ANSWER_STEM", "ANSWER_TEXTS", "Problem", "few_shot_prompt", "load_problems"),
    "scenarios": ("Group", "Scenario", "ScenarioSet", "discovery", "heldout", "load_sev"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME.get(name, 'emotions')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
