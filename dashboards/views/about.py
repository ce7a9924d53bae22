"""Where the numbers come from: settings, versions, stages, files, and the command that makes them again."""

from __future__ import annotations

import streamlit as st

from dashboards import folders, records
from dashboards.shell import page, table
from dashboards.words import md
from emocircuits.report import RunData

LIMITS = (
    "Expression is read by an automatic judge, which is no human reader; its own error is in the Overview.",
    "Intervals treat scenarios as the unit; they do not cover the choice of model, of prompts or of judge.",
    "Layers and strengths were tuned per emotion; prompting by choosing among a few wordings.",
    "A direction that reads and steers an emotion is no evidence that the model feels anything.",
)


def show(data: RunData) -> None:
    """The manifest in tables, and a check of the files against it."""
    st.caption(md(data.path))
    st.markdown("**Make it again**")
    st.code(folders.how_to_finish(data), language="bash", wrap_lines=True)
    st.caption("The same command resumes an interrupted run, and reads a whole one.")
    left, right = st.columns(2)
    with left:
        table(records.setting_rows(data.manifest), "Settings")
    with right:
        table(records.version_rows(data.manifest), "Versions")
    stages = records.stage_rows(data.manifest)
    table(stages, f"{len(stages)} stages, {records.minutes(data.manifest):.1f} minutes in total")
    _check(data)
    st.markdown("**Limits**\n\n" + "\n".join(f"- {line}" for line in LIMITS))


def _check(data: RunData) -> None:
    if not st.button("Check the files", icon=":material/verified:", help="Compares every file with its checksum."):
        return
    bar, rows = st.progress(0.0, "Reading files"), []
    names = records.files(data.manifest)
    for i, (name, digest) in enumerate(names.items()):
        rows.append({"file": name, "state": records.state(data.path, name, digest)})
        bar.progress((i + 1) / len(names), md(name))
    bar.empty()
    bad = [row for row in rows if row["state"] != "as written"]
    if not rows:
        st.info("The manifest lists no files with checksums.")
    elif bad:
        table(bad, f"{len(bad)} of {len(rows)} files are not as they were written")
    else:
        st.success(f"All {len(rows)} files are as they were written.")


if __name__ == "__main__":
    page("About this run", show)
