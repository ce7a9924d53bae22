"""What was found, how sure it is, what it costs, and the texts themselves."""

from __future__ import annotations

import streamlit as st

from dashboards import findings, folders
from dashboards.shell import cells, choose, draw, lacking, page, table
from dashboards.words import md, plain
from emocircuits import plots
from emocircuits.report import RunData, headline

DOSES = {
    "coherent": "Coherent expression", "perplexity": "Median perplexity",
    "expression": "Expression, coherent or not", "degenerate": "Degenerate texts",
}  # fmt: skip
ELSEWHERE = {"modality": "modalities", "reasoning": "reasoning traces", "features": "a sparse autoencoder"}
VIEWS = ("Result", "Cost", "Texts", "Judge")


def show(data: RunData) -> None:
    """The headline and key figures, then one view."""
    if (kind := folders.kind(data.path)) in ELSEWHERE:
        st.info(f"This folder is about {ELSEWHERE[kind]}.")
        st.page_link(f"views/{kind}.py", label="Open its page", icon=":material/arrow_forward:")
        return
    st.subheader(md(data.model), anchor=False)
    for sentence in headline(data):
        st.markdown(md(plain(sentence)))
    found = findings.figures(data)
    if found:
        with st.container(horizontal=True):
            for name, value, interval in found:
                st.metric(md(name), value, interval, delta_color="off", delta_arrow="off", border=True, width=165)
    view = choose("View", VIEWS, "view", buttons=True)
    {"Result": _result, "Cost": _cost, "Texts": _texts, "Judge": _judge}[view](data)


def _result(data: RunData) -> None:
    if lacking(data, "evaluation"):
        return
    draw(
        plots.expression_bars(data.methods, data.emotions), "Coherent expression by emotion and method",
        "Share of held-out scenarios whose text the judge reads as the wanted emotion, without naming it and without "
        "falling apart; 95% intervals from resampling scenarios.",
    )  # fmt: skip
    table(findings.target_rows(data), "Targets", "Fixed in advance, the same for every run.")
    table(findings.emotion_rows(data), "Steering by emotion", "The last two columns are the setting that was chosen.")
    table(findings.method_rows(data.methods), "Methods compared", "Rates with 95% intervals.")
    table(
        findings.comparison_rows((data.evaluation or {}).get("comparisons") or []), "Paired differences",
        "In percentage points of coherent expression; p is two-sided, from flipping the sign of whole scenarios.",
    )  # fmt: skip


def _cost(data: RunData) -> None:
    if lacking(data, "dose"):
        return
    tuning, rows = data.tuning or {}, (data.dose or {}).get("rows") or []
    draw(
        plots.pareto(
            tuning.get("candidates") or [], rows, tuning.get("chosen") or {},
            findings.median_perplexity(data, "unsteered"),
        ),
        "What expression costs", "One point per setting of one emotion; left and up is better.",
    )  # fmt: skip
    for (measure, label), place in cells(list(DOSES.items()), 2):
        with place:
            draw(plots.dose_response(rows, measure), f"{label} against strength",
                 "Left of 0 the direction is subtracted; 1 is the chosen strength.")  # fmt: skip


def _texts(data: RunData) -> None:
    if lacking(data, "texts"):
        return
    rows = data.texts or []
    emotion = choose("Emotion", data.emotions, "emotion")
    known = findings.scenarios(rows)
    scenario = choose("Scenario", list(known), "scenario", format_func=lambda key: " ".join(known[key].split())[:90])
    st.caption("The prompt, then what each method wrote.")
    st.text(known[scenario])
    for row in findings.side_by_side(rows, scenario, emotion):
        with st.container(border=True):
            st.markdown(f"**{md(row['method'])}**")
            st.text(row.get("text", ""))
            st.caption(md(findings.verdict(row)))


def _judge(data: RunData) -> None:
    if lacking(data, "evaluation"):
        return
    found = (data.evaluation or {}).get("judge") or {}
    if not found:
        st.caption("The judge's own reliability was not recorded.")
        return
    held_out = found.get("held_out_replies") or {}
    names = dict.fromkeys([*(found.get("recall") or {}), *(held_out.get("recall") or {})])
    st.markdown(
        f"The judge is **{md(found.get('name', 'unnamed'))}**, a forced choice among the emotions and neutral that is "
        f"not told the target. On held-out replies of known emotion its accuracy is "
        f"{md(findings.rate(held_out.get('accuracy')))}. Where its recall is low, rates of that emotion are too low."
    )
    table(
        [{"emotion": e, "recall, its own corpus": findings.num((found.get("recall") or {}).get(e), ".0%"),
          "recall, held-out replies": findings.num((held_out.get("recall") or {}).get(e), ".0%")} for e in names],
        "Reliability of the judge",
    )  # fmt: skip
    confused = {m: s["confusion"] for m, s in data.methods.items() if (s.get("confusion") or {}).get("counts")}
    for (name, counts), place in cells(list(confused.items()), 2):
        with place:
            draw(plots.confusion_map(counts), f"Confusions, {name}",
                 "Rows are the wanted emotion, columns what the judge read; numbers are texts.")  # fmt: skip


if __name__ == "__main__":
    page("Overview", show)
