"""Which heads and neurons carry an emotion, how they work together, and what any one of them does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from dashboards import findings, folders, livemodel, units
from dashboards.shell import STRIP, choose, draw, lacking, missing, page, table
from dashboards.units import UnitName
from dashboards.words import md, num
from emocircuits import circuit_plots, live_plots, plots
from emocircuits.report import RunData

N_TEXTS = 48  # of the run, in which a unit's top contexts are looked for


@dataclass(frozen=True)
class Shown:
    """What the views look at: the run, its circuit part, the chosen emotion and unit."""

    data: RunData
    found: Mapping[str, Any]
    emotion: str
    unit: UnitName | None


def show(data: RunData) -> None:
    """One view of an emotion's circuit, and the unit that was chosen."""
    if lacking(data, "circuits"):
        return
    found: Mapping[str, Any] = data.circuits or {}
    if found.get("skipped"):
        st.info(md(f"This model has no circuits to show: {found['skipped'].get('reason')}."))
        return
    view = choose("View", tuple(VIEWS), "view", buttons=True)
    of_one = view in ("Heads", "Neurons", "Graph")
    emotion = choose("Emotion", data.emotions, "emotion") if of_one else data.emotions[0]
    best = units.top_members(found.get("circuits") or {}, emotion)
    written = st.session_state.get("unit") or st.query_params.get("unit") or (best[0] if best else "")
    shown = Shown(data, found, emotion, UnitName.parse(written))
    VIEWS[view](shown)
    if of_one:
        st.divider()
        _unit(shown, best)


def _part(s: Shown, name: str, what: str) -> Any:
    """One stage of the circuit part, or the empty state."""
    if not s.found.get(name):
        missing(f"This run has no {what}", "The full circuit study measures it; it goes on from where this run is.",
                folders.how_to_circuits(s.data))  # fmt: skip
    return s.found.get(name)


def _take(key: str) -> None:
    """A click in the figure `key` chooses the unit."""
    if name := units.clicked(st.session_state.get(key)):
        st.session_state["unit"] = name


# ------------------------------------------------------------------------------------------------ views


def _heads(s: Shown) -> None:
    if not (circuits := _part(s, "circuits", "scores of heads and neurons")):
        return
    scores = [s for s in units.SCORES if circuits["heads"].get(s)]
    score = choose("Score", scores, "score")
    values = circuits["heads"][score][circuits["emotions"].index(s.emotion)]
    fig = units.clickable(circuit_plots.head_map(values, "effect"), values, s.unit)
    key = f"heads-map {s.unit}"  # a new figure for each choice: none stays selected, so that each click counts
    draw(fig, f"{s.emotion}, {units.SCORES[score]}", "Click a head to see what it does.", key=key,
         on_click=lambda: _take(key))  # fmt: skip
    agreement = {k: v for k, v in circuits["heads"]["agreement"].items()}
    table([{"scores": k, "Pearson": v} for k, v in agreement.items()], "Do the scores agree?")
    table(units.member_rows(circuits), "Members (layer.number), best first")
    table(units.overlap_rows(circuits), "How much the emotions' circuits share",
          "Corrected for chance: 0 is chance, 1 identity.")  # fmt: skip


def _neurons(s: Shown) -> None:
    if not (circuits := _part(s, "circuits", "scores of heads and neurons")):
        return
    neurons = circuits["neurons"]
    draw(circuit_plots.neuron_ranks(neurons["scores"], neurons["ranks"], circuits["emotions"]), "Neurons by rank",
         "A steep line means that few neurons carry the emotion.")  # fmt: skip
    made = livemodel.circuit(s.data, s.emotion)
    if made is None:
        table(units.member_rows(circuits), "Members (layer.number), best first")
        return
    rows = [{"unit": str(UnitName("neurons", *u)), "layer": u[0], "neuron": u[1], "score": s}
            for u, s in zip(made.neurons[:500], made.neuron_scores)]  # fmt: skip
    table(rows, f"Neurons of the {s.emotion} circuit, best first",
          f"{len(rows)} of {len(made.neurons)}. Write a unit's name below to see it.", height=320)  # fmt: skip


