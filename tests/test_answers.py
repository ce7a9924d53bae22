"""Answers: found, known to be complete, compared by value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.errors import InputError
from emocircuits.reasoning.answers import Boxed, Labels, LikelihoodAnswers, Pattern, number, plain_latex

EKMAN = ("anger", "sadness", "fear")


def test_boxed_answers_match_their_braces() -> None:
    text = r"So \boxed{\frac{1}{2}} and \boxed{7}, \boxed{never closed"
    assert Boxed().extract(text) == r"\frac{1}{2}"
    assert Boxed("last").extract(text) == "7"
    assert Boxed().extract("none here") is None
    assert Boxed().finished(r"so \boxed{x}")
    assert not Boxed().finished(r"so \boxed{\frac{1}")
    assert not Boxed("last").finished(text)  # a later one may come


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", "0.5"), ("1,250", "1250"), (r"90^\circ", "90"), (r"12\text{ cm}", "12"), ("x=5", "5"),
        (r"\frac12", r"\frac{1}{2}"), (r"\sqrt{4}", "2"), (r"2^{10}", "1024"), (r"3\cdot 4", "12"), ("6.170", "6.17"),
        (r"\text{(C)}", "(C)"), (r"\left( 1, 2 \right)", "(1,2)"), (r"50\%", "50"), (r"\frac{\sqrt{9}}{2}", "1.5"),
    ],
)  # fmt: skip
def test_equal_answers(a: str, b: str) -> None:
    assert Boxed().correct(a, b)


@pytest.mark.parametrize(("a", "b"), [("2", "3"), ("x", "y"), (r"\frac{1}{3}", "0.33"), ("(1,2)", "(2,1)")])
def test_different_answers(a: str, b: str) -> None:
    assert Boxed().correct(a, b) is False


def test_no_answer_is_wrong_and_no_truth_is_unknown() -> None:
    assert Boxed().correct(None, "4") is False
    assert Boxed().correct("4", None) is None
    assert Labels(EKMAN).correct(None, "fear") is False


@given(st.text(alphabet="0123456789.+-*/^(){}\\frac sqrt__import", max_size=25))
def test_hostile_answers_are_never_run(text: str) -> None:
    assert number(plain_latex(text)) is None or isinstance(number(plain_latex(text)), float)
    assert number("9**9**9**9**9") is None


def test_labels_after_the_stem() -> None:
    answers = Labels(EKMAN)
    assert answers.extract("She hides.\nAnswer: Fear\n") == "fear"
    assert answers.extract("answer: **Anger** because") == "anger"
    assert answers.extract("Answer: fearless\n") is None
    assert answers.extract("Answer: joy") is None
    assert answers.extract("fear") is None
    assert not answers.finished("Answer: fear")  # may become "fearless"
    assert answers.finished("Answer: fear\n")
    assert answers.correct("fear", "Fear")


def test_open_vocabulary() -> None:
    assert Labels().extract("Answer: Mild relief.\nNext") == "mild relief"
    assert Labels().finished("Answer: Mild relief.\n")
    assert not Labels().finished("Answer: Mild relief.")
    assert Labels().extract("Answer:   \nNext") is None


def test_patterns() -> None:
    assert Pattern(r"#### (\d+)").extract("so #### 42") == "42"
    assert Pattern(r"is (?P<answer>\w+), not (\w+)").extract("is fear, not joy") == "fear"
    assert Pattern(r"\d+").extract("7 8") == "7"
    assert not Pattern(r"\d+").finished("so 7")
    with pytest.raises(InputError, match="is no regular expression"):
        Pattern("(")


def test_labels_must_be_told_apart() -> None:
    with pytest.raises(InputError, match="differ by more than their case"):
        Labels(("Fear", "fear"))
    with pytest.raises(InputError, match="at least two labels"):
        LikelihoodAnswers(("fear",))
