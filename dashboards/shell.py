"""What all pages share: the run they show, guarded reading, figures, tables, choices that live in the URL."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from dashboards import folders
from dashboards.exports import figure_csv
from dashboards.words import file_name, md
from emocircuits.errors import EmocircuitsError
from emocircuits.report import RunData

T = TypeVar("T")
DEFAULT = "runs/demo"
KEPT = 32  # results of slow work
STRIP = 380
"""Pixels for a text of forty columns: what a phone has, and what reads well."""
TOOLBAR = 34  # pixels
BELOW = {"x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}  # grows upwards, and pushes the plot
LEGEND = 24
INK = "#3A4150"
"""Words of a saved picture, which lies on paper. On the page they take the page's colour, whatever the theme."""
STYLE = "<style>.js-plotly-plot .main-svg > g:not(.hoverlayer) text { fill: currentColor !important; }</style>"
DAMAGE = (KeyError, TypeError, IndexError, ValueError, AttributeError, ArithmeticError, OSError)
"""What reading a run of another version, or an edited one, may raise."""


# ------------------------------------------------------------------------------------------------------ the run


def place() -> folders.Place:
    """The runs of this session, from the command line."""
    given = [a for a in sys.argv[1:] if not a.startswith("-")]
    return folders.find(given[0] if given else DEFAULT)


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(folder: str, stamp: tuple[Any, ...]) -> RunData:  # noqa: ARG001 (a changed folder is read again)
    return folders.open_run(Path(folder))


def opened(folder: Path) -> RunData:
    """A run's data, read again when its files have changed. Read only: sessions share it."""
    return _opened(str(folder), folders.stamp(folder))


def page(title: str, show: Callable[[RunData], None]) -> None:
    """Run a page on the chosen run; whatever the run lacks or holds wrongly becomes a sentence."""
    st.header(title, anchor=False)
    st.html(STYLE)
    st.session_state["figures"] = 0
    try:
        here = place()
        data = opened(here.root / st.session_state.get("run", here.names[0]))
        for notice in folders.notices(data):
            st.caption(md(notice))
        show(data)
    except EmocircuitsError as error:
        st.error(md(error), icon=":material/error:")
    except DAMAGE as error:
        st.error("This page cannot read what the run holds. A run of this version, made again, would show it.",
                 icon=":material/error:")  # fmt: skip
        with st.expander("What went wrong"):
            st.code("".join(traceback.format_exception(error)), language=None)


def into(command: str, folder: str | Path) -> str:
    """A command that writes a run into the folder that is shown; an absolute `folder` is taken as it is."""
    return f"{command} --out {shlex.quote(str(place().root / folder))}"


def missing(what: str, why: str, command: str) -> None:
    """The empty state: what would be here, why it is not, and the command that makes it."""
    with st.container(border=True):
        st.markdown(f"**{md(what)}**")
        st.caption(md(why))
        st.code(command, language="bash", wrap_lines=True)


def source(data: RunData, kind: str, label: str, key: str, what: str, why: str, command: str) -> Path | None:
    """The folder that holds one kind of thing: the run itself, else one beside it that is chosen.

    Where there is none, the empty state and None.
    """
    here = place()
    names = folders.of_kind(here, kind)
    if not names:
        missing(what, why, command)
        return None
    return here.root / (data.path.name if data.path.name in names else choose(label, names, key))


def lacking(data: RunData, *names: str) -> bool:
    """Show the empty state for stages that a page needs and the run lacks; True when one is missing."""
    absent = [folders.STAGES[n] for n in names if getattr(data, n) is None]
    if absent:
        missing(f"This run has not measured {' and '.join(absent)} yet", "An interrupted run goes on where it stopped.",
                folders.how_to_finish(data))  # fmt: skip
    return bool(absent)


@st.cache_resource(show_spinner=False)
def _jobs() -> tuple[ThreadPoolExecutor, dict[Any, Future[Any]]]:
    return ThreadPoolExecutor(1, "explorer"), {}


def patiently(key: Any, make: Callable[[], T], doing: str) -> T:
    """What `make` gives, made once for all tabs on a thread of its own, so that the page can be left meanwhile.

    Raises what `make` raises.
    """
    pool, jobs = _jobs()
    job = jobs[key] = jobs.get(key) or pool.submit(make)
    for old in [k for k, j in jobs.items() if j.done() and k != key][: max(0, len(jobs) - KEPT)]:
        del jobs[old]
    place, begun = st.empty(), time.monotonic()
    while not job.done():
        place.caption(f"{doing} ({time.monotonic() - begun:.0f} s); other pages work meanwhile.")
        time.sleep(0.25)
    place.empty()
    if job.exception() is not None:
        jobs.pop(key, None)  # may be tried again
    return job.result()


# ------------------------------------------------------------------------------------------------------ choices


