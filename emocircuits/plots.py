"""Plotly figures from plain data: the same functions serve the report, the notebooks and the explorer.

Every function takes numbers as a run folder's JSON holds them (None or NaN is a gap, never 0) and returns a
figure with a transparent background. An emotion keeps its colour and its marker in every figure; the colours
are the colour-blind-safe ones of Okabe and Ito (2008). Text from data is shown as text, not as markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import (
    DIVERGING,
    QUIET,
    SEQUENTIAL,
    Matrix,
    alpha,
    figure,
    gap,
    heat,
    layers_of,
    legend_symbol,
    log_axis,
    note,
    number,
    numbers,
    share,
    short,
    span,
    text,
)

Row = Mapping[str, Any]

EMOTION_COLORS = {
    "anger": "#D55E00",
    "sadness": "#0072B2",
    "happiness": "#E69F00",
    "fear": "#CC79A7",
    "surprise": "#56B4E9",
    "disgust": "#009E73",
    "neutral": "#8A8F98",
}
METHOD_COLORS = {"unsteered": "#C3C8D0", "random": "#9AA2B0", "prompted": "#66738A", "steered": "#6B4FD8"}
_SPARE_COLORS = ("#7A5195", "#665C00", "#3D7068", "#8C564B", "#4C4C99")
_METHOD_SPARES = ("#6B4FD8", "#009E73", "#E69F00", "#0072B2", "#CC79A7", "#8A8F98", "#56B4E9")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def emotion_color(emotion: str) -> str:
    """The fixed colour of an emotion; one that is not among the basic six gets a spare colour by its name."""
    spare = _SPARE_COLORS[sum(emotion.encode()) % len(_SPARE_COLORS)]
    return EMOTION_COLORS.get(emotion, spare)


# ------------------------------------------------------------------------------------------ direction quality


def quality_by_layer(direction_set: Row, layers: Sequence[int], chance: float, measure: str = "accuracy") -> go.Figure:
    """Held-out `measure` ("accuracy" or "auroc") of one direction set at every layer, one line per test.

    `direction_set` is an entry of quality.json's "sets". Accuracy carries the interval of the first test, the
    accuracy across training themes that chose the layer, and the shuffled-label null from mean to upper limit.
    """
    fig = figure("layer", "AUROC" if measure == "auroc" else measure, height=430)
    if measure == "accuracy":
        _null_band(fig, direction_set.get("null") or {}, layers)
        across = direction_set.get("across_themes")
        if across:
            line = {"color": QUIET, "width": 2, "dash": "dot"}
            fig.add_scatter(x=list(layers), y=numbers(across), name="left-out training themes", mode="lines", line=line)
    for i, test in enumerate(direction_set.get("tests") or []):
        _test_line(fig, test, measure, i)
    fig.add_hline(y=chance, line={"color": QUIET, "width": 1.2, "dash": "dash"})
    note(fig, f"chance {chance:.2f}", x=1, y=chance, xref="paper", xanchor="right", yanchor="bottom")
    best = direction_set.get("best_layer")
    if best is not None:
        fig.add_vline(x=best, line={"color": QUIET, "width": 1.2, "dash": "dot"})
        note(fig, f"layer {best}", x=best, y=0.02, yref="paper", xanchor="left", yanchor="bottom", xshift=4)
    return fig.update_yaxes(range=[0, 1.03])


def _null_band(fig: go.Figure, null: Row, layers: Sequence[int]) -> None:
    if not null.get("mean") or not null.get("high"):
        return
    x, low, high = list(layers), numbers(null["mean"]), numbers(null["high"])
    fig.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor="rgba(128,134,145,0.25)",
        line={"width": 0},
        mode="lines",
        name="shuffled labels",
        hoverinfo="skip",
    )


def _test_line(fig: go.Figure, test: Row, measure: str, i: int) -> None:
    rows = sorted(test.get("rows") or [], key=lambda row: row["layer"])
    color, name = _LINE_COLORS[i % len(_LINE_COLORS)], text(test.get("name", "test"))
    x = [row["layer"] for row in rows]
    if measure == "accuracy" and i == 0:  # one band: those of every test at once would hide the lines
        banded = [r for r in rows if number(r.get("low")) is not None and number(r.get("high")) is not None]
        edge = [r["layer"] for r in banded]
        fig.add_scatter(
            x=[*edge, *reversed(edge)],
            y=[*(r["high"] for r in banded), *(r["low"] for r in reversed(banded))],
            fill="toself",
            fillcolor=alpha(color, 0.18),
            line={"width": 0},
            mode="lines",
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
    line = {"color": color, "width": 2.4, "dash": _DASHES[i % len(_DASHES)]}
    y = numbers(row.get(measure) for row in rows)
    fig.add_scatter(x=x, y=y, name=name, legendgroup=name, mode="lines+markers", line=line, marker={"size": 5})


def split_half_map(values: Matrix, emotions: Sequence[str], layers: Sequence[int]) -> go.Figure:
    """Cosine [E][n_layers] between directions fitted on two halves of the scenarios, or between two sets."""
    return heat(values, list(layers), emotions, DIVERGING, (-1, 1), "layer", show_values=False, title="cosine")


def geometry_map(cosines: Matrix, emotions: Sequence[str]) -> go.Figure:
    """Cosines [E][E] between the emotions' directions at one layer."""
    return heat(cosines, [text(e) for e in emotions], emotions, DIVERGING, (-1, 1), "", height=340)


