"""The sections of the report, each from the plain data of one stage; all return HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emocircuits import plots
from emocircuits._report_html import (
    Page,
    emotion_label,
    esc,
    interval,
    note,
    num,
    p_value,
    pct,
    points,
    table,
)
from emocircuits.evaluation.statistics import holm
from emocircuits.plots import number

Data = Mapping[str, Any]
ABOUT = {
    "unsteered": "the model as it is",
    "prompted": "the emotion is asked for in the prompt",
    "random": "a random direction of the same norm at the same layers",
    "steered": "the emotion's direction is added",
}


# ------------------------------------------------------------------------------------------------- evaluation


def main_figure(page: Page, evaluation: Data, emotions: Sequence[str]) -> str:
    """Coherent expression by method and emotion."""
    caption = (
        "Share of held-out scenarios whose text the judge reads as the wanted emotion, without naming it and "
        "without falling apart. Bars are 95% intervals from resampling scenarios."
    )
    fig = plots.expression_bars(evaluation["methods"], emotions)
    return page.figure(fig, "Coherent expression by emotion and method", caption)


def methods(evaluation: Data) -> str:
    """The table of methods, and the paired differences."""
    head = ["method", "coherent", "expresses", "names it", "degenerate", "perplexity", "distinct-2"]
    head += ["same opener", "repetition", "words", "similarity"]
    rows = [_method_row(name, scores) for name, scores in evaluation["methods"].items()]
    about = "; ".join(f"{name}: {ABOUT[name]}" for name in evaluation["methods"] if name in ABOUT)
    caption = (
        f"Rates with 95% intervals; {about}. Perplexity is the median under the unmodified model with its "
        "quartiles; similarity is to the unsteered text of the same scenario."
    )
    return table(caption, head, rows, strong="steered") + comparisons(evaluation)


def _method_row(name: str, scores: Data) -> list[str]:
    cost = scores.get("perplexity") or {}
    quartiles = f'<span class="ci">[{num(cost.get("q25"), ".1f")}, {num(cost.get("q75"), ".1f")}]</span>'
    median = num(cost.get("median"), ".1f", cost.get("reason"))
    return [
        esc(name),
        *(interval(scores.get(key)) for key in ("coherent", "expression", "named", "degenerate")),
        f"{median} {quartiles}" if number(cost.get("q25")) is not None else median,
        num(scores.get("distinct_2")),
        pct(scores.get("opener_concentration")),
        num(scores.get("repetition")),
        num(scores.get("length_words"), ".0f"),
        num(
            scores.get("similarity_to_unsteered"),
            reason="it is the reference" if name == "unsteered" else None,
        ),
    ]


def comparisons(evaluation: Data) -> str:
    """Paired differences in coherent expression, with p before and after Holm's correction."""
    found = evaluation.get("comparisons") or []
    if not found:
        return note("No paired comparisons were recorded.")
    ps = [number(row.get("p")) for row in found]
    adjusted = holm([math.nan if p is None else p for p in ps]).tolist()
    rows = [
        [
            f"{esc(row['a'])} {chr(0x2212)} {esc(row['b'])}",
            points(row.get("difference")),
            p_value(row.get("p"), row.get("reason")),
            p_value(fixed, "not tested"),
            f"{(row.get('difference') or {}).get('n_clusters', '?')}",
        ]
        for row, fixed in zip(found, adjusted)
    ]
    caption = (
        "Paired differences in coherent expression, in percentage points with 95% intervals. The test flips "
        "the sign of whole scenarios; p is two-sided, then corrected for the number of rows (Holm)."
    )
    return table(caption, ["difference", "points", "p", "p, corrected", "scenarios"], rows)


def per_emotion(evaluation: Data, emotions: Sequence[str]) -> str:
    """How each emotion fares under steering, beside prompting and the random direction."""
    by = {name: scores.get("by_emotion") or {} for name, scores in evaluation["methods"].items()}
    shift = evaluation.get("kl_on_neutral") or {}
    rows = []
    for emotion in emotions:
        steered = by.get("steered", {}).get(emotion) or {}
        others = [interval((by[name].get(emotion) or {}).get("coherent")) for name in by if name != "steered"]
        rows.append(
            [
                emotion_label(emotion),
                interval(steered.get("coherent")),
                *others,
                interval(steered.get("expression")),
                pct(steered.get("named")),
                pct(steered.get("degenerate")),
                num(steered.get("perplexity"), ".1f"),
                num(shift.get(emotion)),
            ]
        )
    beside = [f"coherent, {esc(name)}" for name in by if name != "steered"]
    costs = ["expresses, steered", "names it", "degenerate", "perplexity", "KL on neutral text"]
    head = ["emotion", "coherent, steered", *beside, *costs]
    return table("Per emotion. The last five columns are about the steered model.", head, rows)


