"""Steps: exact spans that tile the text, sensible sentence ends, and the published pieces."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_traces import problems

from emocircuits.errors import InputError
from emocircuits.reasoning.answers import Boxed
from emocircuits.reasoning.steps import SPLITTERS, compat_split, cut_thinking, first_step, read_trace, split

PIECES = st.lists(
    st.sampled_from(
        [
            "Wait. ",
            "Then x = 3.5 of it",
            "\n\n",
            "\n",
            " ",
            "1. First item. ",
            "e.g. this ",
            "So what? ",
            "5! * 2!",
            "…",
        ]
        + ["“Stop!” he said. ", "  - item; more: ", "\r\n", "he felt。", "</b>", "\t", "A. B. Smith came. "]
    ),
    min_size=1,
    max_size=30,
)


@given(PIECES, st.sampled_from([*SPLITTERS, "pattern", "callable"]), st.integers(0, 12))
def test_steps_tile_the_text_and_none_is_too_short(pieces: list[str], by: str, min_chars: int) -> None:
    text = "".join(pieces)
    if not text.strip():
        with pytest.raises(InputError, match="no reasoning to split"):
            split(text)
        return
    how = {"pattern": re.compile(r"\n+"), "callable": lambda t: range(0, len(t), 7)}.get(by, by)
    steps = split(text, how, min_chars=min_chars)  # type: ignore[arg-type]
    assert "".join(text[a:b] for a, b in zip(steps.bounds, steps.bounds[1:])) == text
    if len(steps) > 1:
        assert min(map(len, steps.texts)) >= max(1, min_chars)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("It is 3.14 now. Then 2.", ["It is 3.14 now. ", "Then 2."]),
        ("1. Add both. 2. Halve it.", ["1. Add both. ", "2. Halve it."]),
        ("Plan:\n1. Add both.\n2. Halve it.", ["Plan:\n1. Add both.\n", "2. Halve it."]),
        ("Use fruit, e.g. Apples. Then Dr. Fu left.", ["Use fruit, e.g. Apples. ", "Then Dr. Fu left."]),
        (
            "That is 5! * 2! by the rule. He won! Great joy.",
            ["That is 5! * 2! by the rule. ", "He won! ", "Great joy."],
        ),
        ("“Go away!” She left. Why?", ["“Go away!” ", "She left. ", "Why?"]),
        ("First.\n\n  Second one", ["First.\n\n", "  Second one"]),
        ("他很高兴。她哭了。", ["他很高兴。", "她哭了。"]),
        ("no end at all", ["no end at all"]),
    ],
)
def test_where_sentences_end(text: str, steps: list[str]) -> None:
    found = split(text, min_chars=1)
    where = [text[a:b] for a, b in zip(found.bounds, found.bounds[1:])]
    # White space after a sentence: its line breaks are its own, spaces belong to the next.
    assert [w.strip() for w in where] == [s.strip() for s in steps]


def test_line_breaks_belong_to_the_step_before_and_spaces_to_the_step_after() -> None:
    assert split("First of all.\n\n  Second of all. Third of all.").bounds == (0, 15, 31, 45)


def test_short_steps_join_the_next_and_the_last_the_previous() -> None:
    assert split("Wait. So we know it. Yes.").texts == ("Wait. So we know it. Yes.",)
    assert split("Wait. So we know it. Yes.", min_chars=1).texts == ("Wait.", "So we know it.", "Yes.")


def test_other_ways_to_split() -> None:
    text = "One thing; another: more\nLine two. End here\n\nNext"
    assert split(text, "line", min_chars=1).texts == ("One thing; another: more", "Line two. End here", "Next")
    assert split(text, "paragraph", min_chars=1).texts == ("One thing; another: more\nLine two. End here", "Next")
    clauses = ("One thing;", "another:", "more", "Line two.", "End here", "Next")
    assert split(text, "clause", min_chars=1).texts == clauses
    with pytest.raises(InputError, match=r"unknown way to split 'words'; choose from sentence, clause"):
        split(text, "words")


def test_published_pieces_are_reproduced_exactly() -> None:
    for folder in problems():
        base = json.loads((folder / "base_solution.json").read_text())
        chunks = [row["chunk"] for row in json.loads((folder / "chunks_labeled.json").read_text())]
        steps = compat_split(cut_thinking(base["solution"])[1])
        assert list(steps.texts) == chunks
        assert steps.text == " ".join(chunks)


@given(PIECES)
def test_compat_pieces_tile_their_own_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    if text.strip():
        steps = compat_split(text)
        assert " ".join(steps.texts).split() == text.split()


def test_thinking_is_cut_out_and_nothing_is_lost() -> None:
    text = "Hm. <think>\nIt rains. So she is sad.\n</think>\n\\boxed{sad}"
    assert cut_thinking(text) == ("Hm. <think>", "\nIt rains. So she is sad.\n", "</think>\n\\boxed{sad}")
    assert cut_thinking("a b</think>c") == ("", "a b", "</think>c")
    assert cut_thinking("<think>never closed") == ("<think>", "never closed", "")
    trace = read_trace("Q? ", text, Boxed(), truth="sad", min_chars=1)
    assert trace.prompt + trace.steps.text + trace.ending == "Q? " + text
    assert (trace.steps.texts, trace.answer) == (("It rains.", "So she is sad."), "sad")
    assert read_trace("Q?", "No tags. \\boxed{4}", Boxed()).answer == "4"
    with pytest.raises(InputError, match="of 'p7' holds no reasoning: its think block is empty"):
        read_trace("Q?", "<think>\n\n</think> 4", id="p7")


def test_the_first_step_of_a_continuation() -> None:
    assert first_step(" So it is four. Then stop.") == "So it is four."
    assert first_step("</think>\n\\boxed{4}") == ""
    assert first_step("  ") == ""
