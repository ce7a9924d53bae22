"""What a run of `emocircuits anchors` holds, as rows of text and of figures. No Streamlit in here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from dashboards.folders import ANCHORS, inside
from dashboards.words import num, plain, rate
from emocircuits import live_plots
from emocircuits._figures import number, text
from emocircuits.artefact import read_json
from emocircuits.errors import InputError
from emocircuits.reasoning import plots
from emocircuits.reasoning.names import PUSHES, name_of, pair

Row = dict[str, Any]
Found = Mapping[str, Any]
LINES, COLUMNS = 16, 40
"""Of the text that is shown at once, so that what is said of a step stands beside it on the screen."""


def read(folder: Path) -> Found | None:
    """What the traces say together, None where not all were measured; raises InputError for a damaged file."""
    return read_json(folder / ANCHORS) if (folder / ANCHORS).is_file() else None


def measure_rows(found: Found) -> list[Row]:
    """What was measured, in words."""
    return [{"measure": name_of(name), "what": what} for name, what in found["measures"].items()]


def figures(folder: Path) -> dict[str, str]:
    """{measure: value} of what all traces say, to stand beside another run."""
    found = read(folder)
    if found is None:
        return {"traces measured so far": str(len(traces(folder)))}
    said = {"traces": str(found["n_traces"]), "steps": str(found["n_steps"])}
    return said | {f"correlation, {pair(r)}": rate(r, ".2f") for r in found["correlations"]}


def traces(folder: Path) -> dict[str, Path]:
    """The measured traces of a run by the name of their stage."""
    return {f.stem.removeprefix("trace_"): f for f in sorted(folder.glob("trace_*.json"))}


def verdicts(found: Found) -> list[str]:
    """The findings in words, as the report says them."""
    from emocircuits.reasoning.findings import sentences

    return [plain(sentence) for sentence in sentences(found)]


def importances(trace: Found) -> dict[str, list[Row]]:
    """Kinds of importance that a trace has, as rows of `importance_along`, the richest first."""
    sampled = trace.get("sampled") or {}
    found = {k: sampled[k] for k in ("resampling", "counterfactual") if k in sampled}
    return {name_of(k): rows for k, rows in (found | {"forced": trace["forced"]["kl"]}).items()}


def answers(trace: Found, start: int, stop: int) -> go.Figure:
    """The answers at the boundaries of some steps, of rollouts where there are some."""
    curves = (trace.get("sampled") or trace["forced"])["shares"]
    shown = {answer: curve[start : stop + 1] for answer, curve in curves.items()}
    return plots.answers_along(shown, trace["truth"], asked=not trace.get("sampled"), first=start)


# ------------------------------------------------------------------------------------------------ choosing a step


def clicked(event: Any) -> int | None:
    """The step that was clicked in a figure, from Streamlit's selection event; None when there is none."""
    points = ((event or {}).get("selection") or {}).get("points") or []
    data = points[0].get("customdata") if points else None
    values = list(data.values() if isinstance(data, Mapping) else data) if isinstance(data, (Mapping, list)) else [data]
    return values[-1] if values and isinstance(values[-1], int) and values[-1] >= 0 else None


def excerpt(steps: Sequence[str], chosen: int, lines: int = LINES) -> tuple[int, int]:
    """First and last (exclusive) of the steps around the chosen one that fill about so many lines of a strip."""
    start, stop, room = chosen, chosen + 1, lines * (COLUMNS - 4) - _letters(steps[chosen])
    for side in range(2 * len(steps)):
        at = stop if side % 2 == 0 else start - 1
        if not 0 <= at < len(steps):
            continue
        room -= _letters(steps[at])
        if room < 0:
            break
        start, stop = min(start, at), max(stop, at + 1)
    return start, stop


def _letters(step: str) -> int:
    return 5 + sum(len(word) + 1 for word in step.split())


def strip(steps: Sequence[str], values: Sequence[float | None], chosen: int, first: int, top: float) -> go.Figure:
    """Steps as a text that reads on, each as dark as its value; every word names its step, the chosen one is framed."""
    said = [[f"{i}:", *step.split()] for i, step in enumerate(steps, start=first)]
    known = [float("nan") if value is None else value for value in values]
    pieces, of = [w for each in said for w in each], [i for i, each in enumerate(said) for _ in each]
    fig = live_plots.token_strip(pieces, [known[i] for i in of], plots.INK, columns=COLUMNS, top=top)
    hovers = [f"step {i}: {num(v, '+.3g')}" for i, v in enumerate(known, start=first)]
    words: Any = fig.data[0]
    words.update(customdata=[[hovers[i], first + i] for i in of], hovertemplate="%{customdata[0]}<extra></extra>")
    mine = [(y, x, x + size) for i, y, x, size in zip(of, words.y, words.base, words.x) if first + i == chosen]
    for line in dict.fromkeys(y for y, _, _ in mine):
        ends = [x for y, *both in mine if y == line for x in both]
        _frame(fig, min(ends), max(ends), line - 0.46, line + 0.46)
    return fig


