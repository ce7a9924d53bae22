"""Plotly figures of step SAEs, from plain data; see `emocircuits.plots` for the house rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from emocircuits._figures import QUIET, figure, numbers, text, whiskers
from emocircuits.plots import emotion_color

Row = Mapping[str, Any]
INK = "#6B4FD8"


def densities(histogram: Mapping[str, Sequence[float]]) -> go.Figure:
    """How many latents fire how often: counts over log10 of the share of rows where a latent is active."""
    edges = histogram["log10_edges"]
    middle = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
    return bars(middle, histogram["counts"], "log10 density", "latents", 280)


def bars(middles: Sequence[float], counts: Sequence[float], x: str, y: str = "tokens", height: int = 220) -> go.Figure:
    """A histogram from counts and the middles of their bins."""
    fig = figure(x, y, height)
    fig.add_bar(x=list(middles), y=numbers(counts), marker_color=INK, showlegend=False)
    return fig.update_layout(bargap=0.05)


def decoder_map(places: Sequence[Sequence[float]], kinds: Sequence[str | None], names: Sequence[str] = ()) -> go.Figure:
    """Latents at their places [n, 2] of `geometry.layout`, coloured by kind; names show under the pointer."""
    fig = figure("", "", 460)
    said = list(names) or [f"latent {i}" for i in range(len(places))]
    for kind in sorted({k for k in kinds if k is not None}, key=str) + ([None] if None in kinds else []):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        fig.add_scatter(
            x=[places[i][0] for i in mine], y=[places[i][1] for i in mine], mode="markers",
            name="other" if kind is None else text(kind), hovertext=[text(said[i]) for i in mine], hoverinfo="text",
            marker={"size": 4 if kind is None else 7, "opacity": 0.5 if kind is None else 0.9,
                    "color": QUIET if kind is None else emotion_color(kind)},
        )  # fmt: skip
    return fig.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False)


def dose_response(
    arms: Mapping[str, Sequence[Row]], measure: str = "expression", unit: str = "maximum activations"
) -> go.Figure:
    """A rate over the dose, one line per arm with 95 % intervals; the first arm is drawn thick.

    arms: {name: cells of a cost card, with dose and the measure's interval}; the dose is in `unit`.
    """
    fig = figure(f"dose, in {unit}", measure, 360)
    for i, (name, cells) in enumerate(arms.items()):
        mine = sorted(cells, key=lambda c: c["dose"])
        middle = numbers(c[measure].get("estimate") for c in mine)
        fig.add_scatter(
            x=[c["dose"] for c in mine], y=middle, name=text(name), mode="lines+markers",
            line={"color": INK if not i else None, "width": 3 if not i else 1.4, "dash": "solid" if not i else "dot"},
            error_y=whiskers([c[measure] for c in mine], color=QUIET),
        )  # fmt: skip
    return fig.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])


def arms_of(steered: Row) -> dict[str, list[Row]]:
    """The arms of one `steering` entry of sae.json: the latent, random directions, matched latents; dose 0 is none."""
    names = {"steered": f"latent {steered['latent']}", "random": "random direction, same norm"}
    names |= {f"matched {i}": f"latent {i}, as sparse and as strong" for i in steered["matched"]}
    return _with_none(steered["cells"], names)


def doses_of(answers: Row) -> dict[str, list[Row]]:
    """The arms of the `answers` of confidence.json that have a dose; dose 0 is none."""
    methods = (c["method"] for c in answers["cells"] if c["method"] != "none" and c["dose"] is not None)
    return _with_none(answers["cells"], {method: method for method in methods})


def _with_none(cells: Sequence[Row], names: Mapping[str, str]) -> dict[str, list[Row]]:
    """{what an arm is called: its cells behind those without steering}; names: {method: what it is called}."""
    by = {method: [c for c in cells if c["method"] == method] for method in ("none", *names)}
    return {said: [*by["none"], *by[method]] for method, said in names.items()}
