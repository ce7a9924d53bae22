"""Plotly figures of circuits, from the plain data in a run's `circuits/` folder; see `plots` for the house rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import DIVERGING, QUIET, Matrix, figure, heat, number, numbers, text, whiskers
from emocircuits.plots import emotion_color

Row = Mapping[str, Any]
BLANK = "rgba(128,134,145,0.38)"
PER_LINE = 5
"""Nodes of a graph that stand beside each other on a phone."""
LINE = 52  # pixels between lines of nodes
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
    """Effect of every head, layers down and heads across, from [L][heads]; cells without a number are grey."""
    known = [abs(v) for row in values for v in numbers(row) if v is not None]
    top = max(known, default=1.0) or 1.0
    rows = [f"{i}" for i in range(len(values))]
    columns, tall = list(range(len(values[0]) if values else 0)), min(20, max(10, 320 // max(1, len(rows))))
    fig = heat(values, columns, rows, DIVERGING, (-top, top), "", height=120 + len(rows) * tall, show_values=False,
               title=title)  # fmt: skip
    blank = [[1 if number(v) is None else None for v in row] for row in values]
    if any(v for row in blank for v in row):
        fig.add_heatmap(
            z=blank, x=columns, y=rows, colorscale=[[0, BLANK], [1, BLANK]], showscale=False, xgap=1, ygap=1,
            hoverongaps=False, hovertemplate="%{x} of layer %{y}: not measured<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(tickprefix="h").update_yaxes(title_text="layer")
    return fig.update_layout(showlegend=False)


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
        fig.add_scatter(
            x=[p["n_neurons"] for p in points], y=middle, name=text(control), mode="lines+markers",
            line={"color": color, "width": 2.2, "dash": dash}, marker={"size": 6},
            error_y=whiskers(points, width=3),
        )  # fmt: skip
    sizes = {r["n_neurons"]: f"{r['n_neurons']} ({r['n_heads']})" for r in mine}
    fig.update_xaxes(type="log", tickvals=list(sizes), ticktext=list(sizes.values()))
    for y in (0, 1):
        fig.add_hline(y=y, line={"color": QUIET, "width": 1, "dash": "dash"})
    return fig.update_yaxes(tickformat=".0%")


def rank_curves(rows: Sequence[Row], kind: str, action: str) -> go.Figure:
    """Share of the emotion score over the number k of best units: solid anywhere, dashed in each layer, grey random."""
    label = {"ablate": "score without them", "enhance": "score they add"}[action]
    fig = figure(f"best {kind}, k", label, 400)
    mine = [r for r in rows if (r["kind"], r["action"]) == (kind, action)]
    colors = {"direct": "#6B4FD8", "attribution": "#009E73"}
    for rule, scope, control in dict.fromkeys((r["rule"], r["scope"], r["control"]) for r in mine):
        points = [r for r in mine if (r["rule"], r["scope"], r["control"]) == (rule, scope, control)]
        color, width = (colors.get(rule, QUIET), 2.2) if control == "best" else (QUIET, 1.2)
        fig.add_scatter(
            x=[p["k"] for p in points], y=numbers(p.get("estimate") for p in points),
            name=text(f"by {rule}" if control == "best" else "random"), legendgroup=f"{control} {rule}",
            showlegend=scope == "anywhere" and (control == "best" or rule == "direct"),
            mode="lines+markers", marker={"size": 5}, hovertemplate="%{x}: %{y:.0%}<extra>" + text(f"{rule}, {scope}")
            + (", random" if control == "random" else "") + "</extra>",
            line={"color": color, "width": width, "dash": "solid" if scope == "anywhere" else "dash"},
            error_y=whiskers(points, thickness=0.8, width=2),
        )  # fmt: skip
    fig.update_xaxes(type="log", tickvals=sorted({r["k"] for r in mine}))
    fig.add_hline(y=1 if action == "ablate" else 0, line={"color": QUIET, "width": 1, "dash": "dash"})
    return fig.update_yaxes(tickformat=".0%")


def circuit_graph(graph: Row, emotion: str, n_edges: int = 24) -> go.Figure:
    """Members by layer (heads round, neurons square, area by effect), the strongest edges between them and the score.

    Green raises the emotion score, orange lowers it; width by size.
    """
    nodes = graph["nodes"]
    places, ticks, top = _places(nodes)
    fig = figure("", "layer", round(70 + LINE * (top + 1)))
    _flows(fig, graph, places, (0.0, top), n_edges)
    _nodes(fig, nodes, places, emotion)
    fig.add_scatter(x=[0.0], y=[top], mode="markers+text", text=["score"], textposition="top center", showlegend=False,
                    marker={"symbol": "diamond", "size": 14, "color": QUIET}, hoverinfo="skip")  # fmt: skip
    fig.update_xaxes(visible=False, range=[-1.05, 1.05])
    return fig.update_yaxes(range=[-0.8, top + 0.6], tickvals=list(ticks.values()), ticktext=[str(k) for k in ticks])


def _flows(
    fig: go.Figure, graph: Row, places: Sequence[tuple[float, float]], end: tuple[float, float], n_edges: int
) -> None:
    """Draw the strongest edges, each with its value at its middle."""
    flows = [(places[a], places[b], value) for a, b, value in graph["edges"]]
    flows += [(places[i], end, n["direct"]) for i, n in enumerate(graph["nodes"])]
    flows = sorted(flows, key=lambda f: -abs(f[2]))[:n_edges]
    most = max((abs(f[2]) for f in flows), default=1.0) or 1.0
    for (x0, y0), (x1, y1), value in flows:
        line = {"color": "#009E73" if value > 0 else "#D55E00", "width": 0.6 + 5 * abs(value) / most}
        fig.add_scatter(x=[x0, x1], y=[y0, y1], mode="lines", line=line, opacity=0.6, hoverinfo="skip",
                        showlegend=False)  # fmt: skip
        middle = {"x": [(x0 + x1) / 2], "y": [(y0 + y1) / 2]}
        fig.add_scatter(**middle, mode="markers", marker={"size": 9, "opacity": 0}, showlegend=False,
                        hovertemplate=f"{value:+.3g}<extra></extra>")  # fmt: skip


def _nodes(fig: go.Figure, nodes: Sequence[Row], places: Sequence[tuple[float, float]], emotion: str) -> None:
    """Draw the members under their names, h11.2 or n3.17."""
    largest = max((abs(n["effect"]) for n in nodes), default=1.0) or 1.0
    for kind, symbol in (("heads", "circle"), ("neurons", "square")):
        mine = [(places[i], n) for i, n in enumerate(nodes) if n["kind"] == kind]
        names = [f"{kind[0]}{n['layer']}.{n['unit']}" for _, n in mine]
        fig.add_scatter(
            x=[p[0] for p, _ in mine], y=[p[1] for p, _ in mine], mode="markers+text", name=kind,
            text=names, textposition="bottom center", textfont={"size": 10},
            customdata=[[n["effect"], n["direct"], name] for (_, n), name in zip(mine, names)],
            hovertemplate="%{text}: %{customdata[0]:+.3g}, directly %{customdata[1]:+.3g}<extra></extra>",
            marker={"symbol": symbol, "color": emotion_color(emotion), "line": {"width": 1, "color": "#FFFFFF"},
                    "size": [8 + 18 * (abs(n["effect"]) / largest) ** 0.5 for _, n in mine]},
        )  # fmt: skip


def _places(nodes: Sequence[Row]) -> tuple[list[tuple[float, float]], dict[int, float], float]:
    """(x, y) of each node, the height of each layer that has some, and the height above all of them.

    Layers go from bottom to top on as many lines as their nodes need, heads before the neurons that read them; no two
    nodes of a line share a place, and lines are shifted so that an edge rarely runs through a node.
    """
    by_layer: dict[int, list[int]] = {}
    for i in sorted(range(len(nodes)), key=lambda i: (nodes[i]["layer"], nodes[i]["kind"], i)):
        by_layer.setdefault(nodes[i]["layer"], []).append(i)
    places, ticks, line = [(0.0, 0.0)] * len(nodes), {}, 0
    for layer, members in by_layer.items():
        n_lines = -(-len(members) // PER_LINE)
        ticks[layer] = line + (n_lines - 1) / 2
        for k in range(n_lines):
            mine = members[k * len(members) // n_lines : (k + 1) * len(members) // n_lines]
            shift = line * 0.618 % 1 - 0.5  # of a slot
            for j, i in enumerate(mine):
                lift = 0.12 if nodes[i]["kind"] == "neurons" else -0.12
                places[i] = (1.7 * ((j + 0.5 + 0.7 * shift) / len(mine) - 0.5), line + lift)
            line += 1
    return places, ticks, float(line)
