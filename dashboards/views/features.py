"""What the latents of a sparse autoencoder mean and do; shows what `emocircuits sae demo` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from dashboards import features
from dashboards.shell import choose, draw, into, missing, page, source, table
from dashboards.words import md, num, rate
from emocircuits.report import RunData


def show(data: RunData) -> None:
    """A run of SAEs: this one, else one beside it."""
    folder = source(
        data, "features", "SAE run", "sae", "No sparse autoencoder in this folder",
        "It learns a dictionary of reasoning steps and emotional texts, and says which entries steer.",
        into(features.COMMAND, "sae"),
    )  # fmt: skip
    if folder is None:
        return
    found, sure = features.read(folder), features.confidence(folder)
    views: dict[str, Callable[[], None]] = {}
    if found is not None:
        views = {"Latents": lambda: _latents(found), "Map": lambda: _map(found, folder),
                 "Steering": lambda: _steering(found), "Quality": lambda: _quality(found)}  # fmt: skip
    if sure is not None:
        views["Confidence"] = lambda: _confidence(sure)
    if views:
        views[choose("View", list(views), "view", buttons=True)]()
    else:
        missing("This run has not finished", "The same command goes on where it stopped.",
                into(features.command(folder), folder))  # fmt: skip


def _latents(found: features.Found) -> None:
    asked = st.text_input("Search", key="search", placeholder="an emotion, a word, a latent", bind="query-params")
    matching = features.matching(found, asked or "")
    if matching:
        names = [f"{r['latent']} ({e})" for e, r in matching]
        chosen = choose("Latent", names, "latent")
        _, row = matching[names.index(chosen)]
        st.markdown(md(f"Words that it raises on the direct path: {', '.join(row['words'])}"))
        if driven := features.top_rows(row):
            table(driven, "Steps that drive it most")
        else:
            st.caption("The run stored no steps for latents of kinds of reasoning.")
    else:
        st.info("No latent matches.")
    table(
        features.emotion_rows(found),
        "Latents that go with an emotion",
        "Labels shuffled within scenarios are the null; found on training scenarios, tested on held-out themes.",
    )
    table(
        features.appraisal_rows(found),
        "Latents that go with a kind of reasoning step",
        "Our hand-written appraisals, labels shuffled within each solution.",
    )


def _map(found: features.Found, folder: Path) -> None:
    from saes import plots

    geometry = found.get("geometry")
    if not geometry:
        missing("This run has no map of its decoder", "The same command adds it; what is there is kept.",
                into(features.COMMAND, folder))  # fmt: skip
        return
    st.markdown(md(features.separation(geometry)))
    draw(plots.decoder_map(geometry["places"], geometry["kinds"]), "Decoder rows, UMAP by cosine",
         "Coloured by the label whose texts a latent goes with beyond the null. For looking only.")  # fmt: skip
    table(features.pair_rows(geometry), "Latents that fire together",
          "At the same steps; chance is shuffling within each text.")  # fmt: skip


def _steering(found: features.Found) -> None:
    from saes import plots

    steering = found.get("steering") or {}
    if not steering:
        st.info("No latent was steered: none went with an emotion on held-out themes, too, or steering was left out.")
        return
    emotion = choose("Emotion", list(steering), "emotion")
    measure = choose("Measure", ("expression", "coherent", "degenerate"), "measure")
    st.markdown(md(features.verdict(steering[emotion])))
    draw(plots.dose_response(plots.arms_of(steering[emotion]), measure), f"{measure} by dose",
         "Share of held-out scenarios, 95% intervals; 0 is no steering.")  # fmt: skip
    for other, steered in steering.items():
        if other != emotion:
            st.markdown(f"**{md(other)}**: {md(features.verdict(steered))}")


def _quality(found: features.Found) -> None:
    from saes import plots

    quality = found["quality"]
    table(features.quality_rows(found), "Reconstruction of held-out themes", f"{quality['vectors']} training vectors.")
    st.markdown(md(f"Spliced into the model, {rate(quality['recovered'])} of the loss that zeros cost is recovered "
                   f"({quality['tokens_scored']} tokens)."))  # fmt: skip
    if stable := quality.get("stability"):
        said = ", ".join(f"{k.replace('_', ' ')} {num(v)}" for k, v in stable.items() if isinstance(v, (int, float)))
        st.markdown(md(f"Agreement of dictionaries from several seeds: {said}."))
    draw(plots.densities(quality["held_out_themes"]["density_histogram"]), "How often latents fire")


def _confidence(found: features.Found) -> None:
    from saes import plots

    st.markdown("A vector that was learned to make the next token sure at the ends of reasoning steps. "
                "Sure is not right: the answers say which.")  # fmt: skip
    table(features.entropy_rows(found), "Entropy of the next token, nats",
          "At step ends of traces that nothing was learned from.")  # fmt: skip
    measure = choose("Measure", list(features.MEASURES), "answers", format_func=features.MEASURES.__getitem__)
    draw(plots.dose_response(plots.doses_of(found["answers"]), measure, "residual norms"),
         f"{features.MEASURES[measure]} by dose",
         f"{found['answers']['n']} problems that nothing was learned from, 95% intervals over themes.")  # fmt: skip
    table(features.answer_rows(found), "Answers", "A mixture chooses its own dose for each problem.")


if __name__ == "__main__":
    page("Features", show)