def embedding_scatter(points: Sequence[Row], axes: tuple[str, str] = ("PC 1", "PC 2")) -> go.Figure:
    """Readings {"x", "y", "emotion", "theme", "held_out"} in the plane; held-out ones are open diamonds."""
    fig = figure(*axes, height=440)
    for emotion in dict.fromkeys(p["emotion"] for p in points):
        for held_out in (False, True):
            mine = [p for p in points if p["emotion"] == emotion]
            rows = [p for p in mine if bool(p.get("held_out")) == held_out]
            marker = {
                "color": emotion_color(emotion),
                "symbol": "diamond-open" if held_out else "circle",
                "size": 9 if held_out else 6,
                "opacity": 0.95 if held_out else 0.5,
                "line": {"width": 1.6 if held_out else 0},
            }
            fig.add_scatter(
                x=numbers(p["x"] for p in rows),
                y=numbers(p["y"] for p in rows),
                mode="markers",
                name=text(emotion),
                legendgroup=text(emotion),
                showlegend=bool(rows) and (not held_out or len(rows) == len(mine)),
                marker=marker,
                text=[f"{text(p['emotion'])}, {text(p.get('theme', ''))}" for p in rows],
                hovertemplate="%{text}<extra>" + ("held out" if held_out else "training") + "</extra>",
            )
    legend_symbol(fig, "training", "circle")
    legend_symbol(fig, "held out", "diamond-open")
    return fig


# ------------------------------------------------------------------------------------------------- evaluation


def expression_bars(methods: Mapping[str, Row], emotions: Sequence[str], measure: str = "coherent") -> go.Figure:
    """Rate of `measure` ("coherent" or "expression") by emotion and over all, one bar per method.

    `methods` maps a method to its entry of evaluation.json: intervals over all texts, and in "by_emotion".
    """
    fig = figure("", f"{measure} expression" if measure == "coherent" else measure, height=400)
    spare = cycle(_METHOD_SPARES)
    for method, scores in methods.items():
        per = scores.get("by_emotion") or {}
        intervals = [(per.get(e) or {}).get(measure) or {} for e in emotions] + [scores.get(measure) or {}]
        rates = [number(i.get("estimate")) for i in intervals]
        up = [gap(i.get("high"), rate) for i, rate in zip(intervals, rates)]
        down = [gap(rate, i.get("low")) for i, rate in zip(intervals, rates)]
        color = METHOD_COLORS.get(method) or next(spare)
        # Two greys side by side need more than their shade: the control is hatched.
        pattern = {"shape": "/" if method == "random" else "", "fillmode": "replace", "size": 5}
        fig.add_bar(
            x=[*map(text, emotions), "all"],
            y=rates,
            name=text(method),
            marker={"color": color, "pattern": pattern, "line": {"width": 1, "color": color}},
            error_y={"array": up, "arrayminus": down, "color": QUIET, "thickness": 1.2, "width": 2},
            hovertemplate="%{x}: %{y:.1%}<extra>" + text(method) + "</extra>",
        )
    fig.update_layout(barmode="group", bargap=0.22, bargroupgap=0.06).update_xaxes(showgrid=False)
    return fig.update_yaxes(range=[0, 1.03], tickformat=".0%")


