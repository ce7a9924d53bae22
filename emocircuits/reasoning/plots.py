"""Plotly figures of reasoning traces, from plain data; see `emocircuits.plots` for the house rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import DIVERGING, GRID, QUIET, Matrix, figure, heat, number, numbers, text, whiskers

Row = Mapping[str, Any]
INK = "#6B4FD8"
LIGHT = ((0.0, "rgba(107,79,216,0)"), (1.0, "rgba(107,79,216,0.75)"))
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98", "#7A5195")


def importance_along(steps: Sequence[str], rows: Sequence[Row], name: str = "importance, nats") -> go.Figure:
    """Importance of each step with its interval, and the noise floor; filled where it passes the null at 5 %.

    rows: `Importance.rows()`. A step without a defined importance is a gap whose reason shows on hover.
    """
    fig = figure("step", name, 340)
    values = numbers(r.get("value") for r in rows)
    passes = [(number(r.get("p")) or 1.0) <= 0.05 for r in rows]
    fig.add_bar(
        x=list(range(len(rows))), y=values, error_y=whiskers(rows, "value", color=QUIET), name="importance",
        marker={"color": [INK if p else "rgba(107,79,216,0.25)" for p in passes]},
        customdata=[[_short(s), text(r.get("reason") or "")] for s, r in zip(steps, rows)],
        hovertemplate="step %{x}: %{y:.3f}<br>%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    floor = numbers(r.get("floor") for r in rows)
    fig.add_scatter(
        x=list(range(len(rows))), y=floor, mode="markers", name="noise floor", hoverinfo="skip",
        marker={"symbol": "line-ew-open", "size": 14, "color": QUIET},
    )  # fmt: skip
    return fig.update_layout(bargap=0.25)


def answers_along(
    shares: Mapping[str, Sequence[float | None]], truth: str | None = None, *, asked: bool = False, most: int = 8
) -> go.Figure:
    """Each answer at every boundary (step k begins at k); the right one is drawn thick.

    asked: the answers were asked for at once and not reached by reasoning on, so these are no shares of rollouts.
    """
    fig = figure("steps known", "probability when asked at once" if asked else "share of rollouts", 320)
    for i, (answer, curve) in enumerate(list(shares.items())[:most]):
        fig.add_scatter(
            x=list(range(len(curve))), y=numbers(curve), name=_short(answer, 24), mode="lines+markers",
            line={"color": _COLORS[i % len(_COLORS)], "width": 4 if answer == truth else 1.6},
        )  # fmt: skip
    return fig.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")


def effect_matrix(matrix: Matrix, steps: Sequence[str] = (), *, centred: bool = False, title: str = "") -> go.Figure:
    """Effect of each step (across) on each later one (down), from [target][source]."""
    known = sorted(abs(v) for row in matrix for v in numbers(row) if v is not None)
    # One outlier must not turn all the rest white.
    top = known[max(0, math.ceil(0.99 * len(known)) - 1)] if known else 1.0
    labels = [f"{i}: {_short(s, 28)}" if steps else str(i) for i, s in enumerate(steps or [""] * len(matrix))]
    limits = (-(top or 1.0), top or 1.0) if centred else (0.0, top or 1.0)
    fig = heat(
        matrix, list(range(len(matrix))), labels, DIVERGING if centred else LIGHT, limits, "source step",
        height=140 + 22 * min(len(matrix), 40), show_values=False, form=".3f", title=title,
    )  # fmt: skip
    return fig.update_yaxes(showticklabels=len(matrix) <= 40)


def step_graph(matrix: Matrix, steps: Sequence[str], labels: Sequence[str | None] = (), most: int = 3) -> go.Figure:
    """The strongest links to each step, as arcs over the trace; steps are coloured by their label.

    matrix [target][source]; of every step's sources the `most` largest positive ones are drawn.
    """
    n = len(steps)
    fig = figure("step", "", 320)
    links = []
    for j in range(n):
        row = [(number(v) or 0.0, i) for i, v in enumerate(matrix[j][:j])]
        links += [(v, i, j) for v, i in sorted(row, reverse=True)[:most] if v > 0]
    top = max((v for v, _, _ in links), default=1.0)
    for v, i, j in sorted(links):
        # Half an ellipse from i to j, as high as it is long.
        angles = [math.pi * k / 24 for k in range(25)]
        fig.add_scatter(
            x=[(i + j) / 2 - (j - i) / 2 * math.cos(a) for a in angles],
            y=[(j - i) * math.sin(a) for a in angles], mode="lines", showlegend=False, hoverinfo="skip",
            line={"color": f"rgba(107,79,216,{0.15 + 0.75 * v / top:.2f})", "width": 0.6 + 3 * v / top},
        )  # fmt: skip
    kinds = list(labels) or [None] * n
    for k, kind in enumerate(dict.fromkeys(kinds)):
        mine = [i for i in range(n) if kinds[i] == kind]
        fig.add_scatter(
            x=mine, y=[0] * len(mine), mode="markers", name=text(kind or "step"), text=[_short(steps[i]) for i in mine],
            marker={"size": 12, "color": _COLORS[k % len(_COLORS)]}, hovertemplate="%{x}: %{text}<extra></extra>",
            showlegend=bool(labels),
        )  # fmt: skip
    return fig.update_yaxes(visible=False)


def receiver_map(kurtosis: Matrix, heads: Sequence[tuple[int, int]] = ()) -> go.Figure:
    """Kurtosis of each head's attention to steps, by layer (down) and head (across); receiver heads are ringed."""
    known = [v for row in kurtosis for v in numbers(row) if v is not None]
    top = max((abs(v) for v in known), default=1.0)
    columns = list(range(len(kurtosis[0]) if kurtosis else 0))
    fig = heat(kurtosis, columns, [str(i) for i in range(len(kurtosis))], DIVERGING, (-top, top), "head",
               height=150 + 22 * len(kurtosis), show_values=False, form=".2f", title="excess kurtosis")  # fmt: skip
    if heads:
        fig.add_scatter(
            x=[h for _, h in heads], y=[str(layer) for layer, _ in heads], mode="markers", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 16, "color": INK, "line": {"width": 2}}, showlegend=False,
        )  # fmt: skip
    return fig.update_yaxes(title_text="layer")


