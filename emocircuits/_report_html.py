"""Small pieces of the report's HTML: careful numbers, tables, figures and the page that holds them.

Everything that returns HTML has escaped the data inside it; functions that take HTML say so.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from emocircuits._figures import number
from emocircuits._markdown import plain
from emocircuits.plots import emotion_color

MINUS = "\N{MINUS SIGN}"
UNSET = {"scenarios": "all of ours", "problems": "all"}
"""What settings other than counts mean where they are not set."""


def esc(value: object) -> str:
    """Any value as text that HTML cannot misread."""
    return html.escape(str(value), quote=True)


def num(value: Any, form: str = ".2f", reason: Any = None) -> str:
    """A number, or "n/a (reason)" where it is undefined."""
    found = number(value)
    if found is None:
        return f'<span class="na">n/a ({esc(reason or "not defined by the data")})</span>'
    return format(found, form).replace("-", MINUS)


def pct(value: Any, reason: Any = None) -> str:
    """A rate as a percentage without decimals, or "n/a (reason)"."""
    return num(value, ".0%", reason)


def interval(found: Mapping[str, Any] | None, form: str = ".0%", scale: float = 1.0) -> str:
    """An estimate with its confidence interval; undefined parts say why. `scale` multiplies every number."""
    found = found or {"reason": "not recorded"}
    estimate, low, high = (number(found.get(key)) for key in ("estimate", "low", "high"))
    if estimate is None:
        return num(None, reason=found.get("reason"))
    if low is None or high is None:
        why = esc(found.get("reason") or "not recorded")
        return f'{num(estimate * scale, form)} <span class="na">(no interval: {why})</span>'
    bounds = f"{num(low * scale, form)}, {num(high * scale, form)}".replace("%", "")
    return f'{num(estimate * scale, form)} <span class="ci">[{bounds}]</span>'


def points(found: Mapping[str, Any] | None) -> str:
    """A difference of rates as signed percentage points with its interval."""
    return interval(found, "+.0f", 100.0)


def p_value(value: Any, reason: Any = None) -> str:
    """A p value in the usual short form."""
    found = number(value)
    return "&lt;&nbsp;0.001" if found is not None and found < 0.001 else num(value, ".3f", reason)


def emotion_label(emotion: object) -> str:
    """An emotion's name with its dot of colour."""
    color = emotion_color(str(emotion))
    return f'<span class="emotion"><span class="dot" style="background:{color}"></span>{esc(emotion)}</span>'


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, strong: str = "", wide: bool = True
) -> str:
    """A table from HTML cells, with `caption` (HTML) above it.

    The first cell of a row is its header; the row that starts with `strong` stands out. The caption is no
    caption element, so that it does not scroll sideways with a wide table.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for first, *rest in rows:
        mark = ' class="strong"' if strong and first == strong else ""
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body.append(f'<tr{mark}><th scope="row">{first}</th>{cells}</tr>')
    kind = "scroll wide" if wide else "scroll"
    name = esc(plain(caption) or ", ".join(map(plain, head)))
    above = f'<p class="caption">{caption}</p>' if caption else ""
    return (
        f'{above}<div class="{kind}" role="region" tabindex="0" aria-label="{name}">'
        f'<table aria-label="{name}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def facts(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(name, value) pairs of nested plain data as HTML; intervals stay whole, names are joined by spaces."""
    if isinstance(values, Mapping) and not {"estimate", "low", "high"} <= set(values):
        found = [pair for key, value in values.items() for pair in facts(_meant(key, value), f"{prefix} {key}".strip())]
        return [(name.replace("_", " "), value) for name, value in found]
    return [(esc(prefix), _value(values))]


def _meant(key: str, value: Any) -> Any:
    """A count of what to use that is not set means all of it."""
    if value is not None:
        return value
    return "all" if key.startswith("n_") else UNSET.get(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return interval(value)
    if value is None or isinstance(value, float):
        return num(value, ".4g")
    if isinstance(value, (list, tuple)):
        return esc(", ".join(map(str, value)))
    return esc(value)


def fact_list(values: Any) -> str:
    """Nested plain data as a two-column list."""
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts(values))
    return f'<dl class="facts">{rows}</dl>'


def note(words: str) -> str:
    """A quiet remark; `words` is HTML."""
    return f'<p class="note">{words}</p>'


@dataclass
class Page:
    """Collects sections and figures, then writes one page that needs nothing but itself."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def figure(self, fig: Any, label: str, caption: str = "") -> str:
        """The HTML of a plotly figure; `label` is plain text and names it, `caption` is HTML below it."""
        name = f"figure-{len(self.figures) + 1}"
        self.figures[name] = fig.to_json()
        height = int(fig.layout.height or 360)
        words = f"<strong>{esc(label)}</strong>{'. ' + caption if caption else ''}"
        return (
            f'<figure><div class="plot" id="{name}" role="img" aria-label="{esc(label)}" '
            f'style="min-height:{height}px"></div><figcaption>{words}</figcaption></figure>'
        )

    def add(self, anchor: str, title: str, body: str) -> None:
        """Append a section of HTML."""
        self.sections.append((anchor, title, body))

    def render(self, header: str) -> str:
        """The whole document; `header` is the HTML above the first section."""
        from plotly.offline import get_plotlyjs

        links = "".join(f'<li><a href="#{a}">{esc(title)}</a></li>' for a, title, _ in self.sections)
        body = "".join(
            f'<section id="{a}" aria-labelledby="{a}-title"><h2 id="{a}-title">{esc(title)}</h2>{content}</section>'
            for a, title, content in self.sections
        )
        figures = ",".join(f"{json.dumps(name)}:{fig}" for name, fig in self.figures.items())
        parts = {
            "title": esc(self.title),
            "header": header,
            "links": links,
            "body": body,
            "plotly": get_plotlyjs().replace("</script", "<\\/script"),
            "figures": _inside_script("{" + figures + "}"),
            "data": _inside_script(json.dumps(self.data)),
        }
        # One pass, so that data which looks like a placeholder stays what it is.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template())


@lru_cache(maxsize=1)
def _template() -> str:
    return resources.files("emocircuits").joinpath("report_template.html").read_text("utf-8")


def _inside_script(text: str) -> str:
    """JSON that can stand inside a script element: without "<" nothing can end it or open a comment."""
    return text.replace("<", "\\u003c")