def _influence(s: Shown) -> None:
    if not (circuits := _part(s, "circuits", "influence of sublayers")):
        return
    influence = circuits["influence"]
    draw(circuit_plots.influence_by_sublayer(influence, circuits["emotions"]), "Influence of each sublayer",
         "Solid MLP, dashed attention. Correlation with the plain cosine to the reference: "
         f"{num(influence.get('correlation_with_cosine'))}; near 1 it says little more than that.")  # fmt: skip


def _graph(s: Shown) -> None:
    if not (graphs := _part(s, "graphs", "circuit graphs")):
        return
    graph = graphs["graphs"][s.emotion]
    words = (
        "The units that the score needs most: heads round, neurons square, area by effect. An edge is the part of the "
        f"emotion score ({graphs.get('readout')}) that one unit gives through another, or straight to the diamond; "
        "green raises it, red lowers it. Click a unit."
    )
    key = f"graph {s.unit}"
    fig = units.ringed(circuit_plots.circuit_graph(graph, s.emotion), s.unit)
    draw(fig, f"{s.emotion}: how its units work", words, key=key, on_click=lambda: _take(key))


def _tests(s: Shown) -> None:
    if not (curves := _part(s, "curves", "tests of its circuits")):
        return
    captions = {
        "keep": ("Faithfulness", "All other units hold their mean."),
        "ablate": ("Completeness", "The units hold their mean; lower means that they were needed."),
        "enhance": ("Enhancement", "The emotion's difference is added to the units in neutral replies."),
    }
    for action, (title, caption) in captions.items():
        draw(circuit_plots.circuit_curves(curves["rows"], action), title, caption)
    if ranked := s.found.get("rank_curves"):
        left, right = st.columns(2)
        for i, (what, action) in enumerate((k, a) for k in ("heads", "neurons") for a in ("ablate", "enhance")):
            if any((r["kind"], r["action"]) == (what, action) for r in ranked["rows"]):
                with (left, right)[i % 2]:
                    draw(circuit_plots.rank_curves(ranked["rows"], what, action), f"Best {what}, {action}",
                         "Solid: the best anywhere; dashed: of each layer; grey: random.")  # fmt: skip
    if stability := s.found.get("stability"):
        size = stability.get("n_scenarios")
        table(units.stability_rows(stability), "Circuits found again from other texts",
              f"Overlap in excess of chance: 0 is chance, 1 identity. {size} scenarios each.")  # fmt: skip


def _steering(s: Shown) -> None:
    if not (compared := _part(s, "evaluation", "comparison of ways to steer")):
        return
    draw(plots.expression_bars(compared["methods"], s.data.emotions), "Coherent expression by emotion and method",
         "Every method at its best strength on held-out scenarios.")  # fmt: skip
    table(findings.method_rows(compared["methods"]), "Methods compared")
    table(findings.comparison_rows(compared["comparisons"]), "Paired differences, where both were run")


