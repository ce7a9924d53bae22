"""The playground: one prompt, unsteered and steered side by side, and what the push did to the text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from dashboards import folders, livemodel, mixing
from dashboards.shell import STRIP, cells, choose, draw, level, missing, page
from dashboards.words import file_name, md, num
from emocircuits import live_plots, plots
from emocircuits.report import RunData

PROMPT = 'The letter from the bank came this morning. I read it twice.\nI told my friend: "'
POSITIONS = ("all", "generated", "prompt", "last")


@dataclass(frozen=True)
class Written:
    """What one press of the button gave: two texts, and their readings (None for an empty text)."""

    texts: tuple[str, str]
    readings: tuple[Any, Any]


def show(data: RunData) -> None:
    """Controls, the two texts, what they carry, and the file."""
    way, steerers = _steerers(data)
    if not steerers:
        missing("This folder holds nothing to steer with", "A whole run saves directions and a steerer per emotion.",
                folders.how_to_finish(data))  # fmt: skip
        return
    weights, strength = _mixer(steerers)
    prompt, chat = _prompt()
    decoding, seed, positions = _decoding()
    steerer = mixing.mix(steerers, weights, strength, positions)
    made_for = next(iter(steerers.values())).fingerprint
    asked = st.button("Write", type="primary", icon=":material/edit:", help="Change anything to stop the writing.")
    boxes = _boxes(steerer)
    directions = livemodel.directions(data)

    def write(loaded: Any) -> Written:
        return _write(loaded, [{"role": "user", "content": prompt}] if chat else prompt, steerer, directions, decoding,
                      seed, lambda row, text: boxes[row].text(text))  # fmt: skip

    key = (str(data.path), way, prompt, chat, seed, positions, strength, tuple(weights.items()), str(decoding))
    if asked and not prompt.strip():
        st.info("There is nothing to go on from: give a prompt.")
        asked = False
    known = livemodel.remembered(key, False, lambda: None) is not None
    found = livemodel.remembered(key, asked, lambda: livemodel.with_model(data, write, "Writing", made_for))
    if asked and known:
        st.caption("The same settings give the same texts; another seed, under *How it is written*, gives others.")
    if found is not None:
        for box, text in zip(boxes, found.texts):
            box.text(text)
        _fluency(data, found)
        if directions is not None and all(found.readings):
            _carried(data, found, directions, max(weights, key=lambda e: abs(weights[e])))
    _files(steerer, prompt, found)


def _steerers(data: RunData) -> tuple[str, dict[str, Any]]:
    """The way to steer that was chosen, and its steerer of each emotion; nothing where the run saved nothing."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {}
    directions, units = livemodel.directions(data), livemodel.units(data)
    if saved := mixing.saved_steerers(data):
        ways["directions"] = lambda: saved
    elif directions is not None:
        ways["directions"] = lambda: mixing.from_directions(data, directions)
    circuits = {e: c for e in data.emotions if (c := livemodel.circuit(data, e)) is not None}
    if circuits and units is not None:
        ways["circuits"] = lambda: mixing.from_circuits(data, circuits, units)
    if not ways:
        return "", {}
    way = choose("Steer with", tuple(ways), "with", buttons=True) if len(ways) > 1 else next(iter(ways))
    return way, ways[way]()


def _mixer(steerers: dict[str, Any]) -> tuple[dict[str, float], float]:
    st.caption("1 is the strength that the run chose for the emotion; below 0 the emotion is taken away.")
    weights = {}
    for emotion, place in cells(list(steerers), 3):
        with place:
            weights[emotion] = level(md(emotion), -2.0, 2.0, 0.0 if weights else 1.0, f"mix-{emotion}", 0.25)
    return weights, level("Strength of the whole mix", 0.0, 3.0, 1.0, "strength", 0.1)


def _prompt() -> tuple[str, bool]:
    text = st.text_area("Prompt", PROMPT, key="prompt", bind="query-params", max_chars=4000, height=100)
    chat = st.toggle("As a chat message", key="chat", bind="query-params",
                     help="Through the model's chat template; base models have none.")  # fmt: skip
    return text, chat


def _decoding() -> tuple[Any, int, str]:
    from emocircuits.generation import Decoding

    with st.expander("How it is written"):
        left, right = st.columns(2)
        with left:
            tokens = level("New tokens", 4, 256, 48, "tokens", 4)
            positions = choose("The push acts on tokens", POSITIONS, "positions")
        with right:
            temperature = level("Temperature (0 is greedy)", 0.0, 1.5, 0.7, "temperature", 0.1)
            seed = level("Seed", 0, 99, 0, "seed")
    return Decoding(tokens, min(8, tokens), temperature), seed, positions


