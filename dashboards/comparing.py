"""Two runs side by side, as rows of text. No Streamlit in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dashboards import features, folders, modality, reasoning, units
from dashboards.findings import figures
from dashboards.words import num, plain, rate
from emocircuits import _report_sections as sections
from emocircuits._report_html import facts
from emocircuits.report import RunData

Row = dict[str, str]


def key_rows(a: RunData, b: RunData, names: tuple[str, str]) -> list[Row]:
    """The key figures of two folders of one kind; raises InputError for a damaged file."""
    found = [key_figures(run) for run in (a, b)]
    measures = dict.fromkeys([*found[0], *found[1]])
    return [{"measure": m, **{n: f.get(m, "not measured") for n, f in zip(names, found)}} for m in measures]


def key_figures(data: RunData) -> dict[str, str]:
    """{measure: its value with its interval} of what a folder is about."""
    studies: dict[str, Callable[[Path], dict[str, str]]] = {
        "features": features.figures, "reasoning": reasoning.figures, "modality": modality.figures,
    }  # fmt: skip
    of = studies.get(folders.kind(data.path))
    if of is not None:
        return of(data.path)
    found = {name: f"{value} {interval}".strip() for name, value, interval in figures(data)}
    circuits = data.circuits or {}
    parts = (("evaluation", "methods"), ("circuits", "stability"))
    methods, stable = ((circuits.get(stage) or {}).get(part) or {} for stage, part in parts)
    found |= {f"Coherent, {m}": rate(methods[m].get("coherent")) for m in ("circuit", "random units") if m in methods}
    for kind in ("heads", "neurons"):  # of circuits that two halves of the themes give by themselves, beyond chance
        found |= {f"Stability, {kind}": num(stable[kind])} if stable.get(kind) is not None else {}
    return found


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


def circuit_rows(pairs: Mapping[str, tuple[Any, Any]], size: units.Extent, names: tuple[str, str]) -> list[Row]:
    """How much of each emotion's circuit two runs share; models of other configurations share no units.

    pairs: {emotion: the Circuit that each run saved, or None}; size: of the model.
    """
    from emocircuits.circuits.assemble import KINDS, overlap

    rows = []
    for emotion, (a, b) in pairs.items():
        if not a or not b or (a.fingerprint or {}).get("config_sha256") != (b.fingerprint or {}).get("config_sha256"):
            continue
        for kind, width in zip(KINDS, (size.heads, size.neurons)):
            if size.layers is None or width is None:
                continue
            found = overlap(a, b, kind, size.layers * width)
            both = len({*a.units(kind)} & {*b.units(kind)})
            rows.append({
                "emotion": emotion, "units": kind, **{n: str(len(c.units(kind))) for n, c in zip(names, (a, b))},
                "both": str(both), "Jaccard": num(found["jaccard"]), "by chance": num(found["chance"], ".3f"),
                "excess": num(found["excess"]),
            })  # fmt: skip
    return rows
