"""Tables of experiments/results/ as Markdown: what the JSON files hold, number by number, nothing typed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def share(x: Any, digits: int = 0) -> str:
    """A number, or {"estimate", "low", "high"}, in per cent with its interval."""
    if isinstance(x, dict):
        x, low, high = x.get("estimate", x.get("accuracy")), x.get("low"), x.get("high")
        between = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
        return NONE if x is None else f"{100 * x:.{digits}f} %{between}".replace("-", "−")
    return NONE if x is None else f"{100 * x:.{digits}f} %".replace("-", "−")


def plain(x: Any, digits: int = 2) -> str:
    """A number with few digits."""
    return NONE if x is None else f"{x:.{digits}f}" if isinstance(x, float) else str(x)


def methods(found: dict[str, Any]) -> str:
    """What texts of each method are like."""
    head = ("method", "coherent expression", "forced choice", "names it", "degenerate", "median perplexity", "texts")
    rows = [
        (name, share(m["coherent"]), share(m["expression"]), share(m["named"]), share(m["degenerate"]),
         plain(m["perplexity"]["median"], 1), m["coherent"]["n"])
        for name, m in found.items()
    ]  # fmt: skip
    return table(head, rows)


def by_emotion(found: dict[str, Any]) -> str:
    """Coherent expression of every method, emotion by emotion."""
    emotions = list(next(iter(found.values()))["by_emotion"])
    rows = [(name, *(share(m["by_emotion"][e]["coherent"]) for e in emotions)) for name, m in found.items()]
    return table(("method", *emotions), rows)


def comparisons(rows: Iterable[dict[str, Any]]) -> str:
    """Paired differences between methods."""
    head = ("difference of coherent expression", "points (95 %)", "p, sign flips of scenarios")
    found = [(f"{r['a']} minus {r['b']}", share(r["difference"]).replace(" %", ""), f"{r['p']:.2g}") for r in rows]
    return table(head, found)


def effects(rows: Iterable[dict[str, Any]]) -> str:
    """What is left of, or added to, the emotion score by units: one line for units, one column for what is done."""
    units: dict[tuple[str, Any, Any], dict[str, Any]] = {}
    for row in rows:
        units.setdefault((row["control"], row["n_heads"], row["n_neurons"]), {})[row["action"]] = row
    done = sorted({action for found in units.values() for action in found})
    return table(
        ("units", "heads", "neurons", *done), [(*key, *(share(row.get(a)) for a in done)) for key, row in units.items()]
    )


def demo(data: Callable[[str], Any]) -> str:
    """The page of a demo run."""
    quality, evaluation = data("quality"), data("evaluation")
    tests = [
        (s["name"], t["name"], s["best_layer"], share(row), plain(row["auroc"]))
        for s in quality["sets"] for t in s["tests"] for row in t["rows"] if row["layer"] == s["best_layer"]
    ]  # fmt: skip
    fits = [(f["method"], f["layer"], share(f["across_themes"]), share(f), plain(f["auroc"])) for f in quality["fits"]]
    judge = evaluation["judge"]["held_out_replies"]
    return f"""# Directions and steering

One run of `emocircuits demo`; 95 % intervals are clustered by scenario. What is measured is in
[Evaluation](../../../evaluation.md), how directions are found in [Directions](../../../directions.md).

## How far directions carry

The layer of each set was chosen on its training themes. Chance is {share(1 / len(quality["emotions"]))}.

{table(("read at", "tested on", "layer", "accuracy", "AUROC"), tests)}

Ways to fit, all on replies:

{table(("method", "layer", "across training themes", "held-out themes", "AUROC"), fits)}

What could be mistaken for emotion:

{table(("confound", "what", "value"), [(c["name"], c["what"], plain(c["value"])) for c in quality["confounds"]])}

## Texts

{methods(evaluation["methods"])}

{comparisons(evaluation["comparisons"])}

## Emotion by emotion

{by_emotion(evaluation["methods"])}

KL on neutral text, in nats per token, at the chosen strength:

{table(list(evaluation["kl_on_neutral"]), [[plain(v) for v in evaluation["kl_on_neutral"].values()]])}

## The judge

It recognises {share(judge["accuracy"])} of held-out replies whose emotion is known,
{share(judge["accuracy_without_punctuation"])} without their punctuation.

{table(list(judge["recall"]), [[share(v) for v in judge["recall"].values()]])}

What it says of unsteered texts: {", ".join(f"{k} {n}" for k, n in evaluation["unsteered_labels"].items())}.
"""


def circuits(data: Callable[[str], Any]) -> str:
    """The page of a circuit run."""
    evaluation, curves, stability = data("evaluation"), data("curves"), data("stability")
    size = curves["rows"][0]["size"] if curves.get("chosen") is None else curves["chosen"]
    chosen = [row for row in curves["rows"] if row["size"] == size]
    again = [
        (r["what"], *(f"{plain(r[k]['excess'])} (least: {r[k]['least_emotion']} {plain(r[k]['least'])})"
                      for k in ("heads", "neurons")))
        for r in stability["rows"]
    ]  # fmt: skip
    return f"""# Circuits

One run of `emocircuits circuit --full`; [Circuits](../../../circuits.md) says what the measures are.

## Units taken out, kept alone, or added

Emotion score of {curves["n_texts"]} held-out replies ({curves["readout"]}) as a share of the whole model's, at the size
that was chosen.

{effects(chosen)}

## Every way to steer, at its own best strength

{evaluation["n_scenarios"]} held-out scenarios.

{methods(evaluation["methods"])}

{comparisons(evaluation["comparisons"])}

{by_emotion(evaluation["methods"])}

## Found again

Overlap beyond chance as a share of what identity would be, mean over emotions.

{table(("from other", "heads", "neurons"), again)}

## All sizes

{effects(curves["rows"])}
"""


PAGES = {"demo": demo, "circuits": circuits}


def pages(folder: Path) -> dict[str, str]:
    """Page for page, relative path -> Markdown: Markdown files as they are, and tables of JSON files."""

    def reader(name: str) -> Callable[[str], Any]:
        return lambda file: json.loads((folder / name / f"{file}.json").read_text("utf-8"))

    made = {f"{name}/index.md": write(reader(name)) for name, write in PAGES.items() if (folder / name).is_dir()}
    return {**made, **{str(p.relative_to(folder)): p.read_text("utf-8") for p in sorted(folder.rglob("*.md"))}}