def confusion_map(confusion: Row) -> go.Figure:
    """Counts of target (row) against what the judge read (column): {"rows", "columns", "counts"}."""
    counts = confusion["counts"]
    shares = [[share(n, row) for n in row] for row in counts]
    columns = [text(c) for c in confusion["columns"]]
    fig = heat(shares, columns, confusion["rows"], SEQUENTIAL, (0, 1), "read by the judge as", height=330)
    fig.data[0].update(text=[["" if n is None else str(n) for n in row] for row in counts], texttemplate="%{text}")
    fig.data[0].update(hovertemplate="target %{y}, read as %{x}: %{text} (%{z:.0%})<extra></extra>")
    return fig


# -------------------------------------------------------------------------------------------- tuning and dose


def pareto(
    candidates: Sequence[Row], doses: Sequence[Row], chosen: Mapping[str, Row], unsteered: Any = None
) -> go.Figure:
    """Expression rate against median perplexity (log axis); the front of all points is the stepped line.

    `candidates` and `doses` are rows of tuning.json and dose.json, `chosen` maps an emotion to its setting,
    `unsteered` is the median perplexity without steering.
    """
    fig = figure("median perplexity", "expresses the emotion", height=460)
    front = pareto_front([*candidates, *doses])
    line = {"color": QUIET, "width": 1.4, "shape": "hv", "dash": "dot"}
    fig.add_scatter(x=[p for p, _ in front], y=[e for _, e in front], mode="lines", line=line, name="front")
    for emotion in dict.fromkeys(row["emotion"] for row in [*candidates, *doses]):
        mine = [row for row in candidates if row["emotion"] == emotion]
        picked = [row for row in mine if is_chosen(row, chosen)]
        _cost_points(fig, emotion, mine, "circle", 6, 0.45, legend=True)
        _cost_points(fig, emotion, [r for r in doses if r["emotion"] == emotion], "diamond-open", 7, 0.8)
        _cost_points(fig, emotion, picked, "star", 15, 1.0)
    for name, symbol in (("tuning", "circle"), ("dose", "diamond-open"), ("chosen", "star")):
        legend_symbol(fig, name, symbol)
    if (base := number(unsteered)) is not None and base > 0:
        fig.add_vline(x=base, line={"color": QUIET, "width": 1.2, "dash": "dash"})
        note(fig, "unsteered", x=math.log10(base), y=1, yref="paper", xanchor="left", yanchor="top", xshift=4)
    fig.update_xaxes(**log_axis(row.get("perplexity") for row in [*candidates, *doses]))
    return fig.update_yaxes(range=[-0.02, 1.03], tickformat=".0%")


def _cost_points(
    fig: go.Figure,
    emotion: str,
    rows: Sequence[Row],
    symbol: str,
    size: int,
    opacity: float,
    legend: bool = False,
) -> None:
    edge = {"width": 1.2, "color": "rgba(20,20,20,0.75)"} if symbol == "star" else {}
    notes = [f"{layers_of(r.get('layers'))}strength {short(r.get('strength'))}, n {r.get('n', '?')}" for r in rows]
    fig.add_scatter(
        x=numbers(r.get("perplexity") for r in rows),
        y=numbers(r.get("expression") for r in rows),
        mode="markers",
        name=text(emotion),
        legendgroup=text(emotion),
        showlegend=legend,
        marker={
            "symbol": symbol,
            "size": size,
            "opacity": opacity,
            "color": emotion_color(emotion),
            "line": edge,
        },
        text=notes,
        hovertemplate="%{text}<br>expression %{y:.0%}, perplexity %{x:.1f}<extra>" + text(emotion) + "</extra>",
    )