def _boxes(steerer: Any) -> list[Any]:
    boxes = []
    for column, name in zip(
        st.columns(2), ("unsteered", f"steered: {steerer.name}" if steerer else "steered by nothing")
    ):
        with column, st.container(border=True):
            st.caption(md(name))
            boxes.append(st.empty())
    return boxes


def _write(
    loaded: Any,
    prompt: Any,
    steerer: Any,
    directions: Any,
    decoding: Any,
    seed: int,
    on_text: Callable[[int, str], None],
) -> Written:
    """Both texts at once, then each is read by the model without the push."""
    from emocircuits.live import along, write

    model, tokenizer = loaded
    texts = write(model, tokenizer, prompt, [None, steerer], on_text, decoding=decoding, seed=seed)
    read = lambda text: along(model, tokenizer, directions, text, prompt) if text.strip() else None  # noqa: E731
    readings = (None, None) if directions is None else (read(texts[0]), read(texts[1]))
    return Written((texts[0], texts[1]), readings)


def _fluency(data: RunData, found: Written) -> None:
    """The meter: perplexity of both texts under the model as it is."""
    values = [math.nan if r is None else r.perplexity for r in found.readings]
    plain, steered = mixing.fluency(found.texts, values, data)
    more = steered.perplexity / plain.perplexity if plain.perplexity else math.nan
    with st.container(horizontal=True):
        st.metric("Perplexity, unsteered", num(plain.perplexity, ".1f"), border=True, width=165)
        st.metric("Perplexity, steered", num(steered.perplexity, ".1f"), f"{num(more, '.1f')} times", delta_color="off",
                  delta_arrow="off", border=True, width=165)  # fmt: skip
    if steered.limit is not None:
        share = math.log(max(steered.perplexity, 1.0)) / math.log(max(steered.limit, 1.0 + 1e-9))
        place = 1.0 if math.isnan(share) else min(max(share, 0.0), 1.0)
        rule = md(f"(perplexity may reach {num(steered.limit, '.0f')})")
        broken = f":red[:material/error: {md(f'degenerate: {steered.reason}')}]"
        st.progress(place, f"{broken if steered.reason else md('fluent by the rule of the run')} {rule}")
    st.caption("How odd the text is to the model as it is; repetition is easy to predict, so read the text, too.")


def _carried(data: RunData, found: Written, directions: Any, emotion: str) -> None:
    """What both texts carry, read by the model as it is, so that the push itself is not read."""
    best = ((data.quality or {}).get("sets") or [{}])[0].get("best_layer")
    start = (
        best if isinstance(best, int) and best in directions.layers else directions.layers[len(directions.layers) // 2]
    )
    layer = level("Read at layer", min(directions.layers), max(directions.layers), start, "layer")
    plain, steered = found.readings
    if emotion not in steered.emotions:
        emotion = steered.emotions[0]
    means = [dict(zip(r.emotions, r.at(layer).mean(0).tolist())) for r in (plain, steered)]
    draw(live_plots.mix_bars(*means), "What the texts carry", "Mean projection of their tokens; pale unsteered.")
    at = steered.emotions.index(emotion)
    top = max(float(r.at(layer)[:, at].abs().max()) for r in (plain, steered))
    for column, name, reading in zip(st.columns(2), ("unsteered", "steered"), (plain, steered)):
        with column:
            values = reading.at(layer)[:, at].tolist()
            draw(live_plots.token_strip(reading.pieces, values, plots.emotion_color(emotion), top=top),
                 f"{emotion} along the {name} text", width=STRIP)  # fmt: skip
    draw(live_plots.along_lines(steered.pieces, steered.at(layer).tolist(), steered.emotions, smooth=6),
         "Every emotion along the steered text", "Each point averages six tokens.")  # fmt: skip


def _files(steerer: Any, prompt: str, found: Written | None) -> None:
    if steerer is None:
        return
    name = f"{file_name(steerer.name)}.safetensors"
    with st.container(horizontal=True):
        st.download_button("Download the steerer", mixing.as_file(steerer), name, icon=":material/download:",
                           on_click="ignore")  # fmt: skip
        if found is not None:
            rows = {"prompt": prompt, "steerer": steerer.name, "unsteered": found.texts[0], "steered": found.texts[1]}
            st.download_button("Download the texts", json.dumps(rows, ensure_ascii=False, indent=1), "texts.json",
                               "application/json", icon=":material/download:", on_click="ignore")  # fmt: skip
    with st.expander("Use it in your own code"):
        st.code(mixing.snippet(name))


if __name__ == "__main__":
    page("Steer", show)
