"""Texts to read directions from, built from scenarios: prompts that ask for an emotion, and replies that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .data.prompts import SPEECH, Wording, wordings_for
from .data.scenarios import Group, ScenarioSet
from .reading import Example


def reply_examples(scenarios: ScenarioSet, emotions: Sequence[str]) -> list[Example]:
    """One example per scenario and emotion: the narrator's reply, which never names its emotion."""
    return [
        Example(
            prompt=group.text + SPEECH,
            label=emotion,
            group=f"{group.skeleton_id}.{group.valence}",
            response=replies[emotion],
            theme=group.theme,
            cluster=group.skeleton_id,
        )
        for group, replies in scenarios.reply_groups()
        for emotion in emotions
        if emotion in replies
    ]


def without_opening(examples: Sequence[Example], n_words: int = 3) -> list[Example]:
    """The same examples read from the response's word `n_words` on; shorter responses are left out.

    What a direction still tells apart then is not only how replies in an emotion open.
    """
    kept = []
    for example in examples:
        words = example.response.split(" ")
        if len(words) > n_words:
            opening, rest = " ".join(words[:n_words]), " " + " ".join(words[n_words:])
            kept.append(replace(example, continuation=example.continuation + opening, response=rest))
    return kept


def prompt_examples(
    scenarios: ScenarioSet, emotions: Sequence[str], wordings: Sequence[Wording] | None = None
) -> list[Example]:
    """One example per scenario and emotion: the scenario, a sentence that asks for the emotion, and no reply yet.

    Valences and wordings take turns over the scenarios; within a group all emotions share both.
    """
    wordings = wordings or wordings_for(emotions)
    return [
        Example(
            prompt=group.text,
            label=emotion,
            group=f"{group.skeleton_id}.{group.valence}.{wording.name}",
            continuation=f" {wording.text(emotion)}{SPEECH}",
            theme=group.theme,
            cluster=group.skeleton_id,
            wording=wording.name,
        )
        for group, wording in zip(one_valence(scenarios), _cycle(wordings, len(scenarios)))
        for emotion in emotions
    ]


def one_valence(scenarios: ScenarioSet) -> list[Group]:
    """One group per scenario, the three valences taking turns."""
    valences = ("positive", "neutral", "negative")
    return [row.group(valences[i % 3]) for i, row in enumerate(scenarios)]


def _cycle(wordings: Sequence[Wording], n: int) -> list[Wording]:
    # the step of 3 in valences and a cycle of 4 or 5 wordings meet in every combination
    return [wordings[i % len(wordings)] for i in range(n)]
