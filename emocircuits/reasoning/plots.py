"""Plotly figures of reasoning traces, from plain data; see `emocircuits.plots` for the house rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import DIVERGING, GRID, QUIET, Matrix, figure, heat, number, numbers, text, whiskers

Row = Mapping[str, Any]
INK = "#6B4FD8"
ARC_LEVELS = 8
LIGHT = ((0.0, "rgba(107,79,216,0)"), (1.0, "rgba(107,79,216,0.75)"))
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98", "#7A5195")


def importance_along(
    steps: Sequence[str], rows: Sequence[Row], name: str = "importance, nats", first: int = 0
) -> go.Figure:
    """Importance of each step with its interval, and the noise floor; filled where it passes the null at 5 %.

    rows: `Importance.rows()`, of a window of steps when `first` is not 0. A step without a defined importance is a gap
    whose reason shows on hover.
    """
    places = list(range(first, first + len(rows)))
    fig = figure("step", name, 340)
    values = numbers(r.get("value") for r in rows)
    passes = [(number(r.get("p")) or 1.0) <= 0.05 for r in rows]
    fig.add_bar(
        x=places, y=values, error_y=whiskers(rows, "value", color=QUIET), name="importance",
        marker={"color": [INK if p else "rgba(107,79,216,0.25)" for p in passes]},
        customdata=[[_short(s), text(r.get("reason") or "")] for s, r in zip(steps, rows)],
        hovertemplate="step %{x}: %{y:.3f}<br>%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    floor = numbers(r.get("floor") for r in rows)
    fig.add_scatter(
        x=places, y=floor, mode="markers", name="noise floor", hoverinfo="skip",
        marker={"symbol": "line-ew-open", "size": 14, "color": QUIET},
    )  # fmt: skip
    return fig.update_layout(bargap=0.25)


def answers_along(
    shares: Mapping[str, Sequence[float | None]], truth: str | None = None, *, asked: bool = False, most: int = 8,
    first: int = 0,
) -> go.Figure:  # fmt: skip
    """Each answer at every boundary (step k begins at k); the right one is drawn thick.

    asked: the answers were asked for at once and not reached by reasoning on, so these are no shares of rollouts.
    """
    fig = figure("steps known", "probability when asked at once" if asked else "share of rollouts", 320)
    for i, (answer, curve) in enumerate(list(shares.items())[:most]):
        fig.add_scatter(
            x=list(range(first, first + len(curve))), y=numbers(curve), name=_short(answer, 24), mode="lines+markers",
            line={"color": _COLORS[i % len(_COLORS)], "width": 4 if answer == truth else 1.6},
        )  # fmt: skip
    return fig.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")


def effect_matrix(
    matrix: Matrix, steps: Sequence[str] = (), *, centred: bool = False, title: str = "", first: int = 0
) -> go.Figure:
    """Effect of each step (across) on each later one (down), from [target][source] of the steps from `first` on."""
    known = sorted(abs(v) for row in matrix for v in numbers(row) if v is not None)
    # One outlier must not turn all the rest white.
    top = known[max(0, math.ceil(0.99 * len(known)) - 1)] if known else 1.0
    places = list(range(first, first + len(matrix)))
    labels = [f"{i}: {_short(s, 28)}" if steps else str(i) for i, s in zip(places, steps or [""] * len(matrix))]
    limits = (-(top or 1.0), top or 1.0) if centred else (0.0, top or 1.0)
    fig = heat(
        matrix, places, labels, DIVERGING if centred else LIGHT, limits, "source step",
        height=140 + 22 * min(len(matrix), 40), show_values=False, form=".3f", title=title,
    )  # fmt: skip
    return fig.update_yaxes(showticklabels=len(matrix) <= 40)


def step_graph(
    matrix: Matrix, steps: Sequence[str], labels: Sequence[str | None] = (), most: int = 3, first: int = 0
) -> go.Figure:
    """The strongest links to each step, as arcs over the trace; steps are coloured by their label.

    matrix [target][source] of the steps from `first` on; of every step's sources the `most` largest positive ones are
    drawn.
    """
    n = len(steps)
    fig = figure("step", "", 320)
    links = []
    for j in range(n):
        row = [(number(v) or 0.0, i) for i, v in enumerate(matrix[j][:j])]
        links += [(v, i, j) for v, i in sorted(row, reverse=True)[:most] if v > 0]
    top = max((v for v, _, _ in links), default=1.0)
    for k in range(1, ARC_LEVELS + 1):  # arcs of one strength are one trace: plotly is slow with hundreds
        strength = k / ARC_LEVELS
        arcs = [_arc(first + i, first + j) for v, i, j in links if math.ceil(v / top * ARC_LEVELS) == k]
        fig.add_scatter(
            x=[x for xs, _ in arcs for x in xs], y=[y for _, ys in arcs for y in ys], mode="lines", showlegend=False,
            hoverinfo="skip",
            line={"color": f"rgba(107,79,216,{0.15 + 0.75 * strength:.2f})", "width": 0.6 + 3 * strength},
        )  # fmt: skip
    kinds = list(labels) or [None] * n
    for k, kind in enumerate(dict.fromkeys(kinds)):
        mine = [i for i in range(n) if kinds[i] == kind]
        fig.add_scatter(
            x=[first + i for i in mine], y=[0] * len(mine), mode="markers", name=text(kind or "step"),
            text=[_short(steps[i]) for i in mine],
            marker={"size": 12, "color": _COLORS[k % len(_COLORS)]}, hovertemplate="%{x}: %{text}<extra></extra>",
            showlegend=bool(labels),
        )  # fmt: skip
    return fig.update_yaxes(visible=False)


def _arc(i: int, j: int) -> tuple[list[float | None], list[float | None]]:
    """Half an ellipse from i to j, as high as it is long, and a gap after it."""
    angles = [math.pi * k / 24 for k in range(25)]
    x = [(i + j) / 2 - (j - i) / 2 * math.cos(a) for a in angles]
    return [*x, None], [*((j - i) * math.sin(a) for a in angles), None]


def sharp_heads(kurtosis: Matrix, heads: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Those (layer, head) whose attention to steps is sharper than even: excess kurtosis above 0."""
    return [(layer, head) for layer, head in heads if (number(kurtosis[layer][head]) or 0.0) > 0]


