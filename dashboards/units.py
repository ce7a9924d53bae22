"""One head or neuron: its name, and everything a run knows of it. No Streamlit in here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch

from dashboards.words import num
from emocircuits._figures import figure, number, numbers, text
from emocircuits.plots import emotion_color

Row = dict[str, Any]
SCORES = {
    "total": "taking it out (mean ablation, downstream included)",
    "direct": "what it adds along the direction, share of the residual norm",
    "gradient": "taking it out, to first order",
}


@dataclass(frozen=True)
class UnitName:
    """kind "heads" or "neurons", counted from 0; written h11.2 or n3.17 (layer.number)."""

    kind: str
    layer: int
    number: int

    def __str__(self) -> str:
        return f"{self.kind[0]}{self.layer}.{self.number}"

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.kind[:-1]} {self.number} of layer {self.layer}"

    @classmethod
    def parse(cls, written: object) -> UnitName | None:
        """The unit that a text names, None for any other text."""
        found = re.fullmatch(r"\s*([hn])(\d{1,4})\.(\d{1,7})\s*", str(written), re.IGNORECASE)
        return cls({"h": "heads", "n": "neurons"}[found[1].lower()], int(found[2]), int(found[3])) if found else None


def clicked(event: Any) -> str | None:
    """The name of the unit that was clicked in a figure, from Streamlit's selection event; None when there is none."""
    points = ((event or {}).get("selection") or {}).get("points") or []
    data = points[0].get("customdata") if points else None
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else [data]
    return next((str(u) for v in values if (u := UnitName.parse(v))), None)


def picked(event: Any, rows: Sequence[Row]) -> str | None:
    """The name of the unit whose row was clicked in a table, from Streamlit's selection event; None without a click."""
    cells = ((event or {}).get("selection") or {}).get("cells") or []
    place = cells[0][0] if cells else None
    return str(rows[place]["unit"]) if isinstance(place, int) and 0 <= place < len(rows) else None


def clickable(fig: go.Figure, effects: Sequence[Sequence[Any]], chosen: UnitName | None) -> go.Figure:
    """A map of heads whose cells can be clicked: plotly selects points only, so the nearest of unseen ones is taken."""
    cells = [(layer, head, number(v)) for layer, row in enumerate(effects) for head, v in enumerate(row)]
    unseen = {"marker": {"opacity": 0}}
    fig.update_traces(hoverinfo="skip", hovertemplate=None).update_layout(hovermode="closest", hoverdistance=-1)
    fig.add_scatter(
        x=[head for _, head, _ in cells], y=[layer for layer, _, _ in cells], mode="markers", showlegend=False,
        marker={"size": 18, "symbol": "square", "opacity": 0}, selected=unseen, unselected=unseen,
        customdata=[str(UnitName("heads", layer, head)) for layer, head, _ in cells],
        text=["not measured" if v is None else f"{v:+.3g}" for _, _, v in cells],
        hovertemplate="head %{x} of layer %{y}: %{text}<extra></extra>",
    )  # fmt: skip
    fig.update_yaxes(range=[len(effects) - 0.5, -0.5], autorange=False)  # markers would leave room around the cells
    if chosen is not None and chosen.kind == "heads":
        x, y = chosen.number, chosen.layer
        fig.add_shape(
            type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line={"color": "#6B4FD8", "width": 3}
        )
    return fig


def ringed(fig: go.Figure, chosen: UnitName | None) -> go.Figure:
    """A circuit graph with a ring around the chosen unit, where it is a member."""
    drawn: Any = fig.data
    traces = [t for t in drawn if t.customdata is not None] if chosen else []
    places = [(x, y) for t in traces for x, y, about in zip(t.x, t.y, t.customdata) if about[-1] == str(chosen)]
    for x, y in places:
        ring = {"symbol": "circle-open", "size": 34, "color": "#6B4FD8", "line": {"width": 3}}
        fig.add_scatter(x=[x], y=[y], mode="markers", marker=ring, hoverinfo="skip", showlegend=False)
    return fig


def effect_bars(values: Mapping[str, float | None], label: str) -> go.Figure:
    """One number per emotion."""
    fig = figure("", label, 260)
    colors = [emotion_color(e) for e in values]
    fig.add_bar(x=[text(e) for e in values], y=numbers(values.values()), marker_color=colors, showlegend=False,
                hovertemplate="%{x}: %{y:+.3g}<extra></extra>")  # fmt: skip
    return fig.update_xaxes(showgrid=False)


