"""Cut reasoning into steps: exact spans of the text, nothing stripped, nothing lost.

A step ends after its line breaks and before the spaces that follow them, so the text of a prefix is always what the
model saw. `compat="thought_anchors"` gives the pieces of the published pipeline instead (arXiv 2506.19143): stripped,
joined by one space, the tail kept (the released code drops it, the released data has it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import InputError, unknown
from .answers import Answers
from .traces import Steps, Trace

Splitter = Callable[[str], Iterable[int]]
"""text -> offsets in it before which a step begins; 0 and the end need not be among them."""

_CLOSERS = "\"'”’»)]}*_`$"
_ENDS = re.compile(
    rf"(?P<stop>[.!?…]+[{re.escape(_CLOSERS)}]*)(?=\s)|(?P<cjk>[。！？]+[”’」』）]*)|(?P<blank>\n[^\S\n]*\n)"
)
_GAP = re.compile(r"[^\S\n]*(?:\n[^\S\n]*)*\n|")  # line breaks after a step belong to it, indentation does not
_ABBREVIATED = re.compile(
    r"(?:\b(?:e\.g|i\.e|a\.k\.a|cf|vs|approx|resp|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Fig|Eq|Eqs|Sec|No|Nos|Vol|pp|al)"
    r"|(?:^|\s)[A-Z](?=\.\s[A-Z]\.)|\.[A-Za-z])$"
)
_FACTORIAL = re.compile(r"[\d)}]!+\s+(?![A-Z])")
_NUMERAL = re.compile(
    r"(?:^|\n)[^\S\n]*(?:[-*>][^\S\n]+)?(?:\*\*|\()?(?:\d{1,3}|[A-Za-z]|[ivx]{2,4})$|[.!?]\s+\d{1,2}$"
)


def split(text: str, by: str | re.Pattern[str] | Splitter = "sentence", *, min_chars: int = 10) -> Steps:
    """Steps that tile the text.

    by: "sentence" (decimals, list numerals and common abbreviations do not end one), "clause" (also after ; and : and
    at every line break), "line", "paragraph" (blank lines), a pattern whose matches end a step, or a `Splitter`.
    min_chars: shorter steps join the next one (the last one the previous), so that "Wait." is not a step of its own.
    Raises InputError for a text of white space only.
    """
    if not text.strip():
        raise InputError("there is no reasoning to split: the text is empty")
    if isinstance(by, str):
        if by not in SPLITTERS:
            raise unknown("way to split", by, SPLITTERS)
        offsets = SPLITTERS[by](text)
    elif isinstance(by, re.Pattern):
        offsets = (m.end() for m in by.finditer(text))
    else:
        offsets = by(text)
    cuts = sorted({o for o in offsets if 0 < o < len(text)})
    return Steps(text, tuple(_merged(text, [0, *cuts, len(text)], max(1, min_chars))))


def compat_split(text: str) -> Steps:
    """The published pipeline's pieces, as steps of those pieces joined by a space (the prefix its models saw)."""
    pieces = [p for p in re.split(r"(?<=\r\n\r\n)|(?<=\n\n)|(?<=[.?!])(?=[ \n])", text.strip()) if p.strip()]
    if not pieces:
        raise InputError("there is no reasoning to split: the text is empty")
    merged: list[str] = []
    for piece in map(str.strip, pieces):
        if merged and len(merged[-1]) < 10:
            merged[-1] += " " + piece
        else:
            merged.append(piece)
    if len(merged) > 1 and len(merged[-1]) < 10:
        merged[-2:] = [merged[-2] + " " + merged[-1]]
    return joined(merged)


def joined(pieces: Sequence[str]) -> Steps:
    """Steps that are pieces joined by a space, which belongs to the step after it."""
    return Steps.of([*pieces[:1], *(f" {piece}" for piece in pieces[1:])])


def cut_thinking(text: str, tags: tuple[str, str] = ("<think>", "</think>")) -> tuple[str, str, str]:
    """(before, reasoning, after): the reasoning is between the tags; to the end where it was never closed.

    A text with only the closing tag reasons from its start on (the prompt held the opening one); one with neither is
    all reasoning. The tags stay with the parts around it, so the three parts joined are the text.
    """
    opened = text.find(tags[0])
    start = opened + len(tags[0]) if opened >= 0 else 0
    closed = text.find(tags[1], start)
    end = closed if closed >= 0 else len(text)
    return text[:start], text[start:end], text[end:]


def read_trace(
    prompt: str,
    completion: str,
    answers: Answers | None = None,
    by: str | re.Pattern[str] | Splitter = "sentence",
    *,
    truth: str | None = None,
    id: str = "",
    min_chars: int = 10,
) -> Trace:
    """A trace from what a model was given and what it wrote: thinking cut out, split, the answer extracted.

    Raises InputError when there is no reasoning (an empty think block) to split.
    """
    before, reasoning, after = cut_thinking(completion)
    if not reasoning.strip():
        raise InputError(f"the completion{f' of {id!r}' if id else ''} holds no reasoning: its think block is empty")
    answer = answers.extract(after or reasoning) if answers else None
    return Trace(prompt + before, split(reasoning, by, min_chars=min_chars), after, answer, truth, id=id)


def first_step(text: str, by: str | re.Pattern[str] | Splitter = "sentence", *, min_chars: int = 10) -> str:
    """The first step of a continuation, stripped; "" for one that holds no text (or ends the thinking at once)."""
    reasoning = cut_thinking(text)[1]
    return split(reasoning, by, min_chars=min_chars).texts[0] if reasoning.strip() else ""


# ---------------------------------------------------------------- where steps end


def _sentences(text: str) -> Iterator[int]:
    for match in _ENDS.finditer(text):
        if match["stop"] and _protected(text, match.start("stop")):
            continue
        end = match.start() if match["blank"] else match.end()
        yield _GAP.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty string, too


def _protected(text: str, mark: int) -> bool:
    """Whether the mark belongs to an abbreviation, a list's numeral or a factorial, and ends no sentence."""
    before = text[mark - 12 : mark] if mark > 12 else "\n" + text[:mark]
    if text[mark] == "!":
        return bool(_FACTORIAL.match(text, mark - 1))
    return text[mark] == "." and bool(_NUMERAL.search(before) or _ABBREVIATED.search(before))


def _clauses(text: str) -> Iterator[int]:
    yield from _sentences(text)
    yield from (_GAP.match(text, m.end()).end() for m in re.finditer(r"[;:](?=\s)", text))  # type: ignore[union-attr]
    yield from _lines(text)


def _lines(text: str) -> Iterator[int]:
    return (m.end() for m in re.finditer(r"\n\s*?(?=[^\S\n]*\S)", text))


def _paragraphs(text: str) -> Iterator[int]:
    return (m.end() for m in re.finditer(r"\n[^\S\n]*\n(?:[^\S\n]*\n)*", text))


SPLITTERS: dict[str, Splitter] = {
    "sentence": _sentences, "clause": _clauses, "line": _lines, "paragraph": _paragraphs,
}  # fmt: skip


def _merged(text: str, bounds: list[int], min_chars: int) -> list[int]:
    """Bounds without those that would leave a step of fewer than `min_chars` characters (white space apart)."""
    kept = [0]
    for end in bounds[1:-1]:
        if len(text[kept[-1] : end].strip()) >= min_chars:
            kept.append(end)
    while len(kept) > 1 and len(text[kept[-1] :].strip()) < min_chars:
        kept.pop()
    return [*kept, bounds[-1]]
