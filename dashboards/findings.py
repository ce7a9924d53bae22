"""What the Overview and Compare pages say, as rows of text from a run's data. No Streamlit in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dashboards.words import num, p_value, plain, points, rate
from emocircuits import _report_sections as sections
from emocircuits.plots import number
from emocircuits.report import RunData, targets

Row = dict[str, str]
METHODS = ("unsteered", "prompted", "random", "steered")
RATES = {
    "coherent": "coherent expression",
    "expression": "expresses it",
    "named": "names it",
    "degenerate": "degenerate",
}


def figures(data: RunData) -> list[tuple[str, str, str]]:
    """Key figures: (name, value, its interval); only what was measured."""
    found = [("Directions", *_parts(_accuracy(data), ".2f"))]
    for method in ("steered", "prompted", "random"):
        found.append((f"Coherent, {method}", *_parts((data.methods.get(method) or {}).get("coherent"), ".0%")))
    before, after = (median_perplexity(data, m) for m in ("unsteered", "steered"))
    if before and after is not None:
        found.append(("Perplexity", f"{after / before:.1f}\N{MULTIPLICATION SIGN}", f"{before:.1f} to {after:.1f}"))
    return [f for f in found if f[1]]


def _parts(found: Mapping[str, Any] | None, form: str) -> tuple[str, str]:
    said = rate(found, form)
    if number((found or {}).get("estimate")) is None:
        return "", ""
    value, _, interval = said.partition(" ")
    return value, interval


def _accuracy(data: RunData) -> Mapping[str, Any] | None:
    if not data.quality:
        return None
    readout = data.quality.get("readout")
    first = (data.quality.get("sets") or [{}])[0]
    row = readout or sections.row_at(sections.held_out_test(first), first.get("best_layer"))
    return sections.as_interval(row)


def median_perplexity(data: RunData, method: str) -> float | None:
    """Median perplexity of a method's texts; None where it was not measured."""
    return number(((data.methods.get(method) or {}).get("perplexity") or {}).get("median"))


def target_rows(data: RunData) -> list[Row]:
    """The targets, what was measured, and the verdict."""
    verdicts = {None: "not measured", True: "met", False: "not met"}
    return [
        {"target": t.name, "wanted": t.goal, "measured": plain(t.measured),
         "verdict": verdicts[t.met] if t.sure or not t.met else "met, but the interval reaches below"}
        for t in targets(data)
    ]  # fmt: skip


