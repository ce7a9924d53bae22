"""What audio, images and text each contribute to a multimodal model's answers, and what moves the balance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards import modality
from dashboards.shell import choose, draw, into, missing, page, source, step, table
from dashboards.words import md
from emocircuits.multimodal import plots
from emocircuits.report import RunData

COMMAND = "emocircuits balance --model MODEL --inputs batch.safetensors --answers anger,sadness,fear"


def show(data: RunData) -> None:
    """A balance run or the test bed's results: this run's own, else one beside it."""
    folder = source(
        data, "modality", "Modality run", "balance", "No run about modalities in this folder",
        "It reads batches that a multimodal model's processor returned, and says what drives the answers.",
        into(COMMAND, "balance"),
    )  # fmt: skip
    if folder is None:
        return
    kind, found = modality.read(folder)
    moved = modality.reallocation(folder)
    if found is None:
        missing("Not all batches are measured yet", "The same command goes on where it stopped; what is there is kept.",
                into(COMMAND, folder))  # fmt: skip
        return
    if kind == "balance":
        for sentence in modality.verdicts(found):
            st.markdown(md(sentence))
        if moved is None:
            missing("Reallocation was not measured in this run", "The same command adds it; batches are not measured "
                    "again.", into(COMMAND, folder))  # fmt: skip
        else:
            _moved(folder, moved, "What moves the answer")
        _balance(found)
        return
    if moved is not None:
        _moved(folder, moved, "A clip whose voice and face disagree")
    _testbed(found)


def _balance(found: Mapping[str, Any]) -> None:
    st.subheader("What the answer needs", anchor=False)
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


def _moved(folder: Path, found: Mapping[str, Any], title: str) -> None:
    """One prompt, and its answer under a reallocation of chosen strength."""
    st.subheader(title, anchor=False)
    names = [modality.row_name(r) for r in found["rows"]]
    row = found["rows"][names.index(choose("Prompt", names, "prompt"))]
    picture, sound = (modality.media(folder, row, ending) for ending in (".png", ".wav"))
    left, right = st.columns([1, 2]) if picture or sound else (None, st.container())
    if left is not None:
        with left:
            if picture:
                st.image(str(picture), caption=f"face: {md(row['face'])}" if "face" in row else None, width=192)
            if sound:
                st.audio(str(sound))
                st.caption(f"voice: {md(row['voice'])}" if "voice" in row else "")
    with right:
        way = choose(md(found.get("way", "Reallocation")), list(found["strengths"]), "policy")
        strengths = ["off", *(f"{s:g}" for s in found["strengths"][way])]
        at = step("Strength", strengths, "strength")
        after = row["after"][way][at - 1] if at else row["before"]
        st.markdown(
            f"Answer: **{md(modality.answer(found, after))}**; as it is {md(modality.answer(found, row['before']))}."
        )
        answers = {"as it is": row["before"]} | ({f"{way} {strengths[at]}": after} if at else {})
        draw(plots.answer_bars(answers, found["answers"]), "Answers, without and with reallocation",
             "Measured for every strength; factors and transfers are the family of MoSEAR.")  # fmt: skip
    if changed := found.get("changed"):
        random = {way: found["random"][way]} if found.get("random") else None
        draw(plots.changed_bars({way: changed[way]}, found["strengths"], random), f"How often {way} changes the answer",
             f"Of {len(names)} prompts, with 95% intervals."
             + (" Random spans: the same with modalities dealt out among their tokens." if random else ""))  # fmt: skip


def _testbed(found: Mapping[str, Any]) -> None:
    st.markdown("A small audio-visual model with a known preference, on faces and voices that disagree.")
    table(modality.score_rows(found), "Held-out scores",
          "Gap: how often it answers with the voice's emotion minus the face's; 0 is balance.")  # fmt: skip
    if rows := modality.curve_rows(found):
        draw(plots.gap_curve(rows, modality.STEP), "Preference gap over the strength of each policy",
             "Validation people. Strengths of policies have no common unit, so each is in its own order.")  # fmt: skip
    if rows := modality.held_out(found):
        draw(plots.gap_against_accuracy(rows), "Gap against accuracy on consistent clips",
             "Held-out people, each policy at its chosen strength; up and left wins.")  # fmt: skip
        table(modality.policy_rows(found), "Attention reallocated")
    table(modality.attention_rows(found), "Where attention goes on conflict clips")
    table(modality.knob_rows(found), "What in the clips moves the gap")


if __name__ == "__main__":
    page("Modality", show)
