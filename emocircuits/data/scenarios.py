"""Scenario sets: short first-person scenes, each with a good, an indifferent and a bad outcome.

The structure (themes x scenarios x three valences) follows the SEV data of "Do LLMs 'Feel'? Emotion Circuits
Discovery and Control" (Wang et al., 2025); the texts are our own. `discovery()` is for finding directions and
circuits; `heldout()` shares no theme with it and is for judging them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

from emocircuits.errors import InputError, unknown

VALENCES = ("positive", "neutral", "negative")
_FOLDER = Path(__file__).parent
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True)
class Scenario:
    """One row: a scene, its outcome per valence and, in our own sets, one spoken reply per emotion.

    `replies` all answer the outcome named by `reply_to`; a set without replies has `reply_to=None` and `{}`.
    """

    theme: str
    scenario: str
    events: Mapping[str, str] = field(hash=False)
    skeleton_id: str
    reply_to: str | None = None
    replies: Mapping[str, str] = field(default_factory=dict, hash=False)

    def group(self, valence: str) -> Group:
        """The scene with the outcome of one valence; InputError on an unknown valence."""
        if valence not in self.events:
            raise unknown("valence", valence, self.events)
        return Group(self.skeleton_id, self.theme, valence, self.scenario, self.events[valence])


@dataclass(frozen=True)
class Group:
    """One (scenario, valence) pair: the unit in which the emotions are contrasted."""

    skeleton_id: str
    theme: str
    valence: str
    scenario: str
    event: str

    @property
    def text(self) -> str:
        """What a prompt shows: the scene, then what happened."""
        return f"{self.scenario} {self.event}"


@dataclass(frozen=True)
class ScenarioSet:
    """An ordered, immutable collection of scenarios; `len` counts scenarios, not groups."""

    rows: tuple[Scenario, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Scenario]:
        return iter(self.rows)

    @property
    def themes(self) -> tuple[str, ...]:
        """The distinct themes, in order of first appearance."""
        return tuple(dict.fromkeys(row.theme for row in self.rows))

    def groups(self, valences: Sequence[str] = VALENCES) -> list[Group]:
        """Every (scenario, valence) pair, scenario by scenario; InputError on an unknown valence."""
        return [row.group(valence) for row in self.rows for valence in valences]

    def reply_groups(self) -> list[tuple[Group, Mapping[str, str]]]:
        """Each scenario's replied-to group with its {emotion: reply}; InputError if there are no replies."""
        pairs = [(row.group(row.reply_to), row.replies) for row in self.rows if row.reply_to is not None]
        if not pairs:
            raise InputError("this scenario set holds no replies; use discovery() or heldout(), which have them")
        return pairs

    def split(
        self, by: Literal["theme", "scenario"] = "scenario", fraction: float = 0.2, seed: int = 0
    ) -> tuple[ScenarioSet, ScenarioSet]:
        """(train, validation): disjoint, row order kept, `fraction` of the themes or scenarios in validation.

        `by="theme"` moves whole themes; `by="scenario"` draws evenly from every theme and never parts rows
        that share a scenario text. Both sides get at least one; InputError when that cannot be done.
        """
        if by not in ("theme", "scenario"):
            raise unknown("split", by, ("theme", "scenario"))
        if not 0 < fraction < 1:
            raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
        rng = random.Random(seed)
        units = rng.sample(self.themes, len(self.themes)) if by == "theme" else self._spread_scenarios(rng)
        if len(units) < 2:
            raise InputError(f"cannot split by {by}: the set holds {len(units)}, and a split needs at least 2")
        held = set(units[: min(max(round(fraction * len(units)), 1), len(units) - 1)])
        train = tuple(row for row in self.rows if getattr(row, by) not in held)
        validation = tuple(row for row in self.rows if getattr(row, by) in held)
        return ScenarioSet(train), ScenarioSet(validation)

    def _spread_scenarios(self, rng: random.Random) -> list[str]:
        """Distinct scenario texts in a random order of which every prefix is balanced over the themes."""
        ranked: list[tuple[float, float, str]] = []
        theme_of = {row.scenario: row.theme for row in self.rows}
        for theme in self.themes:
            texts = [text for text, its_theme in theme_of.items() if its_theme == theme]
            rng.shuffle(texts)
            ranked += [((rank + 0.5) / len(texts), rng.random(), text) for rank, text in enumerate(texts)]
        return [text for _, _, text in sorted(ranked)]


@cache
def discovery() -> ScenarioSet:
    """Our discovery set: 8 themes x 20 scenarios, with replies."""
    return load_sev(_FOLDER / "scenarios.jsonl")