def confusions(page: Page, evaluation: Data) -> str:
    """A confusion matrix per method that has one."""
    blocks = []
    for name, scores in evaluation["methods"].items():
        if (found := scores.get("confusion")) and found.get("counts"):
            blocks.append(page.figure(plots.confusion_map(found), f"{name}: {ABOUT.get(name, name)}"))
    words = (
        "<p>Rows are the wanted emotion, columns what the judge read: a forced choice that was not told the "
        "target. Numbers are texts, the shade is the share of the row.</p>"
    )
    grid = f'<div class="grid">{"".join(blocks)}</div>' if blocks else note("No confusion matrices were recorded.")
    return words + grid + _unsteered_labels(evaluation.get("unsteered_labels") or {})


def _unsteered_labels(counts: Mapping[str, Any]) -> str:
    if not counts:
        return ""
    total = sum(number(n) or 0 for n in counts.values())
    said = ", ".join(f"{esc(k)} {esc(n)} ({pct((number(n) or 0) / total)})" for k, n in counts.items() if total)
    return note(f"Without steering the judge reads the texts as: {said}.")


# ----------------------------------------------------------------------------------------------- cost and dose


def cost(page: Page, tuning: Data | None, dose: Data | None, evaluation: Data | None) -> str:
    """The Pareto plot of expression against perplexity."""
    base = ((evaluation or {}).get("methods") or {}).get("unsteered", {}).get("perplexity") or {}
    candidates, chosen = (tuning or {}).get("candidates") or [], (tuning or {}).get("chosen") or {}
    fig = plots.pareto(candidates, (dose or {}).get("rows") or [], chosen, base.get("median"))
    caption = (
        "Each point is one setting of one emotion; left and up is better. Perplexity can also fall because a "
        "text repeats itself, so read it beside the degenerate rate."
    )
    return page.figure(fig, "What expression costs", caption)


def dose_response(page: Page, dose: Data) -> str:
    """Coherent expression, expression, cost and breakdown against signed strength."""
    rows = dose.get("rows") or []
    if not rows:
        return note("dose.json holds no rows.")
    labels = {
        "coherent": "Coherent expression against strength",
        "expression": "Expression, coherent or not",
        "perplexity": "Median perplexity",
        "degenerate": "Degenerate texts",
    }
    figures = [page.figure(plots.dose_response(rows, measure), label) for measure, label in labels.items()]
    sizes = sorted({int(n) for row in rows if (n := number(row.get("n"))) is not None})
    size = f" Each point rests on {' to '.join(map(str, sizes[:1] + sizes[1:][-1:]))} texts." if sizes else ""
    words = (
        "<p>A direction that carries the emotion should act in proportion, and not when it is subtracted "
        f"(left of 0). The dashed line is the chosen strength.{size}</p>"
    )
    return words + f'<div class="grid">{"".join(figures)}</div>'


def tuning(page: Page, found: Data) -> str:
    """How layers and strengths were chosen."""
    candidates, chosen = found.get("candidates") or [], found.get("chosen") or {}
    rows = [
        [
            emotion_label(e),
            esc(", ".join(map(str, c.get("layers") or []))),
            num(c.get("strength"), ".3g"),
            pct(c.get("coherent")),
        ]
        for e, c in chosen.items()
    ]
    caption = "The chosen settings. The rate is the one on tuning scenarios; it is optimistic, being a maximum."
    maps = [
        page.figure(plots.tuning_map(candidates, e, chosen.get(e)), f"{e}: coherent rate of each candidate")
        for e in dict.fromkeys(row["emotion"] for row in candidates)
    ]
    words = (
        f"<p>Layers and strengths were chosen on {esc(found.get('n_scenarios', 'an unrecorded number of'))} "
        "tuning scenarios; the results above are on held-out ones. Strength is in units of the residual norm, "
        "per layer, and a frame marks the choice.</p>"
    )
    settings = table(caption, ["emotion", "layers", "strength", "coherent when tuned"], rows, wide=False)
    return words + settings + f'<div class="grid three">{"".join(maps)}</div>{_wordings(found.get("prompting"))}'


