"""Which steps of a reasoning trace its answer hangs on; shows what `emocircuits anchors` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards import reasoning
from dashboards.shell import STRIP, choose, draw, into, level, missing, page, source, table
from dashboards.words import md, num
from emocircuits.reasoning import parts, plots
from emocircuits.reasoning.findings import sharpness
from emocircuits.report import RunData

COMMAND = "emocircuits anchors --model demo --problems 12"
ROWS = 250  # pixels of a table of rollouts


def show(data: RunData) -> None:
    """A run of anchors: this one, else one beside it; one trace of it, or all together."""
    folder = source(
        data, "reasoning", "Reasoning run", "anchors", "No run of reasoning traces in this folder",
        "Thought anchors say which steps of a trace its answer hangs on.", into(COMMAND, "anchors"),
    )  # fmt: skip
    if folder is None:
        return
    files = reasoning.traces(folder)
    if not files and reasoning.read(folder) is not None:
        st.caption("Single traces are not in this folder; it holds what all of them say together.")
        _all(folder)
    elif files and choose("View", ("One trace", "All traces"), "view", buttons=True) == "One trace":
        _one(folder, files)
    else:
        _all(folder)


@st.cache_resource(max_entries=4, show_spinner="Reading the trace")
def _read(file: str, changed: int) -> reasoning.Found:  # noqa: ARG001 (a changed file is read again)
    return parts.read(Path(file))


@st.cache_resource(max_entries=4, show_spinner="Reading the rollouts")
def _index(file: str, changed: int) -> dict[int, list[int]]:  # noqa: ARG001
    return reasoning.index(Path(file))


def _take(key: str) -> None:
    """A click in the figure `key` chooses the step."""
    step = reasoning.clicked(st.session_state.get(key))
    if step is not None:
        st.session_state["step"] = step


def _clickable(fig: Any, label: str, caption: str, step: int, **more: Any) -> None:
    """A figure whose clicks choose the step; a new one for each choice, so that each click counts."""
    key = f"{label} {step}"
    draw(fig, label, caption, key=key, on_click=lambda: _take(key), **more)


# ------------------------------------------------------------------------------------------------ one trace


def _one(folder: Path, files: dict[str, Path]) -> None:
    left, right = st.columns(2)
    with left:
        name = choose("Trace", list(files), "trace")
    trace = _read(str(files[name]), files[name].stat().st_mtime_ns)
    kinds = reasoning.importances(trace)
    with right:
        kind = choose("Importance", list(kinds), "importance")
    n = len(trace["steps"])
    step = int(level("Step", 0, n - 1, 0, "step")) if n > 1 else 0
    _along(trace["steps"], kinds[kind], kind, step)
    left, right = st.columns([2, 3])
    with left:
        _text(trace["steps"], kinds[kind], step)
    with right:
        _step(folder, name, trace, step)
    if n > parts.WINDOW:
        _clickable(reasoning.marks(kinds[kind], step), "The whole trace", "Its most important steps; click one.", step)
    _inside(trace, *parts.window(n, step))


def _along(steps: Sequence[str], rows: Sequence[reasoning.Found], kind: str, step: int) -> None:
    start, stop = parts.window(len(steps), step)
    fig = reasoning.bars(steps[start:stop], rows[start:stop], step, start)
    said = "Click a step. Filled bars pass the null at 5 %; dashes are what two samples of the same size differ by."
    _clickable(fig, f"Importance, {kind}", said + _of(start, stop, len(steps)), step)


def _text(steps: Sequence[str], rows: Sequence[reasoning.Found], step: int) -> None:
    """The reasoning around the chosen step as it reads."""
    start, stop = reasoning.excerpt(steps, step)
    values = [r["value"] for r in rows]
    top = max((abs(v) for v in values if v is not None), default=1.0)
    fig = reasoning.strip(steps[start:stop], values[start:stop], step, start, top)
    said = "Click a sentence to see what was said in its place. The stronger its colour, the more it moves the answer."
    _clickable(fig, "The reasoning", said + _of(start, stop, len(steps)), step, width=STRIP)


def _of(start: int, stop: int, n: int) -> str:
    return "" if stop - start == n else f" Steps {start} to {stop - 1} of {n}, around the chosen one."


def _step(folder: Path, name: str, trace: reasoning.Found, step: int) -> None:
    """The chosen step: its text, what the model said in its place, and what is known about it."""
    st.subheader(f"Step {step}", anchor=False)
    st.markdown(md(trace["steps"][step]))
    file = reasoning.rollout_file(folder, name)
    places = _index(str(file), file.stat().st_mtime_ns).get(step, []) if file else []
    if file and (found := reasoning.rollouts(file, places)):
        table(found, "What the model said in its place", "Rollouts from just before the step.", height=ROWS)
    table(reasoning.step_row(trace, step), "What is known about it")


def _inside(trace: reasoning.Found, start: int, stop: int) -> None:
    kl, steps = trace["suppression"]["kl"].block(start, stop), trace["steps"][start:stop]
    draw(reasoning.answers(trace, start, stop), "Answers along the trace", "The right one is drawn thick.")
    draw(plots.step_graph(kl, steps, trace["labels"][start:stop], first=start), "What each step needs of earlier ones",
         "Arcs: how much later tokens change when the earlier step is hidden from attention (KL).")  # fmt: skip
    with st.expander("The whole matrix, and what steps carry"):
        draw(plots.effect_matrix(kl, steps, first=start), "Effect of hiding a step (across) on later ones (down)",
             f"Mean KL of the tokens, nats; computing noise {num(trace['suppression']['noise'], '.1e')}.")  # fmt: skip
        if emotion := trace.get("emotion"):
            carried = {e: [row[i] for row in emotion["carried"][start:stop]] for i, e in enumerate(emotion["emotions"])}
            fig = plots.step_lines(steps, carried, "residual norms", first=start)
            draw(fig, f"Emotion at layer {emotion['layer']}",
                 "Mean over the step's tokens, what all emotions share taken out.")  # fmt: skip


# ------------------------------------------------------------------------------------------------ all traces


def _all(folder: Path) -> None:
    found = reasoning.read(folder)
    if found is None:
        missing("Not all traces are measured yet", "The same command goes on where it stopped; what is there is kept.",
                into(COMMAND, folder))  # fmt: skip
        return
    for sentence in reasoning.verdicts(found):
        st.markdown(md(sentence))
    draw(plots.agreement_bars(reasoning.agreement(found)), "Agreement with what moves the answer",
         "Rank correlation within a trace, mean over traces with 95% intervals.")  # fmt: skip
    table(reasoning.measure_rows(found), "Measures")
    table(reasoning.agreement_rows(found), "All measures against all", "Position is the control that each must beat.")
    if found["categories"]:
        table(reasoning.category_rows(found), "Kinds of steps", "Means within a trace, then across.")
    if found["pushes"]:
        table(reasoning.push_rows(found), "Pushing a single step",
              "Change of the runner-up emotion's log-odds; doses in residual norms.")  # fmt: skip
    draw(plots.receiver_map(found["receivers"]["kurtosis"], found["receivers"]["heads"]), "Receiver heads",
         f"Excess kurtosis of how much later steps look back to each step. {sharpness(found)}")  # fmt: skip


if __name__ == "__main__":
    page("Reasoning", show)
