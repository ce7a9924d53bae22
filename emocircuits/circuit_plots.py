"""Plotly figures of circuits, from the plain data in a run's `circuits/` folder; see `plots` for the house rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import DIVERGING, QUIET, Matrix, figure, heat, number, numbers, text
from emocircuits.plots import emotion_color

Row = Mapping[str, Any]
CONTROL_STYLES = {
    "circuit": ("#6B4FD8", "solid"),
    "circuit (resample)": ("#6B4FD8", "dot"),
    "circuit by attribution": ("#009E73", "solid"),
    "circuit by attribution, random": ("#9FC7B8", "dot"),
    "layer-matched random": ("#8A8F98", "solid"),
    "size-matched random": ("#8A8F98", "dash"),
    "another emotion's": ("#E69F00", "solid"),
}


def head_map(values: Matrix, title: str = "effect") -> go.Figure:
    """Effect of every head, layers down and heads across, from [L][heads]."""
    known = [abs(v) for row in values for v in numbers(row) if v is not None]
    top = max(known, default=1.0) or 1.0
    rows = [f"{i}" for i in range(len(values))]
    columns = list(range(len(values[0]) if values else 0))
    fig = heat(values, columns, rows, DIVERGING, (-top, top), "head", height=120 + 20 * len(rows), show_values=False,
               title=title)  # fmt: skip
    return fig.update_yaxes(title_text="layer")


def neuron_ranks(scores: Sequence[Sequence[float]], ranks: Sequence[int], emotions: Sequence[str]) -> go.Figure:
    """Score of the k-th best neuron over k, both on log axes: how concentrated the emotion is."""
    fig = figure("rank of the neuron", "contribution, share of residual norm", 380)
    for emotion, row in zip(emotions, scores):
        y = [v if (v := number(s)) is not None and v > 0 else None for s in row]
        line = {"color": emotion_color(emotion), "width": 2}
        fig.add_scatter(x=list(ranks), y=y, name=text(emotion), mode="lines+markers", line=line)
    return fig.update_xaxes(type="log", tickvals=list(ranks)).update_yaxes(type="log")


def influence_by_sublayer(influence: Row, emotions: Sequence[str]) -> go.Figure:
    """Influence of a push along the local direction at each sublayer: MLP solid, attention dashed."""
    fig = figure("layer", "change of the end score per unit pushed", 400)
    for kind, dash in (("mlp", "solid"), ("attn", "dash")):
        for emotion, row in zip(emotions, influence[kind]):
            line = {"color": emotion_color(emotion), "width": 2, "dash": dash}
            fig.add_scatter(
                x=list(range(len(row))), y=numbers(row), name=text(emotion), legendgroup=emotion, mode="lines",
                line=line, showlegend=kind == "mlp",
                hovertemplate="layer %{x}: %{y:.3g}<extra>" + text(f"{emotion}, {kind}") + "</extra>",
            )  # fmt: skip
    return fig


def circuit_curves(rows: Sequence[Row], action: str) -> go.Figure:
    """Share of the emotion score over circuit size, for the circuit and its controls, with 95 % intervals."""
    mine = [r for r in rows if r["action"] == action]
    label = {"keep": "score with nothing else intact", "ablate": "score without it", "enhance": "score it adds"}[action]
    fig = figure("neurons in the circuit (heads in brackets)", label, 400)
    for control in dict.fromkeys(r["control"] for r in mine):
        points = sorted((r for r in mine if r["control"] == control), key=lambda r: r["n_neurons"])
        color, dash = CONTROL_STYLES.get(control, (QUIET, "dot"))
        middle = numbers(p.get("estimate") for p in points)
        up, down = ([_gap(p, end) for p in points] for end in ("high", "low"))
        fig.add_scatter(
            x=[p["n_neurons"] for p in points], y=middle, name=text(control), mode="lines+markers",
            line={"color": color, "width": 2.2, "dash": dash}, marker={"size": 6},
            error_y={"type": "data", "array": up, "arrayminus": down, "thickness": 1, "width": 3},
        )  # fmt: skip
    sizes = {r["n_neurons"]: f"{r['n_neurons']} ({r['n_heads']})" for r in mine}
    fig.update_xaxes(type="log", tickvals=list(sizes), ticktext=list(sizes.values()))
    for y in (0, 1):
        fig.add_hline(y=y, line={"color": QUIET, "width": 1, "dash": "dash"})
    return fig.update_yaxes(tickformat=".0%")


def _gap(point: Row, end: str) -> float:
    edge, middle = number(point.get(end)), number(point.get("estimate"))
    return 0.0 if edge is None or middle is None else abs(edge - middle)
