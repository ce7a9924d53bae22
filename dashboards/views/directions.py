"""How good the directions are, how they lie to each other, and what any sentence carries along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from dashboards import findings, folders, livemodel
from dashboards.shell import STRIP, choose, draw, lacking, level, missing, page, patiently, table
from dashboards.words import md
from emocircuits import live_plots, plots
from emocircuits.errors import MissingPackageError
from emocircuits.report import RunData

VIEWS = ("Read a text", "Quality", "Geometry", "Words")


def show(data: RunData) -> None:
    """One view."""
    view = choose("View", VIEWS, "view", buttons=True, default="Quality")
    {"Read a text": _read, "Quality": _quality, "Geometry": _geometry, "Words": _words}[view](data)


# ------------------------------------------------------------------------------------------------ reading a text


def _read(data: RunData) -> None:
    made = _directions(data)
    if made is None:
        return
    with st.form("reading", border=False):
        text = st.text_area("Text", livemodel.EXAMPLE, key="text", bind="query-params", max_chars=4000, height=100)
        prompt = st.text_input("Stands before it (read, but not shown)", key="before", bind="query-params")
        asked = st.form_submit_button("Read it", type="primary", icon=":material/play_arrow:")
    from emocircuits.live import along

    def read(loaded: Any) -> Any:
        return along(loaded.model, loaded.tokenizer, made, text, prompt)

    key = (str(data.path), text, prompt)
    found = livemodel.remembered(
        key, asked, lambda: livemodel.with_model(data, read, "Reading", made.fingerprint)
    )  # fmt: skip
    if found is None:
        st.caption("The model reads the text once and keeps every token's projection at every layer.")
        return
    left, right = st.columns(2)
    with left:
        layer = level("Layer", min(made.layers), max(made.layers), _best_layer(data, made), "layer")
    with right:
        emotion = choose("Emotion", made.emotions, "emotion")
    scores, at = found.at(layer), found.emotions.index(emotion)
    left, right = st.columns([2, 3])
    with left:
        draw(
            live_plots.token_strip(found.pieces, scores[:, at].tolist(), plots.emotion_color(emotion)),
            f"{emotion} at layer {layer}, token by token", "Colour above the mean of the training texts, grey below.",
            width=STRIP,
        )  # fmt: skip
    with right:
        smooth = level("Tokens averaged", 1, 16, 6, "smooth")
        draw(
            live_plots.along_lines(found.pieces, scores.tolist(), found.emotions, smooth=smooth),
            f"Every emotion at layer {layer}",
            "Directions were fitted on means over whole replies, so single tokens are noisy: average some.",
        )  # fmt: skip
    with st.expander("All layers, and how surprising each token is"):
        draw(live_plots.layer_map(found.scores[:, :, at].tolist(), found.layers, found.pieces), f"{emotion} by layer")
        draw(
            live_plots.token_strip(found.pieces, found.surprise.nan_to_num().tolist()), "Surprisal of each token",
            f"In nats; perplexity of the text {found.perplexity:.1f}.", width=STRIP,
        )  # fmt: skip
    table(findings.token_rows(found, layer), f"Numbers at layer {layer}", "Emotions in units of the residual norm.")


def _best_layer(data: RunData, made: Any) -> int:
    found = ((data.quality or {}).get("sets") or [{}])[0].get("best_layer")
    return found if isinstance(found, int) and found in made.layers else made.layers[len(made.layers) // 2]


def _directions(data: RunData) -> Any:
    """The saved directions, or the empty state."""
    made = livemodel.directions(data)
    if made is None:
        missing("The directions themselves are not in this folder",
                f"Reading a text needs {livemodel.DIRECTIONS}, which a whole run holds.",
                folders.how_to_finish(data))  # fmt: skip
    return made


# ------------------------------------------------------------------------------------------------ quality


def _quality(data: RunData) -> None:
    if lacking(data, "quality"):
        return
    quality = data.quality or {}
    sets = {str(found["name"]): found for found in quality["sets"]}
    left, right = st.columns(2)
    with left:
        chosen = sets[choose("Read at", list(sets), "set")]
    with right:
        measure = choose("Measure", ("accuracy", "auroc"), "measure")
    chance = 0.5 if measure == "auroc" else 1 / len(quality["emotions"])
    draw(
        plots.quality_by_layer(chosen, quality["layers"], chance, measure), f"{measure} by layer, held out",
        f"Trained on {chosen.get('trained_on', 'unrecorded texts')}. The dotted line chose the layer, on training "
        "themes alone; the grey band is what shuffled labels give.",
    )  # fmt: skip
    table(findings.test_rows(quality), "Every test at the layer that training themes chose")
    table(
        findings.fit_rows(quality), "Ways to fit the reply directions",
        "The read-out is the method that was best on left-out training themes; the difference of means steers. Only "
        "what exceeds the replies' character n-grams is the model's own.",
    )  # fmt: skip
    if chosen.get("split_half"):
        halves = plots.split_half_map(chosen["split_half"], quality["emotions"], quality["layers"])
        draw(halves, "Directions fitted on two halves of the scenarios",
             "Their cosine; at 1, more data would not move them.")  # fmt: skip
    table(findings.confound_rows(quality), "What else could explain the directions")


# ------------------------------------------------------------------------------------------------ geometry


def _geometry(data: RunData) -> None:
    if lacking(data, "quality"):
        return
    quality, made = data.quality or {}, livemodel.directions(data)
    emotions, left, right = quality["emotions"], *st.columns(2)
    with left:
        if made is not None:
            layer = level("Layer", min(made.layers), max(made.layers), _best_layer(data, made), "layer")
            cosines = made.cosines(layer).tolist()
        else:
            layer, cosines = quality["geometry"].get("layer"), quality["geometry"]["cosines"]
        draw(plots.geometry_map(cosines, emotions), f"Cosines between the emotions' directions at layer {layer}")
    with right:
        found = _plane(data, emotions, layer)
        if found and found.get("points"):
            way = "UMAP" if found.get("method") == "umap" else "two principal components"
            draw(plots.embedding_scatter(found["points"], findings.axes(found)),
                 f"Readings at layer {found.get('layer')}, {way}",
                 "Open diamonds are held out: they shaped neither the map nor the directions.")  # fmt: skip
    for name, values in (quality.get("cosines") or {}).items():
        draw(plots.split_half_map(values, emotions, quality["layers"]), f"Cosine of {name}")


def _plane(data: RunData, emotions: Sequence[str], layer: int) -> Any:
    """Readings in two dimensions at the chosen layer; what the run drew where it holds no readings."""
    train, test = (livemodel.readings(data, held_out) for held_out in (False, True))
    if train is None or test is None or layer not in train.layers:
        return data.embedding
    method = {"principal components": "pca", "UMAP": "umap"}[choose("Map", ("principal components", "UMAP"), "map")]
    from emocircuits.projection import readings_plane

    def drawn() -> dict[str, Any]:
        return {**readings_plane(train, test, emotions, layer, method), "method": method}

    try:
        key = (str(data.path), folders.stamp(data.path), layer, method)
        return patiently(key, drawn, "Drawing the map, a minute for the first by UMAP")
    except MissingPackageError as error:
        st.info(md(error))
        return data.embedding


# ------------------------------------------------------------------------------------------------ words


def _words(data: RunData) -> None:
    made = _directions(data)
    if made is None:
        return
    left, right = st.columns(2)
    with left:
        emotion = choose("Emotion", made.emotions, "emotion")
    with right:
        layer = level("Layer", min(made.layers), max(made.layers), _best_layer(data, made), "layer")
    from emocircuits.live import promoted

    def read(loaded: Any) -> Any:
        return promoted(loaded.model, loaded.tokenizer, made.units[made.index(emotion), made.slots(layer)[0]])

    asked = st.button("Show the words", type="primary", icon=":material/play_arrow:")
    key = (str(data.path), "words", emotion, layer)
    found = livemodel.remembered(key, asked, lambda: livemodel.with_model(data, read, "Reading", made.fingerprint))
    if found is None:
        st.caption("Which tokens a push along the direction makes likelier, read through the final norm and the "
                   "unembedding. Layers far from the end need not speak in tokens.")  # fmt: skip
        return
    draw(
        live_plots.promoted_bars(found),
        f"Tokens that {emotion} at layer {layer} makes likelier (green) and less likely",
    )


if __name__ == "__main__":
    page("Directions", show)
