"""What a run of `emocircuits anchors` holds, as rows of text and of figures. No Streamlit in here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dashboards.folders import ANCHORS, inside
from dashboards.words import num, plain, rate
from emocircuits.artefact import read_json
from emocircuits.errors import InputError

Row = dict[str, Any]
Found = Mapping[str, Any]
WINDOW = 60
"""Steps shown at once: a trace may have thousands."""


def read(folder: Path) -> Found:
    """What the traces say together; raises InputError for a damaged file."""
    return read_json(folder / ANCHORS)


def traces(folder: Path) -> dict[str, Path]:
    """The measured traces of a run by the name of their stage."""
    return {f.stem.removeprefix("trace_"): f for f in sorted(folder.glob("trace_*.json"))}


def verdicts(found: Found) -> list[str]:
    """The findings in words, as the report says them."""
    from emocircuits.reasoning.findings import sentences

    return [plain(sentence) for sentence in sentences(found)]


def window(n: int, chosen: int, size: int = WINDOW) -> tuple[int, int]:
    """First and last (exclusive) of at most `size` steps around the chosen one."""
    start = max(0, min(chosen - size // 2, n - size))
    return start, min(n, start + size)


def words(steps: Sequence[str], values: Sequence[float | None], first: int = 0) -> tuple[list[str], list[float]]:
    """Steps as words that a strip can wrap, each with its step's value; a step begins with its number."""
    pieces: list[str] = []
    numbers: list[float] = []
    for i, (step, value) in enumerate(zip(steps, values), start=first):
        said = [f"{i}:", *step.split()]
        pieces += said
        numbers += [float("nan") if value is None else value] * len(said)
    return pieces, numbers


def importances(trace: Found) -> dict[str, list[Row]]:
    """Kinds of importance that a trace has, as rows of `importance_along`, the richest first."""
    found = {"asked at once": trace["forced"]["kl"]}
    if sampled := trace.get("sampled"):
        found = {"resampling": sampled["resampling"], "counterfactual": sampled["counterfactual"], **found}
    return found


def part(matrix: Sequence[Sequence[Any]], start: int, stop: int) -> list[list[Any]]:
    """The square block of a matrix that a window shows."""
    return [list(row[start:stop]) for row in matrix[start:stop]]


def step_row(trace: Found, step: int) -> list[Row]:
    """Everything known about one step, as rows of a table."""
    rows = [
        {"measure": f"importance, {name}", "value": num(r[step]["value"], ".3f"), "interval": _interval(r[step]),
         "p of the null": num(r[step]["p"], ".3f"), "note": r[step]["reason"]}
        for name, r in importances(trace).items()
    ]  # fmt: skip
    hidden = trace["suppression"]["on_answer"][step]
    rows.append({"measure": "the answer's change when it is hidden (KL)", "value": num(hidden, ".4f")})
    if emotion := trace.get("emotion"):
        for name, value in zip(emotion["emotions"], emotion["carried"][step]):
            rows.append({"measure": f"carries {name} (residual norms)", "value": num(value, "+.3f")})
        for dose, value in zip(emotion["doses"], emotion["odds"][step]):
            said = f"log-odds of {emotion['pushed']} when pushed by {num(dose, '+.2f')}"
            rows.append({"measure": said, "value": num(value, "+.2f")})
    columns = ("measure", "value", "interval", "p of the null", "note")
    return [{name: row.get(name, "") for name in columns} for row in rows]


def _interval(row: Found) -> str:
    return "" if row["low"] is None else f"[{num(row['low'], '.3f')}, {num(row['high'], '.3f')}]"


def rollouts(folder: Path, name: str, step: int, most: int = 200) -> list[Row]:
    """What was sampled in place of a step: its first sentence, the answer, the whole text.

    Reads the store line by line, so that its size does not matter; damaged lines are passed over.
    """
    file = inside(folder, f"trace_{name}.rollouts.jsonl")
    if file is None or not file.is_file():
        return []
    rows: list[Row] = []
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and row.get("boundary") == step and len(rows) < most:
                    answer, text = row.get("answer"), str(row.get("text", ""))
                    rows.append({"said instead": row.get("step", ""), "answer": answer, "whole continuation": text})
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); delete it and make it again") from error
    return rows


def agreement_rows(found: Found) -> list[Row]:
    """Correlations of all measures, beside those with position taken out."""
    beyond = {(r["a"], r["b"]): r for r in found["beyond_position"]}
    return [
        {"measure": r["a"], "with": r["b"], "correlation": rate(r, ".2f"),
         "beyond position": rate(beyond.get((r["a"], r["b"])), ".2f") if (r["a"], r["b"]) in beyond else "",
         "traces": r["n"]}
        for r in found["correlations"]
    ]  # fmt: skip


def category_rows(found: Found) -> list[Row]:
    """Means by kind of step."""
    names = list(found["measures"])
    return [
        {"kind": c["category"], "steps": c["n"], "position": num(c["mean_position"]),
         **{n: rate(c[n], ".3f") for n in names if n in c}}
        for c in sorted(found["categories"], key=lambda c: c["mean_position"] or 0)
    ]  # fmt: skip


def push_rows(found: Found) -> list[Row]:
    """Change of the runner-up's log-odds by dose and by what was pushed."""
    columns = {"most": "most important step", "least": "least important", "everywhere": "all steps",
               "control_everywhere": "random direction, all steps", "beyond_random": "difference"}  # fmt: skip
    return [
        {"dose": num(r["dose"], "+.2f"), **{words: rate(r[c], "+.2f") for c, words in columns.items()}}
        for r in found["pushes"]
    ]