def bars(steps: Sequence[str], rows: Sequence[Found], chosen: int, first: int) -> go.Figure:
    """Importance along a window of steps; a click anywhere above a step is one on it, and the chosen one is framed."""
    fig = plots.importance_along(steps, rows, first=first).update_traces(hoverinfo="skip", hovertemplate=None)
    unseen = {"marker": {"opacity": 0}}
    values = [number(r["value"]) for r in rows]
    about = [f"step {i}: {num(v, '.3f')}<br>{_start(s)}<br>{text(r.get('reason') or '')}"
             for i, (s, r, v) in enumerate(zip(steps, rows, values), start=first)]  # fmt: skip
    fig.add_scatter(
        x=list(range(first, first + len(rows))), y=[v or 0.0 for v in values], mode="markers", showlegend=False,
        marker={"size": 14, "opacity": 0}, selected=unseen, unselected=unseen, text=about,
        customdata=list(range(first, first + len(rows))), hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    _frame(fig, chosen - 0.5, chosen + 0.5, 0, 1, yref="paper")
    return fig.update_layout(height=240, hovermode="x", hoverdistance=-1)


def marks(rows: Sequence[Found], chosen: int) -> go.Figure:
    """The most important steps of a long trace, to be clicked; a line stands at the chosen one."""
    fig = plots.marks_along(rows).update_layout(hovermode="closest", hoverdistance=-1)
    return fig.add_vline(x=chosen, line={"color": plots.INK, "width": 2})


def _frame(fig: go.Figure, x0: float, x1: float, y0: float, y1: float, **more: Any) -> None:
    fig.add_shape(type="rect", x0=x0, x1=x1, y0=y0, y1=y1, line={"color": plots.INK, "width": 2}, **more)


def _start(step: str, most: int = 90) -> str:
    flat = " ".join(step.split())
    return text(flat if len(flat) <= most else flat[: most - 1] + "…")


# ------------------------------------------------------------------------------------------------ one step


def step_row(trace: Found, step: int) -> list[Row]:
    """Everything known about one step, as rows of a table."""
    rows = [
        {"measure": f"importance, {name}", "value": num(r[step]["value"], ".3f"), "interval": _interval(r[step]),
         "p of the null": num(r[step]["p"], ".3f"), "note": r[step]["reason"]}
        for name, r in importances(trace).items()
    ]  # fmt: skip
    hidden = trace["suppression"]["on_answer"][step]
    rows.append({"measure": f"{name_of('hidden')}: the answer's change (KL)", "value": num(hidden, ".4f")})
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


def rollout_file(folder: Path, name: str) -> Path | None:
    """Where a trace's rollouts are; None when it has none."""
    file = inside(folder, f"trace_{name}.rollouts.jsonl")
    return file if file is not None and file.is_file() else None


def index(file: Path) -> dict[int, list[int]]:
    """Where in a store each step's rollouts begin, in bytes; damaged lines are passed over."""
    found: dict[int, list[int]] = {}
    try:
        with file.open("rb") as lines:
            at = 0
            for line in lines:
                if isinstance(row := _row(line), dict) and isinstance(boundary := row.get("boundary"), int):
                    found.setdefault(boundary, []).append(at)
                at += len(line)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); delete it and make it again") from error
    return found


def rollouts(file: Path, places: Sequence[int], most: int = 200) -> list[Row]:
    """What was sampled in place of a step: its first sentence, the answer, the whole text; `places` from `index`."""
    rows: list[Row] = []
    try:
        with file.open("rb") as lines:
            for at in places[:most]:
                lines.seek(at)
                if isinstance(row := _row(lines.readline()), dict):
                    rows.append({"said instead": row.get("step", ""), "answer": row.get("answer"),
                                 "whole continuation": str(row.get("text", ""))})  # fmt: skip
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); delete it and make it again") from error
    return rows


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------ all traces


def agreement(found: Found) -> list[Row]:
    """Correlations with what moves the answer, as `agreement_bars` draws them."""
    return [{**r, "name": pair(r)} for r in found["correlations"] if r["a"] in ("forced", "resampling")]


def agreement_rows(found: Found) -> list[Row]:
    """Correlations of all measures, beside those with position taken out."""
    beyond = {(r["a"], r["b"]): r for r in found["beyond_position"]}
    return [
        {"measure": name_of(r["a"]), "with": name_of(r["b"]), "correlation": rate(r, ".2f"),
         "beyond position": rate(beyond.get((r["a"], r["b"])), ".2f") if (r["a"], r["b"]) in beyond else "",
         "traces": r["n"]}
        for r in found["correlations"]
    ]  # fmt: skip


def category_rows(found: Found) -> list[Row]:
    """Means by kind of step."""
    names = list(found["measures"])
    return [
        {"kind": c["category"], "steps": c["n"], "position": num(c["mean_position"]),
         **{name_of(n): rate(c[n], ".3f") for n in names if n in c}}
        for c in sorted(found["categories"], key=lambda c: c["mean_position"] or 0)
    ]  # fmt: skip


def push_rows(found: Found) -> list[Row]:
    """Change of the runner-up's log-odds by dose and by what was pushed."""
    return [
        {"dose": num(r["dose"], "+.2f"), **{words: rate(r[c], "+.2f") for c, words in PUSHES.items()}}
        for r in found["pushes"]
    ]
