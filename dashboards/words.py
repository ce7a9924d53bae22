"""Data as words: numbers with their intervals, and text that Markdown cannot misread; no Streamlit in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emocircuits import _report_html as report
from emocircuits._markdown import plain

__all__ = ["file_name", "md", "num", "p_value", "plain", "points", "rate"]

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:&@])")


def md(value: object) -> str:
    """Any value as text inside Markdown: no markup, formula, colour, icon, image or line break comes of it."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))


def num(value: Any, form: str = ".2f") -> str:
    """A number, or n/a."""
    found = report.number(value)
    return "n/a" if found is None else format(found, form).replace("-", report.MINUS)


def rate(found: Mapping[str, Any] | float | None, form: str = ".0%") -> str:
    """A rate with its interval as text, such as 80% [75, 85]; undefined ones say why."""
    return plain(report.interval(found, form) if isinstance(found, Mapping) or found is None else num(found, form))


def points(found: Mapping[str, Any] | None) -> str:
    """A difference of rates in percentage points with its interval, as text."""
    return plain(report.points(found))


def p_value(value: Any) -> str:
    """A p value as text."""
    return plain(report.p_value(value)).replace("\N{NO-BREAK SPACE}", " ")


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60] or "figure"