# ------------------------------------------------------------------------------------------------ what a run knows


@dataclass(frozen=True)
class Extent:
    """Layers of the model, and heads and neurons in each; None where a run does not say."""

    layers: int | None = None
    heads: int | None = None
    neurons: int | None = None


def extent(found: Mapping[str, Any], saved: Any) -> Extent:
    """What a run's scores, and the units it saved (or None), say of the size of its model."""
    heads = next((m[0] for score in SCORES if (m := (found.get("heads") or {}).get(score))), None)
    layers = len(heads) if heads else None
    return Extent(layers, len(heads[0]) if heads else None, saved.neurons().shape[2] if saved is not None else None)


def lacks(size: Extent, unit: UnitName) -> str | None:
    """A sentence when the model has no such unit, with what there is; None when it has, or when nobody knows."""
    width = size.heads if unit.kind == "heads" else size.neurons
    if (size.layers is None or unit.layer < size.layers) and (width is None or unit.number < width):
        return None
    each = f" with {unit.kind} 0 to {width - 1} in each" if width else ""
    layers = f"layers 0 to {size.layers - 1}" if size.layers else "other layers"
    return f"This model has no {unit.label}: it has {layers}{each}."


def strongest(values: Sequence[Sequence[Any]]) -> str:
    """The name of the head with the largest value by size; empty when none was measured."""
    cells = [(abs(v), i, j) for i, row in enumerate(values) for j, v in enumerate(numbers(row)) if v is not None]
    best = max(cells, key=lambda cell: cell[0], default=None)
    return str(UnitName("heads", *best[1:])) if best else ""


def measured_layers(values: Sequence[Sequence[Any]]) -> str:
    """Which layers have a value, such as "measured in layers 0 to 12"; empty when none has one."""
    known = [i for i, row in enumerate(values) if any(v is not None for v in numbers(row))]
    if not known:
        return ""
    whole = known == list(range(known[0], known[-1] + 1))
    return "measured in layers " + (f"{known[0]} to {known[-1]}" if whole else ", ".join(map(str, known)))


def main_node(graph: Mapping[str, Any]) -> str:
    """The name of the unit that a graph's score needs most; empty for a graph without units."""
    best = max(graph["nodes"], key=lambda n: abs(n["effect"]), default=None)
    return str(UnitName(best["kind"], best["layer"], best["unit"])) if best else ""


def neuron_rows(circuit: Any, found: Mapping[str, Any], emotion: str, most: int = 500) -> list[Row]:
    """The best neurons of a circuit, saved whole or (None) as its best members only."""
    if circuit is None:
        best = ((found.get("members") or {}).get(emotion) or {}).get("top_neurons") or []
        return [_neuron_row(i, unit) for i, unit in enumerate(best)]
    scores = circuit.neuron_scores
    return [_neuron_row(i, unit) | {"score": scores[i]} for i, unit in enumerate(circuit.neurons[:most])]


def _neuron_row(place: int, unit: Sequence[int]) -> Row:
    return {"place": place + 1, "unit": str(UnitName("neurons", *unit)), "layer": unit[0], "neuron": unit[1]}


def head_effects(found: Mapping[str, Any], unit: UnitName) -> dict[str, dict[str, float | None]]:
    """Each stored score of a head by emotion; empty when the run has no such head."""
    return {
        score: {e: _at(found["heads"][score][i], unit) for i, e in enumerate(found["emotions"])}
        for score in SCORES
        if found["heads"].get(score) and _exists(found["heads"][score][0], unit)
    }


def _exists(matrix: Sequence[Sequence[Any]], unit: UnitName) -> bool:
    return unit.layer < len(matrix) and unit.number < len(matrix[unit.layer])


def _at(matrix: Sequence[Sequence[Any]], unit: UnitName) -> float | None:
    return number(matrix[unit.layer][unit.number]) if _exists(matrix, unit) else None


def head_rank(found: Mapping[str, Any], unit: UnitName, emotion: str, score: str = "total") -> tuple[int, int]:
    """Place of a head by the size of a score, and how many heads have one."""
    matrix = found["heads"][score][found["emotions"].index(emotion)]
    sizes = [abs(v) for row in matrix for v in numbers(row) if v is not None]
    mine = _at(matrix, unit)
    return (0 if mine is None else 1 + sum(v > abs(mine) for v in sizes)), len(sizes)


