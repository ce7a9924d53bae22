"""Words around a scenario: several ways to ask for an emotion, so that no single wording is what is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, unknown
from .scenarios import Group

PINNED_DATE = "01 Jan 2025"
"""Chat templates that print today's date get this one, so that runs on different days agree."""

SPEECH = '\nI told my friend: "'
"""How a completion model is asked for the narrator's own words; a chat model gets `CHAT_TASK` instead."""
CHAT_TASK = "Say in your own words, in one or two sentences, what you would tell a friend about this."


@dataclass(frozen=True)
class Wording:
    """One way to ask for an emotion. `forms` maps each emotion to its words, which fill `template`.

    `lexical` wordings contain an emotion word; the others only describe the body, so a direction that holds for
    them is more than the emotion's noun.
    """

    name: str
    template: str
    forms: Mapping[str, str]
    lexical: bool = True

    def text(self, emotion: str) -> str:
        """The sentence for one emotion; raises InputError for an emotion without a form."""
        if emotion not in self.forms:
            raise unknown(f"emotion for wording {self.name!r}", emotion, self.forms)
        return self.template.format(self.forms[emotion])


def _forms(*words: str) -> dict[str, str]:
    return dict(zip(("anger", "sadness", "happiness", "fear", "surprise", "disgust"), words))


WORDINGS: tuple[Wording, ...] = (
    Wording("noun", "I was filled with {}.", _forms("anger", "sadness", "happiness", "fear", "surprise", "disgust")),
    Wording("adjective", "I felt so {}.", _forms("angry", "sad", "happy", "scared", "surprised", "disgusted")),
    Wording(
        "synonym",
        "By then I was {}.",
        _forms("furious", "heartbroken", "delighted", "terrified", "astonished", "revolted"),
    ),
    Wording(
        "instruction",
        "I answered in a voice full of {}.",
        _forms("rage", "grief", "joy", "dread", "shock", "revulsion"),
    ),
    Wording(
        "body",
        "{}",
        _forms(
            "My jaw tightened and my fists shook.",
            "My eyes filled and my shoulders sank.",
            "I grinned and wanted to dance.",
            "My heart pounded and my hands went cold.",
            "My eyebrows shot up and my mouth fell open.",
            "My stomach turned and I wrinkled my nose.",
        ),
        lexical=False,
    ),
)


def wording(name: str) -> Wording:
    """The wording of that name; raises InputError listing the choices."""
    for item in WORDINGS:
        if item.name == name:
            return item
    raise unknown("wording", name, [item.name for item in WORDINGS])


def wordings_for(emotions: Sequence[str]) -> tuple[Wording, ...]:
    """The wordings that cover a label set; a set of your own gets the noun wording made from its labels."""
    covered = tuple(w for w in WORDINGS if all(e in w.forms for e in emotions))
    return covered or (Wording("noun", "I was filled with {}.", {e: e for e in emotions}),)


def completion_prompt(group: Group, emotion_text: str = "") -> str:
    """Text for a base model, ending where the narrator begins to speak."""
    return f"{group.text}{' ' + emotion_text if emotion_text else ''}{SPEECH}"


def chat_messages(group: Group, emotion_text: str = "") -> list[dict[str, str]]:
    """The same request as a chat: scenario and event, how the narrator feels, and the task."""
    return [{"role": "user", "content": f"{group.text}{' ' + emotion_text if emotion_text else ''}\n{CHAT_TASK}"}]


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a text or of chat messages, with exactly one BOS where the tokenizer uses one.

    Chats are tokenised by the chat template itself, with the date pinned. Raises InputError without a template.
    """
    if isinstance(prompt, str):
        return once_bos(tokenizer, list(tokenizer(prompt)["input_ids"]))
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template; give plain text prompts instead of messages")
    ids = tokenizer.apply_chat_template(
        list(prompt), tokenize=True, add_generation_prompt=True, date_string=PINNED_DATE, return_dict=False
    )
    return once_bos(tokenizer, list(ids))


PLAIN_CHAT_STOP = "\nUser:"
"""Where an answer to `plain_chat` ends, since a completion model would go on with the user's next turn."""


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages as text for a model without a chat template: one "User:" or "Assistant:" line per turn.

    Instructions (system, developer) stand without a name. Ends with "Assistant:".
    """
    names = {"user": "User: ", "assistant": "Assistant: "}
    return "\n".join([*(names.get(m["role"], "") + m["content"] for m in messages), "Assistant:"])


def once_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with repeated leading BOS tokens collapsed to one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids
