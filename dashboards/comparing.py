"""Two runs side by side, as rows of text. No Streamlit in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dashboards.findings import figures
from dashboards.words import plain, rate
from emocircuits import _report_sections as sections
from emocircuits._report_html import facts
from emocircuits.report import RunData

Row = dict[str, str]


def key_rows(a: RunData, b: RunData, names: tuple[str, str]) -> list[Row]:
    """The key figures of both runs."""
    found = [{name: f"{value} {interval}".strip() for name, value, interval in figures(run)} for run in (a, b)]
    measures = dict.fromkeys([*found[0], *found[1]])
    return [{"measure": m, **{n: f.get(m, "not measured") for n, f in zip(names, found)}} for m in measures]


def emotion_rows(a: RunData, b: RunData, names: tuple[str, str]) -> list[Row]:
    """Coherent expression under steering, by emotion."""
    by = [(run.methods.get("steered") or {}).get("by_emotion") or {} for run in (a, b)]
    emotions = dict.fromkeys([*by[0], *by[1]])
    return [{"emotion": e, **{n: rate((f.get(e) or {}).get("coherent")) for n, f in zip(names, by)}} for e in emotions]


def steered(a: RunData, b: RunData, names: tuple[str, str]) -> dict[str, Any]:
    """Both runs' steered scores under the runs' names, in the form of `plots.expression_bars`."""
    return {n: run.methods["steered"] for n, run in zip(names, (a, b)) if "steered" in run.methods}


def layer_tests(a: RunData, b: RunData, names: tuple[str, str]) -> tuple[dict[str, Any], list[int]] | None:
    """Both runs' held-out accuracy as one set of `plots.quality_by_layer`, and its layers; None without any."""
    tests, layers = [], []
    for name, run in zip(names, (a, b)):
        test = sections.held_out_test(((run.quality or {}).get("sets") or [{}])[0])
        if test:
            tests.append({"name": name, "rows": test["rows"]})
            layers += (run.quality or {}).get("layers") or []
    return ({"tests": tests}, sorted(set(layers))) if tests else None


def different_settings(a: RunData, b: RunData, names: tuple[str, str]) -> list[Row]:
    """Settings and versions that differ."""
    flat = [{plain(k): plain(v) for k, v in facts(_settings(run.manifest))} for run in (a, b)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return [
        {"setting": k, **{n: f.get(k, "not set") for n, f in zip(names, flat)}}
        for k in keys
        if flat[0].get(k) != flat[1].get(k)
    ]


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found = {"emocircuits": manifest.get("package_version"), "python": manifest.get("python")}
    return {**(manifest.get("settings") or {}), **found, **(manifest.get("versions") or {})}
