"""What every figure is made of: an empty figure in the house style, a heat map, and careful numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

Matrix = Sequence[Sequence[float | None]]

QUIET = "rgba(128,134,145,0.9)"
FEW = 12  # columns that all find room for their number
GRID = "rgba(128,134,145,0.22)"
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Zero is transparent and the top is not opaque, so that a page's own ink stays readable in light and in dark.
SEQUENTIAL = ((0.0, "rgba(0,114,178,0)"), (1.0, "rgba(0,114,178,0.62)"))
DIVERGING = ((0.0, "rgba(213,94,0,0.7)"), (0.5, "rgba(128,134,145,0)"), (1.0, "rgba(0,114,178,0.7)"))


def number(value: Any) -> float | None:
    """A finite number, or None for everything else (null, NaN, infinity, text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(values: Iterable[Any]) -> list[float | None]:
    """`number` of each value: what plotly draws, with gaps where nothing is defined."""
    return [number(value) for value in values]


def text(value: object) -> str:
    """Data as plotly should show it: plotly reads a little HTML, and data must not be markup."""
    return html.escape(str(value), quote=False)


def figure(x: str, y: str, height: int = 360) -> go.Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "automargin": True}
    fig = go.Figure()
    fig.update_layout(
        template="none",
        height=height,
        font={"family": FONT, "size": 13, "color": "#6B7280"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 12, "t": 16, "b": 44},
        legend={"orientation": "h", "x": 0, "y": 1.03, "yanchor": "bottom", "itemsizing": "constant"},
        dragmode=False,
        hoverlabel={"font": {"family": FONT}},
    )
    fig.update_xaxes(**axis, title={"text": x, "standoff": 10})
    return fig.update_yaxes(**axis, title={"text": y, "standoff": 8})


def heat(
    values: Matrix,
    columns: Sequence[Any],
    rows: Sequence[str],
    scale: Sequence[tuple[float, str]],
    limits: tuple[float, float],
    x: str,
    *,
    height: int = 320,
    show_values: bool = True,
    form: str = ".2f",
    title: str = "",
) -> go.Figure:
    fig = figure(x, "", height)
    text_columns = any(len(str(column)) > 5 for column in columns)
    bar = {
        "orientation": "h", "thickness": 9, "len": 0.6, "y": 1.03, "yanchor": "bottom", "outlinewidth": 0,
        "nticks": 4, "tickangle": 0,
    }  # fmt: skip
    fig.add_heatmap(
        z=[numbers(row) for row in values],
        x=columns,
        y=[text(row) for row in rows],
        colorscale=[list(stop) for stop in scale],
        zmin=limits[0],
        zmax=limits[1],
        texttemplate="%{z:" + form + "}" if show_values else None,
        hovertemplate="%{y}, %{x}: %{z:" + form + "}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        showscale=not show_values,
        colorbar={**bar, "title": {"text": title, "side": "top"}},
    )
    fig.update_xaxes(showgrid=False, tickangle=-40 if text_columns else 0)
    fig.update_xaxes({"type": "category"} if show_values else {"dtick": 1 if len(columns) <= FEW else 2})
    return fig.update_yaxes(showgrid=False, autorange="reversed", type="category")


def log_axis(values: Iterable[Any]) -> dict[str, Any]:
    """Settings of a log axis that fits `values`: round ticks, few when the range is wide."""
    known = [v for value in values if (v := number(value)) is not None and v > 0]
    low, high = (min(known), max(known)) if known else (1.0, 10.0)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 3) if high / low < 1000 else (1,)
    ticks = [step * 10.0**power for power in range(-3, 13) for step in steps]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}


def note(fig: go.Figure, words: str, **where: Any) -> None:
    fig.add_annotation(text=words, showarrow=False, font={"size": 11}, **where)


def legend_symbol(fig: go.Figure, name: str, symbol: str) -> None:
    """A legend entry that says what a marker's shape means."""
    marker = {"symbol": symbol, "color": QUIET, "size": 9}
    fig.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)


def alpha(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def gap(upper: Any, lower: Any) -> float | None:
    a, b = number(upper), number(lower)
    return None if a is None or b is None else max(a - b, 0.0)


def whiskers(points: Sequence[Mapping[str, Any]], middle: str = "estimate", **style: Any) -> dict[str, Any]:
    """Error bars of plotly from intervals {middle, low, high}; an end that is not defined has no bar."""

    def reach(point: Mapping[str, Any], end: str) -> float:
        edge, centre = number(point.get(end)), number(point.get(middle))
        return 0.0 if edge is None or centre is None else abs(edge - centre)

    up, down = zip(*((reach(p, "high"), reach(p, "low")) for p in points), strict=True) if points else ((), ())
    return {"type": "data", "array": list(up), "arrayminus": list(down), "thickness": 1, **style}


def share(count: Any, row: Sequence[Any]) -> float | None:
    total = sum(n or 0 for n in row)
    return None if count is None or not total else count / total


def short(value: Any) -> str:
    found = number(value)
    return "?" if found is None else f"{found:.3g}"


def span(layers: Sequence[int]) -> str:
    """`5–9` for neighbouring layers, else the list."""
    layers = list(layers)
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"


def layers_of(layers: Any) -> str:
    return f"layers {span(layers)}, " if layers else ""
