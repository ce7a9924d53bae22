"""The results as one Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    """Every table of an evaluation."""
    parts = [_about(result["manifest"]), _scores(result), _knobs(result), _attention(result["attention"])]
    if "reallocation" in result:
        parts += [_reallocation(result), _costs(result), _sweep(result["reallocation"])]
    return "\n\n".join(parts) + "\n"


def _about(manifest: Mapping[str, Any]) -> str:
    trained, people = manifest["training"], manifest["persons"]
    voice, face = trained["recipe"]["reliable"]
    return (
        "# A small audio-visual model with a known preference\n\n"
        f"{trained['parameters']:,} parameters, trained for {trained['steps']} steps of {trained['batch']} generated"
        f" clips in {trained['minutes']} minutes ({trained['cpu_minutes']} of CPU time) on"
        f" {trained['threads']} thread(s), seed {trained['seed']}. In training"
        f" the voice shows the emotion of an audio-visual clip with probability {voice}, the face with {face}: ideal"
        f" inference from two clear, different cues would have a preference gap of {trained['expected_gap']:.2f}.\n\n"
        f"Held-out: {people} people not seen in training, {6 * people} clips of each kind, evaluation seed"
        f" {manifest['seed']}. Answers are scored by likelihood over {len(manifest['emotions'])} answer words (chance"
        f" {1 / len(manifest['emotions']):.2f}). Brackets: 95% bootstrap intervals that resample people. Preference"
        " gap: P(emotion of the voice) - P(emotion of the face) on conflict clips; above 0 the voice is preferred."
    )


def _scores(result: Mapping[str, Any]) -> str:
    s, named = result["scores"], result["named"]
    rows = [
        ("accuracy, voice alone", s["audio"]), ("accuracy, face alone", s["image"]),
        ("accuracy, consistent voice and face", s["consistent"]),
        ("accuracy on conflict, question names the voice", named["voice"]),
        ("accuracy on conflict, question names the face", named["face"]),
        ("conflict: answered with the voice's emotion", s["as voice"]),
        ("conflict: answered with the face's emotion", s["as face"]),
        ("conflict: preference gap", s["gap"]),
    ]  # fmt: skip
    return "## Held-out scores\n\n" + _table(("measure", "value"), [(name, _interval(x)) for name, x in rows])


def _knobs(result: Mapping[str, Any]) -> str:
    rows = [(name, *(_interval(x[c]) for c in ("gap", "as voice", "as face"))) for name, x in result["knobs"].items()]
    head = ("conflict clips with", "gap", "answered as voice", "answered as face")
    return "## What moves the gap in the clips (25 audio tokens a second; 16 image tokens)\n\n" + _table(head, rows)


def _attention(shares: Mapping[str, Sequence[float]]) -> str:
    layers = len(next(iter(shares.values())))
    rows = [(name, *(f"{x:.2f}" for x in values)) for name, values in shares.items()]
    head = ("attention of the last query to", *(f"layer {n}" for n in range(layers)))
    return "## Where attention goes on conflict clips\n\n" + _table(head, rows)


def _reallocation(result: Mapping[str, Any]) -> str:
    found, before = result["reallocation"], result["scores"]
    head = (
        "policy, queries",
        "strength",
        "gap",
        "as voice",
        "as face",
        "consistent",
        "random: gap",
        "random: consistent",
    )
    none = [_interval(before[c]) for c in ("gap", "as voice", "as face", "consistent")]
    rows: list[tuple[str, ...]] = [("none", "", *none, "", "")]
    for row in found["held_out"]:
        columns = ("gap", "as voice", "as face", "consistent", "random gap", "random consistent")
        rows.append((row["way"], f"{row['strength']:g}", *(_interval(row[c]) for c in columns)))
    return (
        f"## Attention reallocation, {found['from']} to {found['to']}, held-out clips\n\n"
        "Strengths were chosen on validation people: the smallest absolute gap that costs at most"
        f" {found['allowed_loss']:.2f} of consistent accuracy. Random: the same policy with audio and image labels"
        " dealt out at random among the modality tokens of each prompt, mean of 5 draws. Sinks: a token is one where a"
        f" normalised dimension exceeds {found['sink_size']:.2f} (measured on validation clips). Contrast: contrastive"
        f" decoding against the same clip with noise in the {found['to']} (a second pass each); its random control puts"
        f" the noise in the {found['from']}.\n\n" + _table(head, rows)
    )


def _costs(result: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("none", *(_interval(result["named"][q]) for q in ("voice", "face")), "", "")]
    for row in result["reallocation"]["held_out"]:
        cells = [_interval(row["named"][q]) for q in ("voice", "face")]
        tests = [f"{_interval(row[c])}, p {row[c]['p']:.2g}" for c in ("change", "change beyond random")]
        rows.append((row["way"], *cells, *tests))
    head = ("policy, queries", "names the voice", "names the face", "change of gap", "change beyond random spans")
    return (
        "### What it costs, and paired tests\n\nAccuracy on the same conflict clips when the question names a modality:"
        " reallocation should not make the model deaf to it. p: sign flips of whole people.\n\n" + _table(head, rows)
    )


def _sweep(found: Mapping[str, Any]) -> str:
    ways: dict[str, list[str]] = {}
    for row in found["sweep"]:
        cell = f"{row['strength']:g}: {row['gap']:+.2f} / {row['consistent']:.2f}"
        ways.setdefault(row["way"], []).append(cell)
    rows = [(way, "; ".join(cells)) for way, cells in ways.items()]
    title = (
        "## Sweep on validation clips\n\nStrength: gap / consistent accuracy. Without reallocation:"
        f" {found['validation_gap']:+.2f} / {found['validation_consistent']:.2f}.\n\n"
    )
    return title + _table(("policy, queries", "strengths"), rows)


def _interval(x: Mapping[str, float]) -> str:
    return f"{x['estimate']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