VIEWS = {
    "Heads": _heads, "Neurons": _neurons, "Influence": _influence, "Graph": _graph, "Tests": _tests,
    "Steering": _steering,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ one unit


def _unit(s: Shown, best: list[str]) -> None:
    written = st.text_input(
        "Unit", best[0] if best else "", key="unit", bind="query-params", max_chars=16,
        help="h11.2 is head 2 of layer 11, n3.17 neuron 17 of layer 3, counted from 0.",
    )  # fmt: skip
    unit = UnitName.parse(written)
    if unit is None:
        st.caption("Click a head or a node, or write a name: h11.2 is head 2 of layer 11, n3.17 neuron 17 of layer 3.")
        return
    st.subheader(unit.label.capitalize(), anchor=False)
    known = [_stored_effects(s, unit), _memberships(s.data, unit), _edges(s, unit), _reads(s.found, unit)]
    if not any(known):
        st.caption("The run stored nothing of this unit.")
    _contexts(s.data, unit, s.emotion)


def _stored_effects(s: Shown, unit: UnitName) -> bool:
    circuits = s.found.get("circuits")
    if circuits and unit.kind == "heads":
        effects = units.head_effects(circuits, unit)
        for column, (score, values) in zip(st.columns(max(1, len(effects))), effects.items()):
            with column:
                place, of = units.head_rank(circuits, unit, s.emotion, score)
                note = f"{s.emotion}: place {place} of {of} by size." if place else f"{s.emotion}: not measured."
                draw(units.effect_bars(values, "effect"), units.SCORES[score].capitalize(), note)
        return bool(effects)
    saved = livemodel.units(s.data) if unit.kind == "neurons" else None
    values = units.neuron_effects(saved, unit) if saved is not None else {}
    if values:
        draw(units.effect_bars(values, "contribution"), "What it adds along each emotion's direction",
             "Less its mean over all emotions, in the direction's units.")  # fmt: skip
    return bool(values)


def _memberships(data: RunData, unit: UnitName) -> bool:
    made = {e: c for e in data.emotions if (c := livemodel.circuit(data, e)) is not None}
    rows = units.memberships(made, unit)
    if rows:
        table(rows, "Circuits it is in")
    elif made:
        st.caption("It is in no emotion's circuit.")
    return bool(made)


def _edges(s: Shown, unit: UnitName) -> bool:
    graph = ((s.found.get("graphs") or {}).get("graphs") or {}).get(s.emotion)
    rows = units.edges(graph, unit) if graph else []
    if rows:
        table(rows, f"Its edges in the graph of {s.emotion}")
    return bool(rows)


def _reads(found: Mapping[str, Any], unit: UnitName) -> bool:
    rows = units.reads(found.get("circuits") or {}, unit)
    for emotion, tokens in rows.items():
        table(tokens, f"What it attends to at the end of replies in {emotion}")
    return bool(rows)


def _contexts(data: RunData, unit: UnitName, emotion: str) -> None:
    """Where the unit is most active, looked up with the model."""
    texts = [f"{r.get('prompt', '')}{r.get('text', '')}" for r in data.texts or [] if r.get("method") == "steered"]
    made = livemodel.directions(data)
    if not texts or (unit.kind == "heads" and made is None):
        missing("Top contexts need a whole run", "The texts and directions of the run are not in this folder.",
                folders.how_to_finish(data))  # fmt: skip
        return
    from emocircuits import live

    def look(loaded: Any) -> Any:
        direction = units.head_direction(made, emotion, unit.layer) if unit.kind == "heads" else None
        step = max(1, len(texts) // N_TEXTS)
        found = live.contexts(loaded.model, loaded.tokenizer, texts[::step][:N_TEXTS], unit.kind, unit.layer,
                              unit.number, direction=direction)  # fmt: skip
        if unit.kind == "heads":
            return found, None
        push = live.written_by(loaded.model, unit.layer, unit.number)
        return found, live.promoted(loaded.model, loaded.tokenizer, push)

    key = (str(data.path), "contexts", str(unit), emotion if unit.kind == "heads" else "")
    asked = st.button("Where is it most active?", icon=":material/search:")
    fingerprint = made.fingerprint if made is not None else None
    found = livemodel.remembered(key, asked, lambda: livemodel.with_model(data, look, "Reading texts", fingerprint))
    if found is None:
        st.caption(f"Reads {min(N_TEXTS, len(texts))} of the run's steered texts with the model.")
        return
    best, words = found
    what = f"what it adds along {emotion}, in residual norms" if unit.kind == "heads" else "its activation"
    top = max((abs(c.value) for c in best), default=1.0)
    columns = st.columns(2)
    for i, context in enumerate(best):
        with columns[i % 2]:
            draw(live_plots.token_strip(context.pieces, context.values, plots.emotion_color(emotion), top=top),
                 f"{i + 1}: {num(context.value, '+.3g')}", what, key=f"context-{i}", width=STRIP)  # fmt: skip
    if words is not None:
        draw(live_plots.promoted_bars(words), "Tokens it makes likelier (green) and less likely when it is active",
             "Its column of down_proj through the final norm and the unembedding.")  # fmt: skip


if __name__ == "__main__":
    page("Circuits", show)
