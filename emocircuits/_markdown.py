"""Small pieces of Markdown: tables, and the words of HTML that this package wrote."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; a bar inside a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines)


def plain(markup: str) -> str:
    """The words of HTML from the report's own functions."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))
