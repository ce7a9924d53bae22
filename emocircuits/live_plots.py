"""Plotly figures of a text token by token, from plain data; see `emocircuits.plots` for the house rules."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from emocircuits._figures import QUIET, Matrix, alpha, figure, heat, number, numbers, text
from emocircuits.plots import emotion_color

NEUTRAL = "#6B4FD8"
GREY = "#80868F"
SCALE = "Full colour: the top 2% of all weights but those on the first token, where heads rest."
TOOLBAR = 34  # pixels above the first line, so that the toolbar hides no word of it


def token_strip(
    pieces: Sequence[str], values: Sequence[float], color: str = NEUTRAL, *, columns: int = 40, top: float | None = None
) -> go.Figure:
    """A text as it reads, each token on a ground as strong as its value: `color` above zero, grey below.

    `columns` characters make a line; `top` is the value of the full colour (default: the largest of the text).
    """
    shown = [_visible(piece) for piece in pieces]
    places = _lines([max(1, _width(piece)) for piece in shown], columns)
    limit = top or max((abs(v) for v in numbers(values) if v is not None), default=0.0) or 1.0
    lines = max((line for line, _, _ in places), default=0) + 1
    fig = figure("", "", height=26 * lines + 4 + TOOLBAR)
    fig.add_bar(
        orientation="h",
        y=[line for line, _, _ in places],
        base=[start for _, start, _ in places],
        x=[size for _, _, size in places],
        text=[text(piece) for piece in shown],
        textposition="inside",
        insidetextanchor="middle",
        constraintext="none",
        textfont={"family": "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace", "size": 13},
        cliponaxis=False,
        marker={
            "color": numbers(values), "cmin": -limit, "cmax": limit, "line": {"width": 0},
            "colorscale": [[0, alpha("#80868F", 0.5)], [0.5, alpha("#80868F", 0.0)], [1, alpha(color, 0.65)]],
        },
        customdata=[[text(repr(piece)), _value(value)] for piece, value in zip(pieces, values)],
        hovertemplate="%{customdata[0]}: %{customdata[1]}<extra></extra>",
    )  # fmt: skip
    fig.update_layout(barmode="overlay", bargap=0.12, margin={"l": 0, "r": 0, "t": TOOLBAR, "b": 4})
    fig.update_xaxes(visible=False, range=[0, columns], fixedrange=True)
    return fig.update_yaxes(visible=False, range=[lines - 0.5, -0.5], fixedrange=True)


def _visible(piece: str) -> str:
    return piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace("\t", " ").strip(" ") or " "


def _width(piece: str) -> int:
    """Columns that a monospaced font needs, and one for the gap."""
    return 1 + sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in piece)


def _lines(widths: Sequence[int], columns: int) -> list[tuple[int, int, int]]:
    """(line, column, width) of each token, broken into lines as a text is."""
    out, line, column = [], 0, 0
    for width in widths:
        if column and column + width > columns:
            line, column = line + 1, 0
        out.append((line, column, width))
        column += width
    return out


def _value(value: object) -> str:
    found = number(value)
    return "n/a" if found is None else f"{found:+.3g}"


def along_lines(
    pieces: Sequence[str], scores: Matrix, emotions: Sequence[str], *, only: Sequence[str] = (), smooth: int = 1
) -> go.Figure:
    """Score of every emotion over the tokens of a text, from [T][E]; `smooth` averages each with those just before it.

    Emotions outside `only` (when given) are hidden until they are clicked in the legend.
    """
    fig = figure("token", "projection, residual norms", 360)
    ticks = [text(_visible(piece)) for piece in pieces]
    for i, emotion in enumerate(emotions):
        y = _running([row[i] for row in scores], smooth)
        fig.add_scatter(
            x=list(range(len(y))), y=y, name=text(emotion), mode="lines", text=ticks,
            visible=True if not only or emotion in only else "legendonly",
            line={"color": emotion_color(emotion), "width": 2.2},
            hovertemplate="%{text}: %{y:+.3f}<extra>" + text(emotion) + "</extra>",
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": QUIET, "width": 1, "dash": "dash"})
    step = max(1, len(ticks) // 12)
    return fig.update_xaxes(tickvals=list(range(0, len(ticks), step)), ticktext=ticks[::step], tickangle=-40)


def _running(values: Sequence[float | None], n: int) -> list[float | None]:
    """Mean of each value and up to n - 1 before it; None where none is defined."""
    known = numbers(values)
    windows = ([v for v in known[max(0, i + 1 - n) : i + 1] if v is not None] for i in range(len(known)))
    return [sum(w) / len(w) if w else None for w in windows]


def layer_map(scores: Matrix, layers: Sequence[int], pieces: Sequence[str]) -> go.Figure:
    """One emotion's score of every token (down) at every layer (across), from [T][n_layers]."""
    known = [abs(v) for row in scores for v in numbers(row) if v is not None]
    top = max(known, default=1.0) or 1.0
    scale = ((0.0, alpha("#80868F", 0.6)), (0.5, alpha("#80868F", 0.0)), (1.0, alpha(NEUTRAL, 0.8)))
    rows = [f"{i} {_visible(piece)}" for i, piece in enumerate(pieces)]  # the number keeps equal tokens apart
    return heat(scores, list(layers), rows, scale, (-top, top), "layer", height=110 + 17 * len(rows),
                show_values=False, title="projection, residual norms")  # fmt: skip