def step_lines(
    steps: Sequence[str], curves: Mapping[str, Sequence[float | None]], y: str, x: str = "step"
) -> go.Figure:
    """Any numbers along the steps of a trace, or along what `x` names (`steps` shows on hover), one line each."""
    fig = figure(x, y, 320)
    for i, (name, curve) in enumerate(curves.items()):
        fig.add_scatter(
            x=list(range(len(curve))), y=numbers(curve), name=text(name), mode="lines+markers",
            line={"color": _COLORS[i % len(_COLORS)]}, text=[_short(s) for s in steps],
            hovertemplate="%{x}: %{y:.3f}<br>%{text}",
        )  # fmt: skip
    return fig.add_hline(y=0, line={"color": GRID, "width": 1})


def agreement_bars(rows: Sequence[Row], x: str = "mean rank correlation within a trace") -> go.Figure:
    """Correlation of measures within traces, {name, estimate, low, high}, with their intervals; 0 is chance.

    x: what the numbers are, for others whose 0 is no effect.
    """
    rows = list(rows)[::-1]
    fig = figure(x, "", 120 + 26 * len(rows))
    fig.add_scatter(
        x=numbers(r.get("estimate") for r in rows), y=[text(r["name"]) for r in rows], mode="markers",
        marker={"size": 9, "color": INK}, showlegend=False,
        error_x=whiskers(rows, thickness=1.4, color=QUIET),
    )  # fmt: skip
    return fig.add_vline(x=0, line={"color": QUIET, "width": 1, "dash": "dash"})


def _short(value: str, most: int = 90) -> str:
    flat = " ".join(str(value).split())
    return text(flat if len(flat) <= most else flat[: most - 1] + "…")
