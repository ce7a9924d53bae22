"""What a run, and its model, know of one head or neuron: the panel under the figure in which it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from dashboards import folders, livemodel, units
from dashboards.shell import STRIP, cells, draw, missing, table
from dashboards.units import UnitName
from dashboards.words import md, num
from emocircuits import live_plots, plots
from emocircuits.report import RunData

N_TEXTS = 48  # of the run, in which a unit's top contexts are looked for
NAMES = "h11.2 is head 2 of layer 11, n3.17 neuron 17 of layer 3, counted from 0"


@dataclass(frozen=True)
class Shown:
    """What a view looks at: the run, its circuit part, the emotion and the unit (None: the reader wrote no name)."""

    data: RunData
    found: Mapping[str, Any]
    emotion: str
    unit: UnitName | None

    @property
    def framed(self) -> UnitName | None:
        """The unit, where the model has it: what a figure can mark."""
        return self.unit if self.unit and not units.lacks(extent(self.data, self.found), self.unit) else None


def asked(default: str) -> UnitName | None:
    """The unit that the reader clicked or wrote, kept in the URL; while there is none, the default."""
    written = st.text_input("Unit", key="unit", bind="query-params", max_chars=16, placeholder=default,
                            help=f"{NAMES}. Empty: the strongest one shown.")  # fmt: skip
    return UnitName.parse((written or "").strip() or default)


def take(name: str | None) -> None:
    """Choose the unit that was clicked."""
    if name:
        st.session_state["unit"] = name


def extent(data: RunData, found: Mapping[str, Any]) -> units.Extent:
    """How many layers, heads and neurons the model has, as far as the run says."""
    return units.extent(found.get("circuits") or {}, livemodel.units(data))


def show(s: Shown) -> None:
    """All that is known of the chosen unit, and what the model says of it on demand."""
    if s.unit is None:
        st.caption(f"Click one, or write a name: {NAMES}.")
        return
    if said := units.lacks(extent(s.data, s.found), s.unit):
        st.info(md(said))
        return
    st.subheader(s.unit.label.capitalize(), anchor=False)
    known = [_effects(s, s.unit), _memberships(s.data, s.unit), _edges(s, s.unit)]
    if not any(known):
        st.caption("The run stored nothing of this unit.")
    if s.unit.kind == "heads":
        _attention(s, s.unit)
        _reads(s.found, s.unit)
    _contexts(s.data, s.unit, s.emotion)


# ------------------------------------------------------------------------------------------------ what was stored


def _effects(s: Shown, unit: UnitName) -> bool:
    if unit.kind == "heads":
        return _head_effects(s, unit)
    saved = livemodel.units(s.data)
    values = units.neuron_effects(saved, unit) if saved is not None else {}
    if values:
        draw(units.effect_bars(values, "contribution"), "What it adds along each emotion's direction",
             "Less its mean over all emotions, in the direction's units.")  # fmt: skip
    return bool(values)


def _head_effects(s: Shown, unit: UnitName) -> bool:
    circuits = s.found.get("circuits") or {}
    effects = units.head_effects(circuits, unit) if circuits else {}
    measured = {score: v for score, v in effects.items() if any(x is not None for x in v.values())}
    for column, (score, values) in zip(st.columns(max(1, len(measured))), measured.items()):
        with column:
            place, of = units.head_rank(circuits, unit, s.emotion, score)
            note = f"{s.emotion}: place {place} of {of} by size." if place else f"{s.emotion}: not measured."
            draw(units.effect_bars(values, "effect"), units.SCORES[score].capitalize(), note)
    for score in (s for s in effects if s not in measured):
        where = units.measured_layers(circuits["heads"][score][0])
        st.caption(md(f"{units.SCORES[score].capitalize()}: not measured for this head ({where or 'nowhere'})."))
    return bool(effects)


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
        with st.expander(f"Its {len(rows)} edges in the graph of {md(s.emotion)}"):
            table(rows, "Strongest first")
    return bool(rows)


def _reads(found: Mapping[str, Any], unit: UnitName) -> None:
    if rows := units.read_rows(found.get("circuits") or {}, unit):
        with st.expander("What it attends to at the end of replies in each emotion, as the run stored it"):
            table(rows, "Share of its attention", "Summed over all places of a token, the mean over replies.")


# ------------------------------------------------------------------------------------------------ with the model


def _attention(s: Shown, unit: UnitName) -> None:
    """The head's attention pattern on any text, computed with the model."""
    from emocircuits import live

    with st.form("attention", border=False):
        text = st.text_area("A text", livemodel.EXAMPLE, key="sentence", bind="query-params", max_chars=2000, height=68)
        wanted = st.form_submit_button("What does it attend to?", icon=":material/grid_on:")

    def look(loaded: Any) -> live.Pattern:
        return live.pattern(loaded.model, loaded.tokenizer, text or "", unit.layer, unit.number)

    made = livemodel.directions(s.data)
    fingerprint = made.fingerprint if made is not None else None
    key = (str(s.data.path), "attention", str(unit), text)
    found = livemodel.remembered(
        key, wanted, lambda: livemodel.with_model(s.data, look, "Reading the text", fingerprint)
    )
    if found is None:
        st.caption("Reads the text with the model: how much each token attends to each one before it.")
        return
    cut = f" The first {len(found.pieces)} tokens; {found.left_off} more are left off." if found.left_off else ""
    draw(live_plots.pattern_map(found.pieces, found.weights.tolist()), f"Attention of {unit} on this text",
         f"Each row is a token, and what it attends to. {live_plots.SCALE}{cut}", key="attention-map")  # fmt: skip


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
    wanted = st.button("Where is it most active?", icon=":material/search:", key="contexts")
    fingerprint = made.fingerprint if made is not None else None
    found = livemodel.remembered(key, wanted, lambda: livemodel.with_model(data, look, "Reading texts", fingerprint))
    if found is None:
        st.caption(f"Reads {min(N_TEXTS, len(texts))} of the run's steered texts with the model.")
        return
    best, words = found
    _strips(best, words, unit.kind, emotion)


def _strips(best: Any, words: Any, kind: str, emotion: str) -> None:
    what = f"what it adds along {emotion}, in residual norms" if kind == "heads" else "its activation"
    top = max((abs(c.value) for c in best), default=1.0)
    for (i, context), place in cells(list(enumerate(best)), 2):
        with place:
            draw(live_plots.token_strip(context.pieces, context.values, plots.emotion_color(emotion), top=top),
                 f"{i + 1}: {num(context.value, '+.3g')}", what, key=f"context-{i}", width=STRIP)  # fmt: skip
    if words is not None:
        draw(live_plots.promoted_bars(words), "Tokens it makes likelier (green) and less likely when it is active",
             "Its column of down_proj through the final norm and the unembedding.")  # fmt: skip
