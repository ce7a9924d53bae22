"""Plotly figures of modality balance, from plain data; see `emocircuits.plots` for the house rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import QUIET, Matrix, alpha, figure, heat, number, numbers, text, whiskers

Row = Mapping[str, Any]
COLORS = {"audio": "#E69F00", "image": "#0072B2", "video": "#56B4E9", "text": "#8A8F98"}
INK = "#6B4FD8"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4FD8")
SCALE = ((0.0, alpha(INK, 0.05)), (1.0, INK))


def mass_map(mass: Matrix, name: str) -> go.Figure:
    """Attention on one modality by layer (down) and head (across), from [L][heads] of shares."""
    known = [v for row in mass for v in numbers(row) if v is not None]
    columns = list(range(len(mass[0]) if mass else 0))
    fig = heat(mass, columns, [str(i) for i in range(len(mass))], SCALE, (0.0, max(known, default=1.0)), "",
               height=150 + 26 * len(mass), show_values=False, form=".0%", title=f"attention on {name}")  # fmt: skip
    return fig.update_yaxes(title_text="layer").update_xaxes(tickprefix="h", dtick=max(1, len(columns) // 8))


def effect_bars(effects: Mapping[str, Mapping[str, Row]]) -> go.Figure:
    """Log-odds that each modality gives the answer, by how it is taken out, with 95 % intervals."""
    fig = figure("taken out by", "log-odds of the answer it gives", 360)
    for name in dict.fromkeys(n for found in effects.values() for n in found):
        points = [found[name] for found in effects.values()]
        middle = numbers(p.get("estimate") for p in points)
        fig.add_bar(
            x=list(effects), y=middle, name=text(name), marker_color=COLORS.get(name, QUIET),
            error_y=whiskers(points),
        )  # fmt: skip
    return fig.update_layout(barmode="group")


def answer_bars(answers: Mapping[str, Sequence[float]], labels: Sequence[str]) -> go.Figure:
    """Probability of each answer, [n_labels] for each of a few ways to ask; the last is drawn in colour."""
    fig = figure("", "probability", 300)
    for i, (name, values) in enumerate(answers.items()):
        color = INK if i == len(answers) - 1 else QUIET
        fig.add_bar(x=[text(label) for label in labels], y=numbers(values), name=text(name), marker_color=color)
    return fig.update_layout(barmode="group", bargap=0.3).update_yaxes(range=[0, 1], tickformat=".0%")


def changed_bars(
    changed: Mapping[str, Sequence[Row]],
    strengths: Mapping[str, Sequence[float]],
    random: Mapping[str, Sequence[Row]] | None = None,
) -> go.Figure:
    """How often the answer changes, for each way to reallocate attention and each strength, with 95 % intervals.

    random: the same with modalities dealt out at random among their tokens, drawn beside it.
    """
    fig = figure("", "answers changed", 300 + 20 * min(3, len(changed)))
    for name, found, color in (("as given", changed, INK), ("random spans", random or {}, QUIET)):
        for i, (way, points) in enumerate(found.items()):
            fig.add_bar(
                x=[[text(way)] * len(points), [f"{s:g}" for s in strengths[way]]],
                y=numbers(p.get("estimate") for p in points), error_y=whiskers(points), marker_color=color, name=name,
                legendgroup=name, showlegend=bool(random) and not i, offsetgroup=name if random else None,
            )  # fmt: skip
    return fig.update_layout(bargap=0.35).update_yaxes(range=[0, 1.02], tickformat=".0%")


def gap_curve(rows: Sequence[Row], x: str = "strength") -> go.Figure:
    """Preference gap over the strength of a reallocation, for each policy, with 95 % intervals; 0 is balance."""
    fig = figure(x, "voice minus face", 380)
    for i, policy in enumerate(dict.fromkeys(r["policy"] for r in rows)):
        mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r[x])
        gaps = [r["gap"] for r in mine]
        fig.add_scatter(
            x=[r[x] for r in mine], y=numbers(g.get("estimate") for g in gaps), name=text(policy), mode="lines+markers",
            error_y=whiskers(gaps), line=_style(i), text=[text(str(r.get("strength", r[x]))) for r in mine],
            hovertemplate="%{text}: %{y:.2f}",
        )  # fmt: skip
    return fig.add_hline(y=0, line={"color": QUIET, "width": 1, "dash": "dash"})


def gap_against_accuracy(rows: Sequence[Row]) -> go.Figure:
    """Size of the gap against accuracy on consistent clips, one point per policy and strength; up and left wins."""
    fig = figure("size of the preference gap", "consistent clips", 380)
    for i, policy in enumerate(dict.fromkeys(r["policy"] for r in rows)):
        mine = [r for r in rows if r["policy"] == policy]
        fig.add_scatter(
            x=[None if (g := number(r["gap"].get("estimate"))) is None else abs(g) for r in mine],
            y=numbers(r["consistent"].get("estimate") for r in mine), mode="markers", name=text(policy),
            marker={"color": _style(i)["color"], "symbol": "circle" if i < len(LINES) else "diamond-open", "size": 9},
            text=[text(str(r.get("strength", ""))) for r in mine], hovertemplate="%{text}: %{x:.2f}, %{y:.0%}",
        )  # fmt: skip
    return fig.update_yaxes(tickformat=".1%")


def _style(i: int) -> dict[str, str]:
    """Colour and dash of line i: no two of twice as many lines as colours look alike."""
    return {"color": LINES[i % len(LINES)], "dash": "solid" if i < len(LINES) else "dash"}
