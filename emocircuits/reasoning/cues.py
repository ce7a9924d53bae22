"""Cue words of conversational reasoning: where a chain of thought turns, and counts of behaviours as a first draft."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..data.loaders import read_rows
from .society import Counts
from .steps import SPLITTERS, split
from .taxonomies import COGNITION, CONVERSATION
from .traces import Steps, Trace

_TURNS = (
    "wait", "hmm+", "hold on", "actually", "alternatively", "on the other hand", "however", "yet", "still", "instead",
    "but", "then again", "conversely", "another (?:way|view|approach|reading|possibility)", "what if", "maybe",
    "perhaps", "from (?:his|her|their|another|the other)", "looking at it", "seen from", "one (?:could|might) say",
    "some(?:one|body) (?:could|might)",
)  # fmt: skip
SHIFT = re.compile(rf"(?:(?:but|so|and|or) )?(?:{'|'.join(_TURNS)})\b|no[,:;.]", re.IGNORECASE)
"""What a sentence begins with that turns to another line of thought."""


def shifts(text: str) -> Iterator[int]:
    """Offsets of the sentences that begin with a shift marker."""
    return (at for at in SPLITTERS["sentence"](text) if SHIFT.match(text[at : at + 80].lstrip()))


def segments(text: str) -> Steps:
    """The text cut before each sentence that begins with a shift marker. Raises InputError for an empty text."""
    return split(text, shifts)


_CUES: dict[str, tuple[str, ...]] = {
    "perspective_shift": (
        "alternatively", "on the other hand", r"from (?:\w+ ){1,2}(?:side|view|point of view|perspective|angle)",
        "another (?:way|view|approach|reading|angle)", "one (?:could|might) say", r"some(?:one|body) (?:could|might) \w+",
    ),
    "conflict_of_perspectives": (
        "cannot both", "can't both", r"contradict\w*", r"disagree\w*", r"object\w* that", "i (?:do not|don't) (?:think so|agree)",
        r"no[,:;]",
    ),
    "reconciliation": (
        "both (?:are|can be|may be) (?:there|true|right)", r"reconcil\w+", "taken together", r"combin(?:e|ing) (?:both|the two)",
    ),
    "verification": (
        r"(?:double|re)-?check\w*", "let me (?:check|verify|confirm)", r"verif(?:y|ying)", "to check", "^check(?:ing)?",
        "does (?:it|this|that) (?:fit|work|hold|match)", "make sure", "sanity check",
    ),
    "backtracking": (
        r"start\w* (?:over|again)", "(?:go|going) back", "scrap that", "try (?:again|something else)", r"backtrack\w*",
        "(?:that|this) (?:is|was) (?:a mistake|wrong)", "made (?:a mistake|an error)",
    ),
    "subgoal_setting": (
        "^first,? (?:i|we|let)", r"(?:break|split) (?:this|it|the \w+) (?:in)?to", "in (?:two|three|four) steps",
        "step (?:1|one)", "the plan is",
    ),
    "backward_chaining": (
        "work(?:ing)? backwards?", r"to (?:end|get|reach|obtain|arrive)\b.{1,40}\b(?:last|must|need|have to)",
        "what (?:would|do) (?:we|i) need", "it would be enough",
    ),
}  # fmt: skip
_COMPILED = {
    name: re.compile(
        "|".join(rf"(?:{'' if cue.startswith('^') else r'(?<!\w)'}{cue}(?!\w))" for cue in cues), re.IGNORECASE
    )
    for name, cues in _CUES.items()
}


class CueCounter:
    """Counts by cue words, without a judge: the four conversational and the four cognitive behaviours. A first draft.

    A question counts as answered when a sentence that is no question follows it; every other behaviour is a sentence
    with one of its cues. Roles in Bales's sense have no cues of their own and are not counted. How far it agrees with
    twelve traces counted by hand (`counted_traces`) is in the guide; cues and traces are by the same authors, so on
    anyone else's reasoning it will do worse.
    """

    name = "cues"

    def count(self, trace: Trace) -> Counts:
        """Sentences of the trace that show each behaviour."""
        sentences = split(trace.steps.text, min_chars=2).texts
        values: dict[str, int | None] = {
            name: sum(bool(p.search(s)) for s in sentences) for name, p in _COMPILED.items()
        }
        asks = [s.rstrip("\"')”’").endswith("?") for s in sentences]
        values["question_answering"] = sum(a and not b for a, b in zip(asks, asks[1:]))
        return Counts({name: values[name] for name in (*CONVERSATION.names, *COGNITION.names)})


def counted_traces(part: str | None = None) -> list[tuple[Trace, Counts]]:
    """Our twelve short traces with counts by hand: "development" (cues were written on them), "held_out", or all."""
    rows = [row for _, row in read_rows(Path(__file__).parent.with_name("data") / "society.jsonl")]
    kept = [row for row in rows if part in (None, row["split"])]
    return [(Trace("", split(row["text"]), id=row["id"]), Counts(row["counts"])) for row in kept]