def receiver_map(kurtosis: Matrix, heads: Sequence[Sequence[int]] = ()) -> go.Figure:
    """Kurtosis of each head's attention to steps, by layer (down) and head (across).

    Of the given receiver heads those are ringed that are sharper than even.
    """
    heads = sharp_heads(kurtosis, heads)
    known = [v for row in kurtosis for v in numbers(row) if v is not None]
    top = max((abs(v) for v in known), default=1.0)
    columns = list(range(len(kurtosis[0]) if kurtosis else 0))
    fig = heat(kurtosis, columns, [str(i) for i in range(len(kurtosis))], DIVERGING, (-top, top), "",
               height=150 + 22 * len(kurtosis), show_values=False, form=".2f", title="excess kurtosis")  # fmt: skip
    if heads:
        fig.add_scatter(
            x=[h for _, h in heads], y=[str(layer) for layer, _ in heads], mode="markers", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 16, "color": INK, "line": {"width": 2}}, showlegend=False,
        )  # fmt: skip
    return fig.update_xaxes(tickprefix="h").update_yaxes(title_text="layer")


def marks_along(rows: Sequence[Row], most: int = 300, name: str = "importance, nats") -> go.Figure:
    """The `most` important steps of a whole trace at their places, for traces that are drawn in part."""
    known = [(v, i) for i, v in enumerate(numbers(r.get("value") for r in rows)) if v is not None]
    best = sorted(sorted(known, reverse=True)[:most], key=lambda mark: mark[1])
    fig = figure("step", name, 180)
    fig.add_scatter(
        x=[i for _, i in best], y=[v for v, _ in best], mode="markers", marker={"size": 6, "color": INK},
        customdata=[i for _, i in best], hovertemplate="step %{x}: %{y:.3f}<extra></extra>", showlegend=False,
    )  # fmt: skip
    return fig.update_xaxes(range=[-0.01 * len(rows), 1.01 * len(rows)])


def step_lines(
    steps: Sequence[str], curves: Mapping[str, Sequence[float | None]], y: str, x: str = "step", first: int = 0
) -> go.Figure:
    """Any numbers along the steps of a trace, or along what `x` names (`steps` shows on hover), one line each.

    first: the number of the first step.
    """
    fig = figure(x, y, 320)
    for i, (name, curve) in enumerate(curves.items()):
        fig.add_scatter(
            x=list(range(first, first + len(curve))), y=numbers(curve), name=text(name), mode="lines+markers",
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