def _wordings(found: Data | None) -> str:
    """The prompting baseline is tuned as well: its best wording competes."""
    if not found:
        return ""
    rates = ", ".join(f"{esc(name)} {pct(rate)}" for name, rate in (found.get("coherent") or {}).items())
    return note(
        f"The prompting baseline is tuned too: of its wordings (coherent rate: {rates}) it uses "
        f"<strong>{esc(found.get('wording'))}</strong>."
    )


# ------------------------------------------------------------------------------------------------- directions


def held_out_test(direction_set: Data) -> Data | None:
    """The test on themes that were never used in fitting, None if the set has no such test."""
    about = ((test, f"{test.get('name')} {test.get('what')}".lower()) for test in direction_set.get("tests") or [])
    return next((test for test, words in about if "theme" in words), None)


def row_at(test: Data | None, layer: Any) -> Data:
    """The row of a test at one layer, empty if there is none."""
    return next((row for row in (test or {}).get("rows") or [] if row.get("layer") == layer), {})


def as_interval(row: Data) -> dict[str, Any]:
    """A test row's accuracy in the form of every other interval."""
    reason = row.get("reason") or ("not measured in this run" if not row else None)
    return {"estimate": row.get("accuracy"), "low": row.get("low"), "high": row.get("high"), "reason": reason}


def directions(page: Page, quality: Data) -> str:
    """Accuracy and AUROC by layer of every set, other fits, and how far the directions repeat."""
    sets = quality.get("sets") or []
    curves = "".join(_curves(page, found, quality) for found in sets)
    return _best_layers(quality) + _grid(curves) + _fits(quality) + _grid(_agreement(page, quality))


def _curves(page: Page, found: Data, quality: Data) -> str:
    layers, name = quality["layers"], str(found["name"])
    accuracy = plots.quality_by_layer(found, layers, 1 / len(quality["emotions"]))
    area = plots.quality_by_layer(found, layers, 0.5, "auroc")
    caption = (
        f"Trained on {esc(found.get('trained_on', 'unrecorded texts'))}, method {esc(found.get('method'))}. "
        "The dotted line chose the layer, on training themes alone; the grey band is what shuffled labels give, "
        "from their mean to their 95th percentile."
    )
    return page.figure(accuracy, f"{name}: accuracy by layer", caption) + page.figure(
        area, f"{name}: AUROC by layer", "Mean over emotions, one against the rest."
    )


def _grid(figures: str) -> str:
    return f'<div class="grid">{figures}</div>' if figures else ""


def _best_layers(quality: Data) -> str:
    emotions = quality["emotions"]
    rows = []
    for found in quality.get("sets") or []:
        for test in found.get("tests") or []:
            row = row_at(test, found.get("best_layer"))
            recall = row.get("recall") or {}
            name = f"{esc(found['name'])}, {esc(test.get('name'))}"
            name += f'<span class="what">{esc(test.get("what", ""))}</span>'
            scores = [interval(as_interval(row), ".2f"), num(row.get("auroc"))]
            rows.append([name, esc(found.get("best_layer")), *scores, *(num(recall.get(e)) for e in emotions)])
    head = ["set, test", "layer", "accuracy", "AUROC", *(f"recall, {esc(e)}" for e in emotions)]
    return table("Every test at the layer that training themes chose.", head, rows)


def _fits(quality: Data) -> str:
    rows = []
    for other in quality.get("fits") or []:
        chosen = other.get("method") == (quality.get("readout") or {}).get("method")
        rows.append(
            [
                esc(other.get("method")) + (" (the read-out)" if chosen else ""),
                num(other.get("layer"), ".0f", "no model"),
                num(other.get("across_themes"), reason="not computed"),
                interval(as_interval(other), ".2f"),
                num(other.get("auroc")),
            ]
        )
    if not rows:
        return ""
    head = ["method", "layer", "left-out training themes", "held-out themes", "AUROC"]
    caption = (
        "Ways to fit the reply directions, each at the layer its training themes chose. The read-out is the method "
        "that was best on left-out training themes; the plain difference of means steers. Without a model: the same "
        "difference of means of the replies' character n-grams. Only what exceeds it is the model's own."
    )
    return table(caption, head, rows, wide=False)


