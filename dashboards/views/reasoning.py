"""Which steps of a reasoning trace its answer hangs on; shows what `emocircuits anchors` wrote."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboards import reasoning
from dashboards.shell import STRIP, choose, draw, level, missing, page, source, table
from dashboards.words import md, num
from emocircuits import live_plots
from emocircuits.artefact import read_json
from emocircuits.reasoning import plots
from emocircuits.report import RunData

COMMAND = "emocircuits anchors --model demo --problems 12 --out runs/anchors"
INK = "#6B4FD8"


def show(data: RunData) -> None:
    """A run of anchors: this one, else one beside it; one trace of it, or all together."""
    folder = source(
        data, "reasoning", "Reasoning run", "anchors", "No run of reasoning traces in this folder",
        "Thought anchors say which steps of a trace its answer hangs on.", COMMAND,
    )  # fmt: skip
    if folder is None:
        return
    if choose("View", ("One trace", "All traces"), "view", buttons=True) == "One trace":
        _one(folder)
    else:
        _all(folder)


def _one(folder: Path) -> None:
    files = reasoning.traces(folder)
    if not files:
        missing("This run has measured no trace yet", "An interrupted run goes on where it stopped.", COMMAND)
        return
    name = choose("Trace", list(files), "trace")
    trace = read_json(files[name])
    steps, kinds = trace["steps"], reasoning.importances(trace)
    kind = choose("Importance", list(kinds), "importance")
    rows, n = kinds[kind], len(steps)
    step = int(level("Step", 0, max(1, n - 1), 0, "step")) if n > 1 else 0
    start, stop = reasoning.window(n, step)
    if stop - start < n:
        st.caption(f"Steps {start} to {stop - 1} of {n}, around the chosen one.")
    left, right = st.columns([2, 3])
    with left:
        pieces, values = reasoning.words(steps[start:stop], [r["value"] for r in rows[start:stop]], start)
        strip = live_plots.token_strip(pieces, values, INK)
        draw(strip, "The reasoning", "Darker steps move the answer more.", width=STRIP)
    with right:
        draw(
            plots.importance_along(steps, rows), f"Importance, {kind}",
            "Bars are filled where they pass the null at 5 %; dashes are what two samples of the same size differ by.",
        )  # fmt: skip
        shares = (trace.get("sampled") or trace["forced"])["shares"]
        answers = plots.answers_along(shares, trace["truth"], asked=not trace.get("sampled"))
        draw(answers, "Answers along the trace", "The right one is drawn thick.")
    st.subheader(f"Step {step}", anchor=False)
    st.markdown(md(steps[step]))
    table(reasoning.step_row(trace, step), "What is known about it")
    if found := reasoning.rollouts(folder, name, step):
        table(found, "What the model said in its place", "Rollouts from just before the step.")
    _inside(trace, start, stop)


def _inside(trace: reasoning.Found, start: int, stop: int) -> None:
    kl, steps = reasoning.part(trace["suppression"]["kl"], start, stop), trace["steps"][start:stop]
    draw(plots.step_graph(kl, steps, trace["labels"][start:stop]), "What each step needs of earlier ones",
         "Arcs: how much later tokens change when the earlier step is hidden from attention (KL).")  # fmt: skip
    with st.expander("The whole matrix, and what steps carry"):
        draw(plots.effect_matrix(kl, steps), "Effect of hiding a step (across) on later ones (down)",
             f"Mean KL of the tokens, nats; computing noise {num(trace['suppression']['noise'], '.1e')}.")  # fmt: skip
        if emotion := trace.get("emotion"):
            carried = {e: [row[i] for row in emotion["carried"][start:stop]] for i, e in enumerate(emotion["emotions"])}
            draw(plots.step_lines(steps, carried, "residual norms"), f"Emotion at layer {emotion['layer']}",
                 "Mean over the step's tokens, what all emotions share taken out.")  # fmt: skip


def _all(folder: Path) -> None:
    found = reasoning.read(folder)
    for sentence in reasoning.verdicts(found):
        st.markdown(md(sentence))
    main = [{**r, "name": f"{r['a']} ~ {r['b']}"} for r in found["correlations"] if r["a"] in ("forced", "resampling")]
    draw(plots.agreement_bars(main), "Agreement with what moves the answer",
         "Rank correlation within a trace, mean over traces with 95% intervals.")  # fmt: skip
    table([{"measure": n, "what": w} for n, w in found["measures"].items()], "Measures")
    table(reasoning.agreement_rows(found), "All measures against all", "Position is the control that each must beat.")
    if found["categories"]:
        table(reasoning.category_rows(found), "Kinds of steps", "Means within a trace, then across.")
    if found["pushes"]:
        table(reasoning.push_rows(found), "Pushing a single step",
              "Change of the runner-up emotion's log-odds; doses in residual norms.")  # fmt: skip
    heads = [(layer, head) for layer, head in found["receivers"]["heads"]]
    draw(plots.receiver_map(found["receivers"]["kurtosis"], heads), "Receiver heads",
         "Excess kurtosis of how much later steps look back to each step; ringed heads are the sharpest.")  # fmt: skip


if __name__ == "__main__":
    page("Reasoning", show)