@cache
def heldout() -> ScenarioSet:
    """Our held-out set: 4 themes x 10 scenarios, with replies; no theme is shared with `discovery()`."""
    return load_sev(_FOLDER / "heldout.jsonl")


def load_sev(path: str | Path) -> ScenarioSet:
    """Read a JSON Lines file in the SEV schema (Wang et al., 2025): theme, scenario, event, skeleton_id.

    `event` maps positive, neutral and negative to a sentence. Our own `reply_to` and `replies` are optional
    and come together; other keys are ignored. InputError names the file and line of the first unusable row.
    """
    path = Path(path)
    rows: list[Scenario] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse_row(line, where)
        if row.skeleton_id in line_of:
            first = line_of[row.skeleton_id]
            raise InputError(
                f"{where}: skeleton_id {row.skeleton_id!r} was already used on line {first}; ids are unique"
            )
        line_of[row.skeleton_id] = number
        rows.append(row)
    if not rows:
        raise InputError(f"{path}, line 1: the file is empty; expected one JSON object per line")
    return ScenarioSet(tuple(rows))


def near_duplicates(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Pairs (i, j, similarity), i < j, of texts with word Jaccard similarity >= threshold, closest first.

    Similarity is in [0, 1], over lower-case words. InputError on a bad threshold or a text without words.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must lie in (0, 1], got {threshold}")
    bags = [frozenset(_words(text)) for text in texts]
    for index, bag in enumerate(bags):
        if not bag:
            raise InputError(f"text {index} has no words, so its similarity is undefined; remove it")
    scored = ((i, j, len(bags[i] & bags[j]) / len(bags[i] | bags[j])) for i, j in combinations(range(len(bags)), 2))
    return sorted((pair for pair in scored if pair[2] >= threshold), key=lambda pair: -pair[2])


def affect_words(text: str) -> list[str]:
    """The words of `text` (lower case, in order) that our affect lexicon `lexicon.txt` lists."""
    exact, stems = _lexicon()
    kin = re.sub(r"\bgreat-", "", text, flags=re.IGNORECASE)  # a great-aunt is kin, not praise
    return [word for word in _words(kin) if word in exact or word.startswith(stems)]


@cache
def _lexicon() -> tuple[frozenset[str], tuple[str, ...]]:
    """(exact words, stems) of the affect lexicon."""
    lines = (line.strip() for line in (_FOLDER / "lexicon.txt").read_text(encoding="utf-8").splitlines())
    entries = [line for line in lines if line and not line.startswith("#")]
    exact = frozenset(entry for entry in entries if not entry.endswith("*"))
    return exact, tuple(entry[:-1] for entry in entries if entry.endswith("*"))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def _lines(path: Path) -> list[str]:
    """The file's lines; split on newlines only, since JSON strings may hold other Unicode line breaks."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read the scenario file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 JSON Lines") from error


def _parse_row(line: str, where: str) -> Scenario:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}")
    event = _table(row, "event", where)
    reply_to, replies = _parse_replies(row, where)
    return Scenario(
        theme=_text(row, "theme", where),
        scenario=_text(row, "scenario", where),
        events={valence: _text(event, valence, where, inside="event.") for valence in VALENCES},
        skeleton_id=_text(row, "skeleton_id", where),
        reply_to=reply_to,
        replies=replies,
    )


def _parse_replies(row: Mapping[str, object], where: str) -> tuple[str | None, dict[str, str]]:
    """The optional pair (reply_to, replies), or (None, {})."""
    if row.get("reply_to") is None and row.get("replies") is None:
        return None, {}
    reply_to = _text(row, "reply_to", where)
    if reply_to not in VALENCES:
        raise InputError(f"{where}: reply_to is {reply_to!r}; choose from {', '.join(VALENCES)}")
    table = _table(row, "replies", where)
    return reply_to, {emotion: _text(table, emotion, where, inside="replies.") for emotion in table}


def _table(row: Mapping[str, object], key: str, where: str) -> Mapping[str, object]:
    value = _value(row, key, where)
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: {key!r} must be a JSON object with entries, got {_kind(value)}")
    return value


def _text(row: Mapping[str, object], key: str, where: str, inside: str = "") -> str:
    value = _value(row, key, where, inside)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {inside + key!r} must be a string with text, got {_kind(value)}")
    return value


def _value(row: Mapping[str, object], key: str, where: str, inside: str = "") -> object:
    if key not in row:
        raise InputError(f"{where}: the key {inside + key!r} is missing")
    return row[key]


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if not value and value is not None else type(value).__name__