def pareto_front(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """(perplexity, expression) of the rows that no row beats on both, from the cheapest; gaps are skipped."""
    pairs = [(number(r.get("perplexity")), number(r.get("expression"))) for r in rows]
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(((c, -g) for c, g in pairs if c is not None and g is not None)):
        if not front or -gain > front[-1][1]:
            front.append((cost, -gain))
    return front


def dose_response(rows: Sequence[Row], measure: str = "coherent") -> go.Figure:
    """`measure` of the text against signed strength, in multiples of the chosen strength, a line per emotion.

    Measures: "coherent", "expression", "named", "degenerate" (rates) or "perplexity" (log axis).
    """
    fig = figure("strength (1 is the chosen one)", measure)
    for i, emotion in enumerate(dict.fromkeys(row["emotion"] for row in rows)):
        mine = [r for r in rows if r["emotion"] == emotion and number(r.get("relative")) is not None]
        mine.sort(key=lambda r: r["relative"])
        color = emotion_color(emotion)
        fig.add_scatter(
            x=[r["relative"] for r in mine],
            y=numbers(r.get(measure) for r in mine),
            mode="lines+markers",
            name=text(emotion),
            line={"color": color, "width": 2},
            marker={"color": color, "size": 7, "symbol": _SYMBOLS[i % len(_SYMBOLS)]},
            text=[f"{short(r.get('strength'))} of the residual norm, n {r.get('n', '?')}" for r in mine],
            hovertemplate="%{text}<br>%{y:.3g}<extra>" + text(emotion) + "</extra>",
        )
    for x in (0, 1):
        fig.add_vline(x=x, line={"color": QUIET, "width": 1, "dash": "dash" if x else "solid"})
    if measure == "perplexity":
        return fig.update_yaxes(**log_axis(row.get(measure) for row in rows))
    return fig.update_yaxes(range=[-0.02, 1.03], tickformat=".0%")


def tuning_map(candidates: Sequence[Row], emotion: str, chosen: Row | None = None) -> go.Figure:
    """Coherent rate of one emotion's candidates: layers by strength, the chosen one framed."""
    mine = [row for row in candidates if row["emotion"] == emotion]
    spans = sorted({tuple(row["layers"]) for row in mine})
    strengths = sorted({row["strength"] for row in mine})
    score = {(tuple(row["layers"]), row["strength"]): number(row.get("coherent")) for row in mine}
    values = [[score.get((span, s)) for s in strengths] for span in spans]
    rows, columns = [span(s) for s in spans], [short(s) for s in strengths]
    fig = heat(values, columns, rows, SEQUENTIAL, (0, 1), "strength", height=150 + 26 * len(spans), form=".0%")
    fig.update_yaxes(title_text="layers")
    picked = [row for row in mine if is_chosen(row, {emotion: chosen or {}})]
    for row in picked[:1]:
        x, y = strengths.index(row["strength"]), spans.index(tuple(row["layers"]))
        frame = {"color": emotion_color(emotion), "width": 3}
        fig.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line=frame)
    return fig


def is_chosen(row: Row, chosen: Mapping[str, Row]) -> bool:
    """Whether a candidate of tuning.json is the setting that was chosen for its emotion."""
    setting = chosen.get(row["emotion"]) or {}
    strength, picked = number(row["strength"]), number(setting.get("strength"))
    if strength is None or picked is None or list(row["layers"]) != list(setting.get("layers") or []):
        return False
    return math.isclose(strength, picked, rel_tol=1e-6)