def neuron_effects(units: Any, unit: UnitName) -> dict[str, float | None]:
    """What a neuron adds along each emotion's direction, in the direction's units, from the run's saved units."""
    values = units.neurons()
    if not (unit.layer < values.shape[1] and unit.number < values.shape[2]):
        return {}
    return dict(zip(units.emotions, values[:, unit.layer, unit.number].tolist()))


def memberships(circuits: Mapping[str, Any], unit: UnitName) -> list[Row]:
    """In which emotions' circuits a unit is, at which place, with which score."""
    rows = []
    for emotion, circuit in circuits.items():
        members = circuit.units(unit.kind)
        if (unit.layer, unit.number) in members:
            at = members.index((unit.layer, unit.number))
            scores = circuit.head_scores if unit.kind == "heads" else circuit.neuron_scores
            rows.append({"circuit of": emotion, "place": at + 1, "of": len(members), "score": scores[at]})
    return rows


def edges(graph: Mapping[str, Any], unit: UnitName) -> list[Row]:
    """What flows into a unit from others of the graph, out of it to others, and straight to the score."""
    names = [str(UnitName(n["kind"], n["layer"], n["unit"])) for n in graph["nodes"]]
    if str(unit) not in names:
        return []
    mine = names.index(str(unit))
    rows = [{"from": names[a], "to": names[b], "part of the score": v} for a, b, v in graph["edges"] if mine in (a, b)]
    rows.append({"from": str(unit), "to": "score", "part of the score": graph["nodes"][mine]["direct"]})
    return sorted(rows, key=lambda row: -abs(row["part of the score"]))


def read_rows(found: Mapping[str, Any], unit: UnitName) -> list[Row]:
    """The tokens a head attends to at the end of replies with its share in each emotion, where the run stored them."""
    wanted = [unit.layer, unit.number] if unit.kind == "heads" else None
    shares = {
        emotion: dict(row["tokens"])
        for emotion, rows in (found.get("reads") or {}).items()
        for row in rows
        if row["head"] == wanted
    }
    tokens = {token: max(s.get(token, 0.0) for s in shares.values()) for s in shares.values() for token in s}
    return [
        {"token": repr(token), **{emotion: s.get(token) for emotion, s in shares.items()}}
        for token in sorted(tokens, key=lambda t: -tokens[t])
    ]


def head_direction(directions: Any, emotion: str, layer: int) -> torch.Tensor:
    """The emotion's direction at a layer, such that a projection on it is in residual norms."""
    slot = directions.slots(layer)[0]
    return directions.units[directions.index(emotion), slot] / directions.norms[slot]


# ------------------------------------------------------------------------------------------------ all of a circuit


def member_rows(found: Mapping[str, Any]) -> list[Row]:
    """Sizes of all circuits and their best members."""
    return [
        {"emotion": e, "heads": m["heads"], "neurons": m["neurons"], "against the emotion": m.get("negative"),
         "top heads": _names("heads", m["top_heads"]), "top neurons": _names("neurons", m["top_neurons"])}
        for e, m in found["members"].items()
    ]  # fmt: skip


def _names(kind: str, members: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(UnitName(kind, *unit)) for unit in members)


def overlap_rows(found: Mapping[str, Any]) -> list[Row]:
    """How much the emotions' circuits share, and how far two halves of the themes agree."""
    return [
        {"units": kind, "Jaccard between emotions": o["jaccard"], "by chance": o["chance"], "excess": o["excess"],
         "stability over themes": found["stability"].get(kind)}
        for kind, o in found["overlap"].items()
    ]  # fmt: skip


def stability_rows(found: Mapping[str, Any]) -> list[Row]:
    """Circuits found again from other texts: overlap in excess of chance, and the emotion with the least."""
    rows = []
    for r in found["rows"]:
        row: Row = {"what changed": r["what"], "pairs": r["n_pairs"]}
        for kind in ("heads", "neurons"):
            row |= {kind: r[kind]["excess"], f"least, {kind}": f"{r[kind]['least_emotion']} {num(r[kind]['least'])}"}
        rows.append(row)
    return rows
