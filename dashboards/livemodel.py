"""The run's model: loaded once for all tabs, used by one tab at a time, and what the run saved to use with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st

from dashboards.folders import circuit_folder, inside, model_name
from dashboards.words import md
from emocircuits.errors import EmocircuitsError
from emocircuits.report import RunData

T = TypeVar("T")
DIRECTIONS = "directions_response_mean.safetensors"
REMEMBERED = 24
EXAMPLE = "They lied to me again, right to my face. Then my sister called: the test was clear, she is well!"


@dataclass(frozen=True, eq=False)
class Live:
    """A loaded model and the lock of whoever uses it: edits act on every pass, so passes must not interleave."""

    loaded: Any
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def alone(self, waiting: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """Hold the model for a block; `waiting` is called again and again while another tab has it."""
        while not self.lock.acquire(timeout=0.2):
            waiting()  # may raise, when the reader closes the tab or presses something else
        try:
            yield self.loaded
        finally:
            self.lock.release()


@st.cache_resource(max_entries=1, show_spinner=False)
def _load(name: str) -> Live:
    from emocircuits.models import load

    return Live(load(name))


def with_model(
    data: RunData, work: Callable[[Any], T], doing: str, made_for: Mapping[str, Any] | None = None
) -> T | None:
    """`work(loaded)` alone on the run's model, under a spinner; None, and a sentence, where that is not possible.

    made_for: the fingerprint of what is used with it; other weights give a caption, another model an error.
    """
    place = st.empty()
    try:
        with place, st.spinner("Loading the model, once for all pages"):
            live = _load(model_name(data))
        with place, st.spinner(doing), live.alone(lambda: _wait(place)) as loaded:
            warning = _fit(made_for, loaded)
            found = work(loaded)
    except (EmocircuitsError, OSError, RuntimeError, MemoryError) as error:
        place.warning(md(f"{error}"), icon=":material/memory:")
        st.caption("Everything that needs no model still works.")
        return None
    place.empty()
    if warning:
        st.caption(md(f"Mind: {warning}."))
    return found


def _wait(place: Any) -> None:
    place.caption("Another tab is using the model; this one is next.")


def _fit(made_for: Mapping[str, Any] | None, loaded: Any) -> str | None:
    from emocircuits.models import check_fits
    from emocircuits.models.anatomy import unwrap

    return check_fits(made_for, unwrap(loaded.model)) if made_for else None


def remembered(key: tuple[Any, ...], asked: bool, make: Callable[[], T | None]) -> T | None:
    """What `make` gave for this key in this session; made when `asked`, else None when it never was."""
    known: dict[tuple[Any, ...], Any] = st.session_state.setdefault("remembered", {})
    if asked and key not in known and (made := make()) is not None:
        known[key] = made
        while len(known) > REMEMBERED:
            known.pop(next(iter(known)))
    return known.get(key)


# ------------------------------------------------------------------------------------------- what the run saved


@st.cache_resource(max_entries=32, show_spinner=False)
def _artefact(_load: Callable[[Path], Any], kind: str, path: str, changed: int) -> Any:  # noqa: ARG001
    return _load(Path(path))


def artefact(load: Callable[[Path], T], path: Path) -> T | None:
    """A saved artefact, read once and again when the file changes; None where there is no such file."""
    return _artefact(load, load.__qualname__, str(path), path.stat().st_mtime_ns) if path.is_file() else None


def directions(data: RunData) -> Any:
    """The run's DirectionSet that steers, or None."""
    from emocircuits.directions import DirectionSet

    return artefact(DirectionSet.load, data.path / DIRECTIONS)


def readings(data: RunData, held_out: bool) -> Any:
    """The run's Features of replies, training or held out, or None."""
    from emocircuits.demo import load_features

    name = "heldout" if held_out else "train"
    return artefact(load_features, data.path / "features" / f"replies_{name}.safetensors")


def circuit(data: RunData, emotion: str) -> Any:
    """The run's Circuit of one emotion, or None."""
    from emocircuits.circuits.assemble import Circuit

    file = inside(circuit_folder(data), f"{emotion}.safetensors")
    return artefact(Circuit.load, file) if file else None


def units(data: RunData) -> Any:
    """The run's Units (means and exact effects of all heads and neurons), or None."""
    from emocircuits.circuits.units import Units

    return artefact(Units.load, circuit_folder(data) / "units.safetensors")
