"""Two runs of one kind side by side: what they found, whether they found the same, and how they were made."""

from __future__ import annotations

import streamlit as st

from dashboards import comparing, folders, livemodel, units
from dashboards.shell import choose, draw, into, missing, opened, page, place, table
from emocircuits import plots
from emocircuits.report import RunData

COMMANDS = {
    "anchors": "emocircuits anchors --model MODEL", "sae": "emocircuits sae demo --model MODEL",
    "confidence": "emocircuits sae confidence --model MODEL",
    "balance": "emocircuits balance --model MODEL --inputs batch.safetensors --answers anger,sadness,fear",
}  # fmt: skip


def show(data: RunData) -> None:
    """The chosen run beside another one of the same folder."""
    here = place()
    kind = folders.kind(data.path)
    command = COMMANDS.get(folders.studied(data.path), "emocircuits demo --model MODEL")
    others = [n for n in here.names if n != data.path.name and folders.kind(here.root / n) == kind]
    if not others:
        missing("There is no other run of this kind here", "Runs beside each other are compared, say of two models.",
                into(command, "other"))  # fmt: skip
        return
    other = opened(here.root / choose("Beside", others, "beside"))
    names = (data.path.name, other.path.name)
    table(comparing.key_rows(data, other, names), "Key figures", "Intervals are 95%, each run's over its own texts.",
          column_config={"measure": st.column_config.Column(width="medium")})  # fmt: skip
    if len(scores := comparing.steered(data, other, names)) == 2:
        emotions = list(dict.fromkeys([*data.emotions, *other.emotions]))
        draw(plots.expression_bars(scores, emotions), "Coherent expression under steering, by emotion")
        table(comparing.emotion_rows(data, other, names), "The same in numbers")
    if tests := comparing.layer_tests(data, other, names):
        draw(plots.quality_by_layer(*tests, 1 / len(data.emotions)), "Accuracy of the directions on held-out themes",
             "Layers are counted from 0; models of other depths reach other numbers.")  # fmt: skip
    _directions(data, other)
    _circuits(data, other, names)
    if rows := comparing.different_settings(data, other, names):
        table(rows, "Settings that differ")
    else:
        st.caption("Both have the same settings and versions, as far as they are recorded.")


def _directions(data: RunData, other: RunData) -> None:
    """Do both runs point the same way? Only for runs of one model."""
    from emocircuits.directions import agreement
    from emocircuits.errors import InputError

    a, b = livemodel.directions(data), livemodel.directions(other)
    if a is None or b is None:
        return
    try:
        values = agreement(a, b)
    except InputError:
        st.caption("The runs' directions belong to models of other shapes or to other emotions.")
        return
    draw(plots.split_half_map(values.tolist(), a.emotions, a.layers), "Cosine of the two runs' directions",
         "Near 1: both found the same.")  # fmt: skip


def _circuits(data: RunData, other: RunData, names: tuple[str, str]) -> None:
    """Did both runs choose the same heads and neurons?"""
    shared = [e for e in data.emotions if e in other.emotions]
    pairs = {e: (livemodel.circuit(data, e), livemodel.circuit(other, e)) for e in shared}
    size = units.extent((data.circuits or {}).get("circuits") or {}, livemodel.units(data))
    if rows := comparing.circuit_rows(pairs, size, names):
        table(rows, "Heads and neurons that both circuits have", "Excess over chance: 0 is chance, 1 identity.")


if __name__ == "__main__":
    page("Compare", show)
