"""The report's side-by-side texts: one scenario, every method, and what the judge made of each text."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from emocircuits._report_html import emotion_label, esc, note, num
from emocircuits.plots import number

Row = Mapping[str, Any]
Key = tuple[str, str]
METHODS = ("unsteered", "prompted", "random", "steered")
SAMPLE_SEED = 0
SAMPLE_SIZE = 3


class Texts:
    """Rows of texts.jsonl, found by emotion, scenario (skeleton and valence) and method."""

    def __init__(self, rows: Sequence[Row], emotions: Sequence[str]) -> None:
        self._rows: dict[tuple[str, str | None, Key], Row] = {}
        keys: dict[str | None, dict[Key, None]] = defaultdict(dict)
        for row in rows:
            key = (str(row.get("skeleton_id", "?")), str(row.get("valence", "?")))
            self._rows.setdefault((str(row["method"]), row.get("emotion"), key), row)
            keys[row.get("emotion")][key] = None
        shared = list(keys.get(None, {}))
        self.keys = {e: found for e in emotions if (found := list(keys.get(e, {})) or shared)}

    def of(self, emotion: str, key: Key) -> dict[str, Row]:
        """The rows of one scenario by method; a text without a target (unsteered) serves every emotion."""
        found = {m: self._rows.get((m, emotion, key)) or self._rows.get((m, None, key)) for m in METHODS}
        return {method: row for method, row in found.items() if row is not None}

    def sample(self, emotion: str) -> list[Key]:
        """Scenarios drawn with a fixed seed, blind to how their texts came out."""
        keys = sorted(self.keys[emotion])
        return random.Random(f"{SAMPLE_SEED} {emotion}").sample(keys, min(SAMPLE_SIZE, len(keys)))

    def coherent(self, emotion: str, key: Key) -> bool | None:
        """Whether the steered text counts as coherent expression, None if there is none."""
        steered = self.of(emotion, key).get("steered")
        return None if steered is None else bool(steered.get("coherent"))


def section(texts: Texts) -> str:
    """The drawn sample of every emotion, then the browser of all scenarios (filled by `browser_data`)."""
    blocks = []
    for i, emotion in enumerate(texts.keys):
        drawn = texts.sample(emotion)
        known = [c for key in drawn if (c := texts.coherent(emotion, key)) is not None]
        tally = f"{sum(known)} of {len(known)} steered texts coherent" if known else "no steered texts"
        body = "".join(scenario(texts.of(emotion, key), emotion) for key in drawn)
        state = " open" if i == 0 else ""
        blocks.append(
            f"<details{state}><summary>{emotion_label(emotion)}"
            f'<span class="tally">{tally}</span></summary>{body}</details>'
        )
    return (
        note(
            f"{SAMPLE_SIZE} scenarios per emotion, drawn with seed {SAMPLE_SEED} and shown whatever came "
            "out, failures included. The browser below holds every scenario."
        )
        + "".join(blocks)
        + _BROWSER
    )


_BROWSER = """<h3>All texts</h3>
<div class="controls">
<label>Emotion <select id="text-emotion"></select></label>
<label class="long">Scenario <select id="text-scenario"></select></label>
<button type="button" id="text-back">Previous</button><button type="button" id="text-next">Next</button>
</div><div id="text-view" aria-live="polite"></div>"""


def browser_data(texts: Texts) -> dict[str, list[dict[str, str]]]:
    """For every emotion, its scenarios as {"label": text, "html": the escaped block}."""
    return {
        emotion: [
            {"label": _label(texts, emotion, key), "html": scenario(texts.of(emotion, key), emotion)} for key in keys
        ]
        for emotion, keys in texts.keys.items()
    }


def scenario(rows: Mapping[str, Row], emotion: str) -> str:
    """One scenario: its prompt, and a card per method."""
    if not rows:
        return note("no texts for this scenario")
    lead = next(iter(rows.values()))
    where = ", ".join(str(lead[k]) for k in ("theme", "skeleton_id", "valence") if lead.get(k) is not None)
    cards = "".join(_card(method, row, emotion, str(lead.get("prompt", ""))) for method, row in rows.items())
    return (
        f'<div class="scenario"><p class="prompt"><span class="where">{esc(where)}, '
        f"wanted: {esc(emotion)}</span>{esc(lead.get('prompt', ''))}</p>"
        f'<div class="cards">{cards}</div></div>'
    )


def _card(method: str, row: Row, emotion: str, shown_prompt: str) -> str:
    prompt = str(row.get("prompt", ""))
    asked = "" if prompt == shown_prompt else f'<p class="verdict">Prompt: {esc(prompt)}</p>'
    return (
        f'<article class="card {esc(method)}"><h4>{esc(method)}</h4>{asked}'
        f'<p class="words">{esc(row.get("text", "")) or "(empty)"}</p>'
        f'<p class="verdict">{_verdict(row, emotion)}</p></article>'
    )


def _verdict(row: Row, emotion: str) -> str:
    """The judge's reading and every flag, with the outcome first."""
    read = f"judge reads {esc(row.get('predicted') or 'nothing')}"
    if (share := number(row.get("target_probability"))) is not None and row.get("emotion"):
        read += f" (gives {esc(emotion)} {share:.0%})"
    parts = [read]
    if (cost := number(row.get("perplexity"))) is not None:
        parts.append(f"perplexity {num(cost, '.1f')}")
    flags = [_badge("bad", "names the emotion")] if row.get("named") else []
    if row.get("degenerate"):
        flags.append(_badge("bad", f"degenerate: {row.get('reason') or 'no reason recorded'}"))
    if row.get("emotion") is None:
        outcome = ""
    elif row.get("coherent"):
        outcome = _badge("good", "coherent expression")
    else:
        outcome = _badge("mid", "expressed, not coherent" if row.get("expressed") else "not expressed")
    return " ".join(filter(None, [outcome, *flags, "; ".join(parts)]))


def _badge(kind: str, words: str) -> str:
    return f'<span class="badge {kind}">{esc(words)}</span>'


def _label(texts: Texts, emotion: str, key: Key) -> str:
    mark = {True: "coherent", False: "not coherent", None: "no steered text"}[texts.coherent(emotion, key)]
    row = next(iter(texts.of(emotion, key).values()), {})
    where = ", ".join(str(part) for part in (row.get("theme"), *key) if part is not None)
    return f"{where} ({mark})"