def pattern_map(pieces: Sequence[str], weights: Matrix) -> go.Figure:
    """Attention of each token (down) to each one (across), from [T][T].

    The scale ends below the largest weights and leaves out the first token, where heads put what they do not use.
    """
    known = sorted(v for row in weights for v in numbers(row[1:]) if v)
    top = known[int(0.98 * (len(known) - 1))] if known else 1.0
    scale, names = ((0.0, alpha(NEUTRAL, 0.0)), (1.0, alpha(NEUTRAL, 0.9))), [_visible(piece) for piece in pieces]
    rows, across = [f"{i} {name}" for i, name in enumerate(names)], list(range(len(names)))
    fig = heat(weights, across, rows, scale, (0.0, top), "attends to", height=150 + 15 * len(rows), show_values=False,
               title="attention")  # fmt: skip
    words = [[f"{text(row)} to {i} {text(name)}" for i, name in enumerate(names)] for row in rows]
    fig.update_traces(text=words, hovertemplate="%{text}: %{z:.1%}<extra></extra>")
    fig.update_xaxes(tickvals=across, ticktext=[text(name) for name in names], tickangle=-60, tickfont_size=10)
    return fig.update_yaxes(tickfont_size=10)


def promoted_bars(found: Mapping[str, Sequence[tuple[str, float]]]) -> go.Figure:
    """The tokens a push makes likelier and less likely, best first."""
    rows = [*found.get("up", ()), *reversed(found.get("down", ()))]
    fig = figure("logit per unit pushed", "", 60 + 20 * len(rows))
    fig.add_bar(
        orientation="h", x=[value for _, value in rows], y=list(range(len(rows))), showlegend=False,
        marker_color=["#009E73" if value > 0 else "#D55E00" for _, value in rows],
        hovertemplate="%{x:.3g}<extra></extra>",
    )  # fmt: skip
    names = [text(repr(token)) for token, _ in rows]
    fig.update_yaxes(tickvals=list(range(len(rows))), ticktext=names, autorange="reversed", showgrid=False)
    return fig.update_layout(margin={"t": 6})


def mix_bars(before: Mapping[str, float], after: Mapping[str, float]) -> go.Figure:
    """Mean score of each emotion in the unsteered and in the steered text."""
    fig = figure("", "mean projection, residual norms", 320)
    for name, found, ground in (("unsteered", before, 0.25), ("steered", after, 0.9)):
        colors = [emotion_color(e) for e in found]
        fig.add_bar(
            x=[text(e) for e in found], y=numbers(found.values()), name=name, showlegend=False,
            marker={"color": [alpha(c, ground) for c in colors], "line": {"color": colors, "width": 1}},
            hovertemplate="%{x}: %{y:+.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
        shade = {"color": alpha(GREY, ground), "symbol": "square", "size": 11, "line": {"color": GREY, "width": 1}}
        fig.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=shade)
    return fig.update_layout(barmode="group", bargap=0.25).update_xaxes(showgrid=False)
