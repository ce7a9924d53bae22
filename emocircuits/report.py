"""One self-contained HTML page from a run folder: what was found, how sure it is, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from emocircuits import _report_circuits, _report_texts
from emocircuits import _report_sections as sections
from emocircuits._report_findings import Target, header, headline, targets, targets_table
from emocircuits._report_html import Page, esc, fact_list, note, num, pct, table
from emocircuits._report_run import RunData, read_run
from emocircuits.artefact import write_text_atomic
from emocircuits.plots import number

__all__ = ["RunData", "Target", "headline", "read_run", "render", "targets", "write_report"]

FILE_NAME = "report.html"


def write_report(run_path: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path; a partial run gives a partial report.

    The page loads nothing: plotly.js is inside it. Raises InputError for a folder that is no run, a damaged
    file, or a disk that refuses.
    """
    data = read_run(run_path)
    return write_text_atomic(data.path / FILE_NAME, render(data))


def render(data: RunData) -> str:
    """The report as one HTML document."""
    page = Page(f"Emotion in {data.model}: directions and steering")
    absent: dict[str, list[str]] = {}
    for anchor, title, needs, build in _SECTIONS:
        missing = [name for name in needs if getattr(data, name) is None]
        for name in missing:
            absent.setdefault(name, []).append(title)
        if not missing:
            page.add(anchor, title, build(page, data))
    if absent:
        page.add("missing", "Not in this run yet", _missing(data, absent))
    return page.render(header(page.title, data))


def _missing(data: RunData, absent: Mapping[str, list[str]]) -> str:
    """What a partial run lacks: the file, the sections that need it, and the command that makes it."""
    files = {"texts": "texts.jsonl", "circuits": "circuits/"}
    rows = [[files.get(name, f"{name}.json"), esc("; ".join(s))] for name, s in absent.items()]
    command = f"<code>emocircuits demo --out {esc(data.path.name)}</code>"
    words = f"<p>These files are missing, and so are the sections that show them. {command} makes what is missing.</p>"
    return words + table("", ["file", "sections"], rows, wide=False)


# --------------------------------------------------------------------------------------------------- sections


def _texts(page: Page, data: RunData) -> str:
    texts = _report_texts.Texts(data.texts or [], data.emotions)
    page.data["texts"] = _report_texts.browser_data(texts)
    return _report_texts.section(texts)


def _thresholds(_page: Page, data: RunData) -> str:
    found = (data.evaluation or {}).get("thresholds")
    words = (
        "<p>A text counts as <em>coherent expression</em> when the judge's forced choice is the wanted emotion, "
        "the text does not name that emotion or an inflection of it, and it is not degenerate.</p>"
    )
    return words + (fact_list(found) if found else note("No thresholds were recorded."))


def _reproduce(_page: Page, data: RunData) -> str:
    manifest = data.manifest
    stages = manifest.get("stages") or {}
    rows = [
        [
            esc(name),
            num(stage.get("seconds"), ".1f", "not recorded"),
            esc(", ".join(map(str, stage.get("files") or []))),
        ]
        for name, stage in stages.items()
    ]
    total = sum(number(stage.get("seconds")) or 0.0 for stage in stages.values())
    command = f"<p><code>emocircuits demo --out {esc(data.path.name)}</code> with the settings below.</p>"
    versions = {"python": manifest.get("python"), **(manifest.get("versions") or {})}
    times = table(f"Stages, {total / 60:.1f} minutes in total.", ["stage", "seconds", "files"], rows, wide=False)
    return (
        command
        + f"<h3>Settings</h3>{fact_list(manifest.get('settings') or {})}"
        + f"<h3>Versions</h3>{fact_list(versions)}"
        + (times if rows else note("No stage has finished."))
    )


def _limits(_page: Page, data: RunData) -> str:
    coherent = (data.methods.get("steered") or {}).get("coherent") or {}
    size = number(coherent.get("n_clusters"))
    judge = number(
        (((data.evaluation or {}).get("judge") or {}).get("held_out_replies") or {}).get("accuracy", {}).get("estimate")
    )
    wrong = "" if judge is None else f" and is wrong on {pct(1 - judge)} of held-out replies"
    number_of = "the scenarios of this run" if size is None else f"{size:.0f} scenarios"
    items = [
        f"One model ({esc(data.model)}) and short English texts; other models, languages and lengths may differ.",
        f"Expression is read by an automatic judge, which is no human reader{wrong}.",
        f"Intervals treat scenarios as the unit and rest on {number_of}; they do not cover the choice of "
        "model, of prompts or of judge.",
        "Layers and strengths were tuned per emotion, prompting by choosing among a few wordings: its rate is a "
        "baseline and not the best that prompting can do.",
        "A direction that reads and steers an emotion is no evidence that the model feels anything.",
    ]
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _evaluated(build: Callable[..., str], *, emotions: bool = False) -> Callable[[Page, RunData], str]:
    """A section from evaluation.json, or a note when it holds no methods."""

    def section(page: Page, data: RunData) -> str:
        if not data.methods:
            return note("evaluation.json holds no methods.")
        return build(page, data.evaluation, data.emotions) if emotions else build(page, data.evaluation)

    return section


_SECTIONS: tuple[tuple[str, str, tuple[str, ...], Callable[[Page, RunData], str]], ...] = (
    ("result", "Main result", ("evaluation",), _evaluated(sections.main_figure, emotions=True)),
    ("targets", "Targets", (), lambda _, d: targets_table(d)),
    ("methods", "Methods compared", ("evaluation",), _evaluated(lambda _, e: sections.methods(e))),
    (
        "emotions",
        "Per emotion",
        ("evaluation",),
        _evaluated(lambda _, e, names: sections.per_emotion(e, names), emotions=True),
    ),
    ("confusion", "Confusions", ("evaluation",), _evaluated(sections.confusions)),
    (
        "cost",
        "Expression and cost",
        ("tuning",),
        lambda p, d: sections.cost(p, d.tuning, d.dose, d.evaluation),
    ),
    ("dose", "Dose and response", ("dose",), lambda p, d: sections.dose_response(p, d.dose or {})),
    ("tuning", "Choice of layers and strength", ("tuning",), lambda p, d: sections.tuning(p, d.tuning or {})),
    (
        "directions",
        "Quality of the directions",
        ("quality",),
        lambda p, d: sections.directions(p, d.quality or {}),
    ),
    ("confounds", "Confounds", ("quality",), lambda _, d: sections.confounds(d.quality or {})),
    (
        "geometry",
        "Geometry",
        ("quality", "embedding"),
        lambda p, d: sections.geometry(p, d.quality, d.embedding),
    ),
    ("circuits", "Circuits", ("circuits",), lambda p, d: _report_circuits.section(p, d.circuits or {})),
    ("texts", "Texts side by side", ("texts",), _texts),
    ("judge", "Reliability of the judge", ("evaluation",), lambda _, d: sections.judge(d.evaluation or {})),
    ("scoring", "How texts are scored", ("evaluation",), _thresholds),
    ("reproduce", "How to reproduce", (), _reproduce),
    ("limits", "Limits", (), _limits),
)