def _agreement(page: Page, quality: Data) -> str:
    emotions, layers = quality["emotions"], quality["layers"]
    halves = "Cosine of directions fitted on two halves of the scenarios; at 1, more data would not move them."
    maps = [
        (found["split_half"], f"{found['name']}: split-half agreement", halves)
        for found in quality.get("sets") or []
        if found.get("split_half")
    ]
    maps += [(values, f"Cosine of {name}", "") for name, values in (quality.get("cosines") or {}).items()]
    figures = [
        page.figure(plots.split_half_map(values, emotions, layers), label, caption) for values, label, caption in maps
    ]
    return "".join(figures)


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, Sequence) and index < len(values) else None


def confounds(quality: Data) -> str:
    """What else could explain the directions, measured."""
    rows = [
        [
            esc(found.get("name")),
            num(found.get("value"), ".3g", found.get("note")),
            f'<span class="prose">{esc(found.get("what", ""))}</span>',
            f'<span class="prose">{esc(found.get("note", ""))}</span>',
        ]
        for found in quality.get("confounds") or []
    ]
    if not rows:
        return note("No confounds were measured in this run.")
    return table("What else could explain the directions.", ["confound", "value", "what is measured", "reading"], rows)


def geometry(page: Page, quality: Data | None, embedding: Data | None) -> str:
    """How the directions and the readings lie to each other."""
    figures = []
    if embedding and embedding.get("points"):
        found, layer = embedding["points"], embedding.get("layer")
        axes = [f"PC {i + 1}" + _explained(embedding.get("variance"), i) for i in range(2)]
        fig = plots.embedding_scatter(found, (axes[0], axes[1]))
        caption = "Open diamonds are held out: they were not used to fit the axes or the directions."
        figures.append(page.figure(fig, f"Readings at layer {layer}, first two principal components", caption))
    if quality and (shape := quality.get("geometry")):
        fig = plots.geometry_map(shape["cosines"], quality["emotions"])
        figures.append(page.figure(fig, f"Cosines between the emotions' directions at layer {shape.get('layer')}"))
    return f'<div class="grid">{"".join(figures)}</div>'


def _explained(variance: Any, i: int) -> str:
    share = number(_at(variance, i))
    return "" if share is None else f" ({share:.0%} of the variance)"


# ------------------------------------------------------------------------------------------------------ judge


def judge(evaluation: Data) -> str:
    """How far the judge can itself be trusted."""
    found = evaluation.get("judge") or {}
    if not found:
        return note("The judge's own reliability was not recorded.")
    own, other = found.get("recall") or {}, found.get("held_out_replies") or {}
    second = other.get("recall") or {}
    rows = [
        [emotion_label(k), pct(own.get(k)), pct(second.get(k), "no such replies")]
        for k in dict.fromkeys([*own, *second])
    ]
    accuracy = ["all", pct(found.get("cv_accuracy")), interval(other.get("accuracy"))]
    key = "accuracy_without_punctuation"
    bare = f"; without punctuation it is {pct(other[key])}" if key in other else ""
    words = (
        f"<p>The judge is <strong>{esc(found.get('name', 'unnamed'))}</strong>, a forced choice among the "
        "emotions and neutral. On held-out replies of known emotion its accuracy is "
        f"{interval(other.get('accuracy'))}{bare}. Where its recall "
        "is low, expression rates of that emotion are too low as well.</p>"
    )
    head = ["emotion", "recall, its own corpus (cross-validated)", "recall, held-out replies"]
    result = words + table("Reliability of the judge.", head, [*rows, accuracy], strong="all", wide=False)
    return result + _second_opinion(found.get("second"))


def _second_opinion(found: Data | None) -> str:
    if not found:
        return ""
    rows = [[esc(method), interval(rate)] for method, rate in (found.get("coherent") or {}).items()]
    caption = f"The same texts, judged by {esc(found.get('name'))}."
    return "<h3>Second opinion</h3>" + table(caption, ["method", "coherent expression"], rows, wide=False)
