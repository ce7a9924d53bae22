"""What a modality folder holds, as rows of text and of figures. No Streamlit in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dashboards.folders import BALANCE, REALLOCATION, TESTBED, inside
from dashboards.words import num, plain, rate
from emocircuits.artefact import read_json

Row = dict[str, Any]
STEP = "strength, from the weakest"
SCORES = {
    "audio": "accuracy, voice alone", "image": "accuracy, face alone", "consistent": "accuracy, voice and face agree",
    "as voice": "conflict: answered with the voice's emotion", "as face": "conflict: answered with the face's emotion",
    "gap": "conflict: preference gap",
}  # fmt: skip


def read(folder: Path) -> tuple[str, Mapping[str, Any] | None]:
    """("balance" or "testbed", its content; None where not all was measured); raises InputError for a damaged file."""
    if (folder / TESTBED).is_file() and not (folder / BALANCE).is_file():
        return "testbed", read_json(folder / TESTBED)
    return "balance", read_json(folder / BALANCE) if (folder / BALANCE).is_file() else None


def figures(folder: Path) -> dict[str, str]:
    """{measure: value} of what a folder found, to stand beside another one."""
    kind, found = read(folder)
    if found is None:
        return {}
    if kind == "testbed":
        return {row["measure"]: row["value"] for row in score_rows(found)}
    said = {"prompts": str(found["n_rows"]), "answered from the text alone": rate(found["text_reliance"])}
    for mode, by in found["effects"].items():
        said |= {f"log-odds that {name} gives, {mode}": rate(value, ".2f") for name, value in by.items()}
    return said


# ------------------------------------------------------------------------------------------------ balance


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """Whether one modality drives the answers more, as the report says it."""
    from emocircuits.multimodal.study import sentences

    return [plain(sentence) for sentence in sentences(found)]


def changed_rows(found: Mapping[str, Any]) -> list[Row]:
    """How often the answer changes without a modality."""
    return [
        {"taken out by": mode, **{n: rate(cells[n]) for n in found["modalities"]}}
        for mode, cells in found["changed"].items()
    ]


def agreement_rows(found: Mapping[str, Any]) -> list[Row]:
    """Correlations between the measures."""
    return [{"measures": k, "Spearman": v} for k, v in found["agreement"].items()]


# ------------------------------------------------------------------------------------------------ the test bed


def score_rows(found: Mapping[str, Any]) -> list[Row]:
    """Held-out scores of the test bed's model."""
    return [{"measure": words, "value": rate(found["scores"].get(k), ".2f")} for k, words in SCORES.items()]


def curve_rows(found: Mapping[str, Any]) -> list[Row]:
    """The validation sweep in the form of `multimodal.plots.gap_curve`; its gaps have no intervals."""
    sweep = (found.get("reallocation") or {}).get("sweep") or []
    steps: dict[str, int] = {}
    rows = []
    for r in sweep:
        steps[r["way"]] = steps.get(r["way"], 0) + 1
        gap = {"estimate": r["gap"]}
        rows.append({"policy": r["way"], STEP: steps[r["way"]], "strength": r["strength"], "gap": gap})
    return rows


def held_out(found: Mapping[str, Any]) -> list[Row]:
    """Each policy at its chosen strength, in the form of `multimodal.plots.gap_against_accuracy`."""
    rows = (found.get("reallocation") or {}).get("held_out") or []
    return [{"policy": r["way"], **{k: r[k] for k in ("strength", "gap", "consistent")}} for r in rows]


def policy_rows(found: Mapping[str, Any]) -> list[Row]:
    """The same as text, beside random spans."""
    rows = (found.get("reallocation") or {}).get("held_out") or []
    return [
        {"policy": r["way"], "strength": num(r["strength"], ".3g"), "gap": rate(r["gap"], ".2f"),
         "consistent clips": rate(r["consistent"], ".2f"), "gap, random spans": rate(r.get("random gap"), ".2f"),
         "question names the voice": rate((r.get("named") or {}).get("voice"), ".2f")}
        for r in rows
    ]  # fmt: skip


def knob_rows(found: Mapping[str, Any]) -> list[Row]:
    """What in the clips moves the gap."""
    return [
        {"conflict clips with": k, **{n: rate(v.get(n), ".2f") for n in ("gap", "as voice", "as face")}}
        for k, v in (found.get("knobs") or {}).items()
    ]


def attention_rows(found: Mapping[str, Any]) -> list[Row]:
    """Where the last query looks, by layer."""
    return [
        {"attention to": n, **{f"layer {i}": v for i, v in enumerate(values)}}
        for n, values in found["attention"].items()
    ]


# ------------------------------------------------------------------------------------------------ reallocation


def reallocation(folder: Path) -> Mapping[str, Any] | None:
    """Prompts with their answers under every reallocation tried, or None where the folder has none.

    Raises InputError for a damaged file.
    """
    return read_json(folder / REALLOCATION) if (folder / REALLOCATION).is_file() else None


def media(folder: Path, row: Mapping[str, Any], ending: str) -> Path | None:
    """A clip's picture (".png") or sound (".wav"), where it is there."""
    file = inside(folder / "clips", f"{row['name']}{ending}")
    return file if file is not None and file.is_file() else None


def row_name(row: Mapping[str, Any]) -> str:
    """What a prompt is called in a list."""
    said = [f"{part} {row[part]}" for part in ("voice", "face") if part in row]
    return f"{row['name']}: {', '.join(said)}" if said else str(row["name"])


def answer(found: Mapping[str, Any], p: Sequence[float]) -> str:
    """The likeliest answer in words."""
    best = max(range(len(p)), key=p.__getitem__)
    return f"{found['answers'][best]} ({num(p[best], '.0%')})"