def choose(
    label: str, options: Sequence[Any], key: str, *, default: Any = None, buttons: bool = False, **more: Any
) -> Any:
    """One of the options, kept in the URL under `key`; what the URL holds and is no option is ignored.

    buttons: for a few words of our own only, since the labels of buttons are Markdown.
    """
    names = [str(o) for o in options]
    first = str(default) if default is not None and str(default) in names else names[0]
    linked(key, first, lambda given: given if given in names else None)
    if buttons:
        found = st.segmented_control(label, names, key=key, required=True, label_visibility="collapsed", **more)
    else:
        found = st.selectbox(label, names, key=key, **more)
    return options[names.index(written(key, found if found in names else first))]


def level(label: str, low: float, high: float, value: float, key: str, step: float = 1, **more: Any) -> Any:
    """A number from a slider, kept in the URL under `key`."""

    def parsed(given: Any) -> float | None:
        try:
            found = type(value)(given)
        except (TypeError, ValueError, OverflowError):
            return None
        return found if low <= found <= high else None

    linked(key, value, parsed)
    return written(key, st.slider(label, low, high, step=step, key=key, **more))


def step(label: str, options: Sequence[str], key: str) -> int:
    """The place of one of the options on a slider, kept in the URL under `key`; the first when the URL holds none."""
    linked(key, options[0], lambda given: given if given in options else None)
    return options.index(written(key, st.select_slider(label, options, key=key)))


def linked(key: str, value: Any, parsed: Callable[[Any], Any]) -> None:
    """Before a widget is drawn: its state from a link (or the browser's back button), else what was chosen, else value.

    Streamlit's own binding leaves defaults out of the address, and ours depend on the run. parsed: None for no value.
    """
    last, given = st.session_state.setdefault("written", {}), st.query_params.get(key)
    sources = [st.session_state.get(key), last.get(key)]
    if given is not None and given != str(last.get(key)):  # somebody else wrote the address
        sources.insert(0, given)
    st.session_state[key] = next((v for s in sources if s is not None and (v := parsed(s)) is not None), value)


def written(key: str, value: T) -> T:
    """After a widget was drawn: its value goes into the address, defaults as well."""
    st.session_state["written"][key] = value
    if st.query_params.get(key) != str(value):
        st.query_params[key] = str(value)
    return value


# ------------------------------------------------------------------------------------------------------ showing


def cells(things: Sequence[T], n: int) -> Iterator[tuple[T, Any]]:
    """Each thing and its place, n to a row; a phone stacks them in their order."""
    for start in range(0, len(things), n):
        yield from zip(things[start : start + n], st.columns(n))


def draw(
    fig: go.Figure,
    label: str,
    caption: str = "",
    *,
    key: str | None = None,
    on_click: Callable[[], None] | None = None,
    width: Any = "stretch",
) -> None:
    """A figure with its name; the toolbar saves the picture, a button the numbers.

    Words in `label` and `caption` are plain text. on_click is called when a point was clicked; the event is in the
    session state under `key`. width: pixels at most.
    """
    fig.update_layout(font_color=INK)
    traces: Any = fig.data
    top, grow = fig.layout.margin.t or 0, 0
    if len(traces) > 1 and fig.layout.showlegend is not False:  # on a phone it takes lines: away from the toolbar
        fig.update_layout(legend=BELOW)
        grow = LEGEND
    fig.update_layout(margin_t=max(top, TOOLBAR), height=(fig.layout.height or 360) + grow + max(0, TOOLBAR - top))
    for kind in ("bar", "heatmap"):  # plotly would pick pale words for dark cells; the page's colour reads on all
        fig.update_traces(textfont_color=INK, selector={"type": kind})
    select: dict[str, Any] = {}
    if on_click is not None:
        fig.update_xaxes(fixedrange=True).update_yaxes(fixedrange=True)  # a touch scrolls the page, not the figure
        select = {"on_select": on_click, "selection_mode": "points"}
    st.plotly_chart(fig, theme=None, key=key, alt=label, width=width, config=toolbar(label), **select)
    with st.container(horizontal=True):
        st.caption(f"**{md(label)}**" + (f". {md(caption)}" if caption else ""))
        st.session_state["figures"] = place = st.session_state.get("figures", 0) + 1
        st.download_button(
            "CSV", lambda: figure_csv(fig), f"{file_name(label)}.csv", "text/csv", key=f"csv-{place}", type="tertiary",
            on_click="ignore", help="The figure's numbers", icon=":material/download:",
        )  # fmt: skip


def toolbar(label: str) -> dict[str, Any]:
    """Plotly's settings: no logo, and pictures named after the figure, as SVG or PNG."""
    picture = "png" if st.session_state.get("pictures") == "PNG" else "svg"
    away = ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"]
    return {
        "displaylogo": False,
        "modeBarButtonsToRemove": away,
        "toImageButtonOptions": {
            "format": picture,
            "filename": file_name(label),
            "scale": 1 if picture == "svg" else 3,
        },
    }


def table(rows: Sequence[Mapping[str, Any]], label: str, caption: str = "", **more: Any) -> None:
    """Rows as a table that can be searched, sorted and saved as CSV from its toolbar; cells are text, never markup."""
    st.markdown(f"**{md(label)}**")
    if caption:
        st.caption(md(caption))
    st.dataframe(pd.DataFrame(list(rows)), hide_index=True, alt=label, **more)
