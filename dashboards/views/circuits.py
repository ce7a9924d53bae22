"""Which heads and neurons carry an emotion, how they work together, and what any one of them does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from dashboards import findings, folders, livemodel, unitpanel, units
from dashboards.shell import choose, draw, lacking, missing, page, table
from dashboards.unitpanel import Shown
from dashboards.words import md, num
from emocircuits import circuit_plots, plots
from emocircuits.plots import numbers
from emocircuits.report import RunData

Found = Mapping[str, Any]


def show(data: RunData) -> None:
    """One view of an emotion's circuit, with the unit that was chosen in it."""
    if lacking(data, "circuits"):
        return
    found: Mapping[str, Any] = data.circuits or {}
    if found.get("skipped"):
        st.info(md(f"This model has no circuits to show: {found['skipped'].get('reason')}."))
        return
    VIEWS[choose("View", tuple(VIEWS), "view", buttons=True)](data, found)


def _part(data: RunData, found: Found, name: str, what: str) -> Any:
    """One stage of the circuit part, or the empty state."""
    if not found.get(name):
        missing(f"This run has no {what}", "The full circuit study measures it; it goes on from where this run is.",
                folders.how_to_circuits(data))  # fmt: skip
    return found.get(name)


# ------------------------------------------------------------------------------------------------ views


def _heads(data: RunData, found: Found) -> None:
    if not (circuits := _part(data, found, "circuits", "scores of heads and neurons")):
        return
    left, middle, right = st.columns(3)
    with left:
        emotion = choose("Emotion", data.emotions, "emotion")
    with middle:
        score = choose("Score", [s for s in units.SCORES if circuits["heads"].get(s)], "score")
    values = circuits["heads"][score][circuits["emotions"].index(emotion)]
    with right:
        s = Shown(data, found, emotion, unitpanel.asked(units.strongest(values)))
    fig = units.clickable(circuit_plots.head_map(values, "effect"), values, s.framed)
    key = f"heads-map {s.unit}"  # a new figure for each choice: none stays selected, so that each click counts
    blank = any(v is None for row in values for v in numbers(row))
    note = f" Grey: not measured ({units.measured_layers(values) or 'no layer was'})." if blank else ""
    draw(fig, f"{emotion}, {units.SCORES[score]}", f"Click a head to see what it does.{note}", key=key,
         on_click=lambda: unitpanel.take(units.clicked(st.session_state.get(key))))  # fmt: skip
    unitpanel.show(s)
    st.divider()
    _members(circuits)
    with st.expander("How much the emotions' circuits share, and how far the scores agree"):
        table(units.overlap_rows(circuits), "How much the emotions' circuits share",
              "Corrected for chance: 0 is chance, 1 identity.")  # fmt: skip
        agreement = circuits["heads"]["agreement"]
        table([{"scores": k, "Pearson": v} for k, v in agreement.items()], "Do the scores agree?")


def _members(circuits: Found) -> None:
    with st.expander("Members of every emotion's circuit"):
        table(units.member_rows(circuits), "Members, best first", f"{unitpanel.NAMES}.")


def _neurons(data: RunData, found: Found) -> None:
    if not (circuits := _part(data, found, "circuits", "scores of heads and neurons")):
        return
    left, right = st.columns(2)
    with left:
        emotion = choose("Emotion", data.emotions, "emotion")
    made = livemodel.circuit(data, emotion)
    rows = units.neuron_rows(made, circuits, emotion)
    with right:
        s = Shown(data, found, emotion, unitpanel.asked(rows[0]["unit"] if rows else ""))
    size = len(made.neurons) if made is not None else circuits["members"][emotion]["neurons"]
    key = f"neurons {emotion} {s.unit}"
    table(rows, f"Neurons of the {emotion} circuit, best first",
          f"{len(rows)} of {size}. Click a row to see what the neuron does.", height=320, key=key,
          selection_mode="single-cell",
          on_select=lambda: unitpanel.take(units.picked(st.session_state.get(key), rows)))  # fmt: skip
    unitpanel.show(s)
    st.divider()
    neurons = circuits["neurons"]
    draw(circuit_plots.neuron_ranks(neurons["scores"], neurons["ranks"], circuits["emotions"]), "Neurons by rank",
         "A steep line means that few neurons carry the emotion.")  # fmt: skip
    _members(circuits)


