"""What audio, images and text each contribute to a multimodal model's answers, and what moves the balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from dashboards import modality
from dashboards.shell import choose, draw, missing, page, place, table
from dashboards.words import md
from emocircuits.multimodal import plots
from emocircuits.report import RunData

COMMAND = "emocircuits balance --model MODEL --inputs batch.safetensors --answers anger,sadness,fear --out runs/balance"


def show(data: RunData) -> None:
    """A balance run or the test bed's results: this run's own, else one beside it."""
    here = place()
    names = modality.sources(here)
    if not names:
        missing("No run about modalities in this folder",
                "It reads batches that a multimodal model's processor returned, and says what drives the answers.",
                COMMAND)  # fmt: skip
        return
    name = data.path.name if data.path.name in names else choose("Modality run", names, "balance")
    kind, found = modality.read(here.root / name)
    {"balance": _balance, "testbed": _testbed}[kind](found)


def _balance(found: Mapping[str, Any]) -> None:
    for sentence in modality.verdicts(found):
        st.markdown(md(sentence))
    draw(
        plots.effect_bars(found["effects"]), "Effect of each modality on the answer",
        "Its tokens replaced by their mean, by another clip's, hidden from all later tokens, or to first order.",
    )  # fmt: skip
    table(modality.changed_rows(found), "How often the answer changes")
    for column, (name, mass) in zip(st.columns(max(1, len(found["mass"]))), found["mass"].items()):
        with column:
            draw(plots.mass_map(mass, name), f"{name}: attention of the last token")
    table(modality.agreement_rows(found), "Do the measures agree?",
          "Attention says where a model looks; only taking something out says what the answer needs.")  # fmt: skip


def _testbed(found: Mapping[str, Any]) -> None:
    st.markdown("A small audio-visual model with a known preference, on faces and voices that disagree.")
    table(modality.score_rows(found), "Held-out scores",
          "Gap: how often it answers with the voice's emotion minus the face's; 0 is balance.")  # fmt: skip
    if rows := modality.curve_rows(found):
        draw(plots.gap_curve(rows), "Preference gap over the strength of each policy", "Validation people.")
    if rows := modality.held_out(found):
        draw(plots.gap_against_accuracy(rows), "Gap against accuracy on consistent clips",
             "Held-out people, each policy at its chosen strength; up and left wins.")  # fmt: skip
        table(modality.policy_rows(found), "Attention reallocated")
    table(modality.attention_rows(found), "Where attention goes on conflict clips")
    table(modality.knob_rows(found), "What in the clips moves the gap")


if __name__ == "__main__":
    page("Modality", show)
