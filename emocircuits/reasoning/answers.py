"""Find the final answer in what a model wrote, say when it is complete, and whether it is right.

Answers are looked for in the completion only: a prefix may hold one of its own, which would be read for every rollout.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ..errors import InputError


class Answers(Protocol):
    """What the rest of this room asks of a way to answer."""

    def extract(self, text: str) -> str | None:
        """The normalised answer in a completion, None where it gives none."""
        ...

    def finished(self, text: str) -> bool:
        """Whether the answer stands there complete, so that sampling may stop."""
        ...

    def correct(self, answer: str | None, truth: str | None) -> bool | None:
        """Whether the answer is right (no answer is wrong); None where the right one is not known."""
        ...


@dataclass(frozen=True)
class Boxed:
    r"""Maths answers in \boxed{...}, the first one or the last one; braces are matched.

    Two answers are the same when their normalised LaTeX is, or when both are numbers of the same value.
    """

    which: str = "first"

    def __post_init__(self) -> None:
        if self.which not in ("first", "last"):
            raise InputError(f"which must be first or last, not {self.which!r}")

    def extract(self, text: str) -> str | None:
        found = _boxed(text)
        return plain_latex(found[0 if self.which == "first" else -1]) if found else None

    def finished(self, text: str) -> bool:
        return self.which == "first" and bool(_boxed(text))

    def correct(self, answer: str | None, truth: str | None) -> bool | None:
        if truth is None or answer is None:
            return None if truth is None else False
        a, b = plain_latex(answer), plain_latex(truth)
        x, y = number(a), number(b)
        return a == b or (x is not None and y is not None and math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12))


@dataclass(frozen=True)
class Labels:
    """One of a fixed set of words after a stem, such as "Answer: fear"; case does not matter.

    Any other word after the stem is no answer. Without labels every short line after the stem is one (open
    vocabulary), in lower case and without the punctuation around it.
    """

    labels: tuple[str, ...] = ()
    stem: str = "Answer:"
    scored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len({label.casefold() for label in self.labels}) < len(self.labels):
            raise InputError("labels must differ by more than their case")

    def _match(self, text: str) -> re.Match[str] | None:
        found = re.search(rf"{re.escape(self.stem.strip())}[^\S\n]*[*_\"'“(]*([^\s*_\"'“(][^\n]*)", text, re.IGNORECASE)
        if found is None or not self.labels:
            return found
        words = "|".join(sorted(map(re.escape, self.labels), key=len, reverse=True))
        return re.compile(rf"({words})(?!\w)", re.IGNORECASE).match(text, found.start(1))

    def extract(self, text: str) -> str | None:
        found = self._match(text)
        if found is None:
            return None
        return found[1].casefold() if self.labels else found[1].strip(" .!,;:*_\"'”)").casefold() or None

    def finished(self, text: str) -> bool:
        found = self._match(text)
        return found is not None and found.end(1) < len(text)  # what follows shows that the word is over

    def correct(self, answer: str | None, truth: str | None) -> bool | None:
        return None if truth is None else answer is not None and answer.casefold() == truth.casefold()


@dataclass(frozen=True)
class Pattern:
    """The first match of a regular expression: its group "answer", its first group, or all of it."""

    pattern: str
    normalise: Callable[[str], str] = str.strip

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"the answer pattern {self.pattern!r} is no regular expression: {error}") from error

    def extract(self, text: str) -> str | None:
        found = re.search(self.pattern, text)
        if found is None:
            return None
        named = found.groupdict().get("answer")
        return self.normalise(named if named is not None else found[1] if found.re.groups else found[0])

    def finished(self, text: str) -> bool:
        found = re.search(self.pattern, text)
        return found is not None and found.end() < len(text)

    def correct(self, answer: str | None, truth: str | None) -> bool | None:
        return None if truth is None else answer is not None and answer == self.normalise(truth)


@dataclass(frozen=True)
class LikelihoodAnswers(Labels):
    """Each label's probability right after prefix + reasoning + stem, so that no answer has to be sampled.

    Sampling should stop at the stem (`Sampling.stop`), for a model that has seen examples goes on to write it.
    """

    stem: str = "\nAnswer:"
    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise InputError("likelihood answers need at least two labels to choose from")

    @property
    def texts(self) -> tuple[str, ...]:
        """The labels as they follow the stem."""
        return tuple(label if self.stem.endswith((" ", "\n")) else f" {label}" for label in self.labels)


def _boxed(text: str) -> list[str]:
    r"""The contents of every closed \boxed{...}."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                found.append(text[match.end() : end])
                break
    return found


_DROPPED = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad)(?![A-Za-z])|[$\s]|\^\{?\\circ\}?|\\%|%")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}")


def plain_latex(text: str) -> str:
    """An answer without what does not change it: spacing, sizes, units in words, display forms."""
    text = _WORDS.sub(lambda m: m[1] if re.fullmatch(r"\s*\(?\w\)?\s*", m[1]) else "", text) or text
    text = _WORDS.sub(r"\1", text)
    text = _DROPPED.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"^[A-Za-z]=(?=.)", "", text)
    return text.rstrip(".")


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def number(latex: str) -> float | None:
    """The value of an arithmetic expression in plain LaTeX, None for anything else."""
    text = latex
    for _ in range(8):  # innermost first
        text, changed = re.subn(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text, roots = re.subn(r"\\sqrt\{([^{}]*)\}", r"((\1)**0.5)", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text)
        if not changed + roots:
            break
    text = text.replace("^", "**").replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", f"({math.pi})")
    text = re.sub(r"(?<=[\d)])(?=\()", "*", text)
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")
