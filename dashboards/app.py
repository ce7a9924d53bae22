"""The entry point that Streamlit runs: which run, which page."""

from __future__ import annotations

import streamlit as st

from dashboards.shell import DEFAULT, choose, missing, place
from dashboards.words import md
from emocircuits.errors import InputError

PAGES = {
    "This run": (
        ("overview", "Overview", "insights"),
        ("directions", "Directions", "explore"),
        ("circuits", "Circuits", "hub"),
        ("steer", "Steer", "tune"),
    ),
    "Further": (
        ("modality", "Modality", "graphic_eq"),
        ("reasoning", "Reasoning", "account_tree"),
        ("features", "Features", "grain"),
    ),
    "Runs": (
        ("compare", "Compare", "compare_arrows"),
        ("about", "About this run", "info"),
    ),
}

# Drawn here: the browser would fetch any of Streamlit's own icons from another machine.
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><g stroke="#6B4FD8" stroke-width="3" fill="#6B4FD8">'
    '<path d="M16 16 7 7M16 16 26 9M16 16 12 27" fill="none"/><circle cx="16" cy="16" r="5"/>'
    '<circle cx="7" cy="7" r="3"/><circle cx="26" cy="9" r="3"/><circle cx="12" cy="27" r="3"/></g></svg>'
)


def main() -> None:
    """Choose the run in the sidebar (or the URL), then run the page."""
    st.set_page_config(page_icon=ICON, layout="wide")
    pages = {
        section: [
            st.Page(f"views/{name}.py", title=title, icon=f":material/{icon}:", default=name == "overview")
            for name, title, icon in found
        ]
        for section, found in PAGES.items()
    }
    chosen = st.navigation(pages)
    try:
        here = place()
    except (InputError, OSError) as error:
        st.header("No run to show", anchor=False)
        st.error(md(error), icon=":material/error:")
        missing("Make a run", "A quarter of an hour on two cores with the demo model; --small is a quick look.",
                f"emocircuits demo --out {DEFAULT}\nemocircuits explore {DEFAULT}")  # fmt: skip
        return
    with st.sidebar:
        choose("Run", here.names, "run", help="Runs in the same folder.")
        choose("Pictures are saved as", ("SVG", "PNG"), "pictures", help="By the camera above each figure.")
    chosen.run()


if __name__ == "__main__":
    main()