def _influence(data: RunData, found: Found) -> None:
    if not (circuits := _part(data, found, "circuits", "influence of sublayers")):
        return
    influence = circuits["influence"]
    draw(circuit_plots.influence_by_sublayer(influence, circuits["emotions"]), "Influence of each sublayer",
         "Solid MLP, dashed attention. Correlation with the plain cosine to the reference: "
         f"{num(influence.get('correlation_with_cosine'))}; near 1 it says little more than that.")  # fmt: skip


def _graph(data: RunData, found: Found) -> None:
    if not (graphs := _part(data, found, "graphs", "circuit graphs")):
        return
    left, right = st.columns(2)
    with left:
        emotion = choose("Emotion", data.emotions, "emotion")
    graph = graphs["graphs"][emotion]
    with right:
        s = Shown(data, found, emotion, unitpanel.asked(units.main_node(graph)))
    words = (
        "The units that the score needs most: heads round, neurons square, area by effect. An edge is the part of the "
        f"emotion score ({graphs.get('readout')}) that one unit gives through another, or straight to the diamond; "
        "green raises it, orange lowers it. Click a unit."
    )
    key = f"graph {s.unit}"
    fig = units.ringed(circuit_plots.circuit_graph(graph, emotion), s.framed)
    draw(fig, f"{emotion}: how its units work", words, key=key,
         on_click=lambda: unitpanel.take(units.clicked(st.session_state.get(key))))  # fmt: skip
    unitpanel.show(s)


def _tests(data: RunData, found: Found) -> None:
    if not (curves := _part(data, found, "curves", "tests of its circuits")):
        return
    captions = {
        "keep": ("Faithfulness", "All other units hold their mean."),
        "ablate": ("Completeness", "The units hold their mean; lower means that they were needed."),
        "enhance": ("Enhancement", "The emotion's difference is added to the units in neutral replies."),
    }
    for action, (title, caption) in captions.items():
        draw(circuit_plots.circuit_curves(curves["rows"], action), title, caption)
    if ranked := found.get("rank_curves"):
        left, right = st.columns(2)
        for i, (what, action) in enumerate((k, a) for k in ("heads", "neurons") for a in ("ablate", "enhance")):
            if any((r["kind"], r["action"]) == (what, action) for r in ranked["rows"]):
                with (left, right)[i % 2]:
                    draw(circuit_plots.rank_curves(ranked["rows"], what, action), f"Best {what}, {action}",
                         "Solid: the best anywhere; dashed: of each layer; grey: random.")  # fmt: skip
    if stability := found.get("stability"):
        size = stability.get("n_scenarios")
        table(units.stability_rows(stability), "Circuits found again from other texts",
              f"Overlap in excess of chance: 0 is chance, 1 identity. {size} scenarios each.")  # fmt: skip


def _steering(data: RunData, found: Found) -> None:
    if not (compared := _part(data, found, "evaluation", "comparison of ways to steer")):
        return
    draw(plots.expression_bars(compared["methods"], data.emotions), "Coherent expression by emotion and method",
         "Every method at its best strength on held-out scenarios.")  # fmt: skip
    table(findings.method_rows(compared["methods"]), "Methods compared")
    table(findings.comparison_rows(compared["comparisons"]), "Paired differences, where both were run")


VIEWS = {
    "Heads": _heads, "Neurons": _neurons, "Influence": _influence, "Graph": _graph, "Tests": _tests,
    "Steering": _steering,
}  # fmt: skip


if __name__ == "__main__":
    page("Circuits", show)