def method_rows(methods: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Every method's rates and costs."""
    return [
        {
            "method": name,
            **{words: rate(scores.get(key)) for key, words in RATES.items()},
            "perplexity": num((scores.get("perplexity") or {}).get("median"), ".1f"),
            "repetition": num(scores.get("repetition")),
            "similarity to unsteered": num(scores.get("similarity_to_unsteered")),
        }
        for name, scores in methods.items()
    ]


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Paired differences in coherent expression."""
    return [
        {"difference": f"{row['a']} \N{MINUS SIGN} {row['b']}", "points": points(row.get("difference")),
         "p": p_value(row.get("p")), "scenarios": str((row.get("difference") or {}).get("n_clusters", "?"))}
        for row in comparisons
    ]  # fmt: skip


def emotion_rows(data: RunData) -> list[Row]:
    """How each emotion fares under steering."""
    steered = (data.methods.get("steered") or {}).get("by_emotion") or {}
    shift = (data.evaluation or {}).get("kl_on_neutral") or {}
    chosen = (data.tuning or {}).get("chosen") or {}
    return [
        {
            "emotion": e,
            "coherent": rate(steered[e].get("coherent")),
            "expresses it": rate(steered[e].get("expression")),
            "degenerate": num(steered[e].get("degenerate"), ".0%"),
            "perplexity": num(steered[e].get("perplexity"), ".1f"),
            "KL on neutral text": num(shift.get(e)),
            "strength": num((chosen.get(e) or {}).get("strength"), ".3g"),
            "layers": _span((chosen.get(e) or {}).get("layers") or []),
        }
        for e in data.emotions
        if e in steered
    ]


def _span(layers: Sequence[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "n/a"


def scenarios(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Key and opening words of every scenario that has texts."""
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(
            scenario_of(row), f"{row.get('theme', '?')}, {row.get('valence', '?')}: {row.get('prompt', '')}"
        )
    return found


def scenario_of(row: Mapping[str, Any]) -> str:
    """The key of a text's scenario: the event and its valence."""
    return f"{row.get('skeleton_id', '?')}/{row.get('valence', '?')}"


def side_by_side(rows: Sequence[Mapping[str, Any]], scenario: str, emotion: str) -> list[Mapping[str, Any]]:
    """One scenario's text of every method for one emotion; the unsteered text serves all of them."""
    mine = [r for r in rows if scenario_of(r) == scenario and r.get("emotion") in (emotion, None)]
    found = {str(r["method"]): r for r in mine}
    return [found[m] for m in (*METHODS, *(m for m in found if m not in METHODS)) if m in found]


def verdict(row: Mapping[str, Any]) -> str:
    """What the judge made of a text, in words."""
    said = [f"read as {row.get('predicted', '?')}"]
    said += ["names the emotion"] if row.get("named") else []
    said += [f"degenerate ({row.get('reason') or 'no reason given'})"] if row.get("degenerate") else []
    if row.get("emotion") is not None:
        said.insert(0, "coherent expression" if row.get("coherent") else "no coherent expression")
    return f"{'; '.join(said)}; perplexity {num(row.get('perplexity'), '.1f')}"


# ------------------------------------------------------------------------------------------------ directions


def test_rows(quality: Mapping[str, Any]) -> list[Row]:
    """Every test of every direction set at its chosen layer."""
    return [
        {
            "read at": str(found["name"]), "test": str(test.get("name")), "layer": str(found.get("best_layer")),
            "accuracy": rate(sections.as_interval(row), ".2f"), "AUROC": num(row.get("auroc")),
            **{f"recall, {e}": num((row.get("recall") or {}).get(e)) for e in quality["emotions"]},
            "what": str(test.get("what", "")),
        }
        for found in quality["sets"]
        for test in found.get("tests") or []
        for row in [sections.row_at(test, found.get("best_layer"))]
    ]  # fmt: skip


def fit_rows(quality: Mapping[str, Any]) -> list[Row]:
    """Ways to fit the directions, each at the layer its training themes chose."""
    readout = (quality.get("readout") or {}).get("method")
    return [
        {"method": f"{f.get('method')}{' (the read-out)' if f.get('method') == readout else ''}",
         "layer": "none" if f.get("layer") is None else str(f["layer"]),
         "left-out training themes": num(f.get("across_themes")),
         "held-out themes": rate(sections.as_interval(f), ".2f"), "AUROC": num(f.get("auroc"))}
        for f in quality.get("fits") or []
    ]  # fmt: skip


def confound_rows(quality: Mapping[str, Any]) -> list[Row]:
    """What else could explain the directions, measured."""
    return [
        {"confound": str(f.get("name")), "value": num(f.get("value"), ".3g"),
         "what is measured": str(f.get("what", "")), "reading": str(f.get("note", ""))}
        for f in quality.get("confounds") or []
    ]  # fmt: skip


def axes(embedding: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the two principal components, with the variance they explain; a map by UMAP has none."""
    if embedding.get("method") == "umap":
        return "", ""
    found = [number(v) for v in (embedding.get("variance") or [])[:2]] + [None, None]
    first, second = (
        f"PC {i + 1}" + ("" if v is None else f" ({v:.0%} of the variance)") for i, v in enumerate(found[:2])
    )
    return first, second


def token_rows(found: Any, layer: int) -> list[dict[str, Any]]:
    """What a text carries (`live.along`), token by token; surprisal is no emotion, so it says its unit."""
    return [
        {"token": piece, **dict(zip(found.emotions, row)), "surprisal, nats": float(nats)}
        for piece, nats, row in zip(found.pieces, found.surprise, found.at(layer).tolist())
    ]
