"""The report's section on circuits, from the `circuits/` folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emocircuits import circuit_plots as plots
from emocircuits._report_html import Page, emotion_label, esc, interval, note, num, p_value, points, table

Data = Mapping[str, Any]
DIRECTION = "direction steering"


def section(page: Page, found: Data) -> str:
    """Everything the circuit part measured; stages that have not run are left out."""
    if skipped := found.get("skipped"):
        return note(f"This model has no circuits to show: {esc(skipped['reason'])}.")
    circuits, curves, evaluation = (found.get(k) for k in ("circuits", "curves", "evaluation"))
    parts = [
        _verdict(curves, evaluation),
        _comparison(evaluation) if evaluation else "",
        _curves(page, curves) if curves else "",
        _rank_curves(page, found["rank_curves"]) if found.get("rank_curves") else "",
        _discovery(page, circuits) if circuits else "",
        _graphs(page, found["graphs"]) if found.get("graphs") else "",
        _stability(found["stability"]) if found.get("stability") else "",
    ]
    return "".join(parts)


def _verdict(curves: Data | None, evaluation: Data | None) -> str:
    """Who wins, said plainly, whichever way it came out."""
    said = []
    if curves:
        rows = {
            (control, action): _at(curves, control, action)
            for control in ("circuit", "layer-matched random") for action in ("keep", "ablate")
        }  # fmt: skip
        size = rows["circuit", "keep"]
        attributed = _at(curves, "circuit by attribution", "ablate")
        if size and all(rows.values()):
            shown = {key: interval(row) for key, row in rows.items()}
            said.append(
                f"Each circuit has {size['n_heads']} heads and {size['n_neurons']} neurons. Without them the "
                f"emotion score of held-out replies is {shown['circuit', 'ablate']} of the whole model's, without as "
                f"many random units of the same layers {shown['layer-matched random', 'ablate']}: that says how far "
                f"they are needed. With nothing else intact it is {shown['circuit', 'keep']}, with random units "
                f"{shown['layer-matched random', 'keep']}: that says how far they suffice."
            )
            if attributed:
                said.append(
                    f"Without as many units chosen by attribution to that score instead it is {interval(attributed)}."
                )
    if evaluation:
        pairs = {c["b"]: c["difference"] for c in evaluation["comparisons"]}
        said += [
            _wins("random units", pairs.get("random units"), "it matters which units are moved"),
            _wins("plain directions at the same sites", pairs.get("directions, same sites"), "the circuit wins"),
            _wins("tuned direction steering", pairs.get(DIRECTION), "the circuit wins"),
        ]
    return "".join(f"<p>{s}</p>" for s in said if s)


def _wins(rival: str, difference: Data | None, meaning: str) -> str:
    if not difference or difference.get("estimate") is None:
        return ""
    verdict = "neither is clearly better"
    if difference["low"] > 0:
        verdict = meaning
    elif difference["high"] < 0:
        verdict = f"{rival} win" if rival.endswith("s") else f"{rival} wins"
    return f"Circuit modulation minus {rival}, in coherent expression: {points(difference)} points; {verdict}."


def _at(curves: Data, control: str, action: str) -> Data | None:
    """The row of the circuit that steers."""
    chosen = curves.get("chosen")
    wanted = (control, action, chosen)
    mine = (r for r in curves["rows"] if (r["control"], r["action"], r["size"]) == wanted and r["estimate"] is not None)
    return next(mine, None)


def _comparison(evaluation: Data) -> str:
    tests = {c["b"]: c for c in evaluation["comparisons"]}
    rows = []
    for name, scores in evaluation["methods"].items():
        test = tests.get(name)
        rows.append(
            [
                esc(name),
                num((scores.get("coherent") or {}).get("n_clusters"), ".0f"),
                interval(scores.get("coherent")),
                interval(scores.get("expression")),
                interval(scores.get("degenerate")),
                num((scores.get("perplexity") or {}).get("median"), ".1f"),
                num(scores.get("similarity_to_unsteered")),
                points(test["difference"]) if test else "",
                p_value(test["p"]) if test else "",
            ]
        )
    head = ["method", "scenarios", "coherent expression", "forced choice", "degenerate", "perplexity", "content kept",
            "circuit minus this, points", "p"]  # fmt: skip
    caption = (
        "Every method at its best strength on held-out scenarios, compared where both were run. Random units: as many "
        "other heads and neurons of the same layers, their own differences scaled to push as far as the circuit does "
        "(three draws taking turns). Directions, same sites: plain directions at the circuit's sublayers, their norms "
        "in the circuit's proportions."
    )
    return table(caption, head, rows, strong="circuit")


def _curves(page: Page, curves: Data) -> str:
    captions = {
        "keep": ("Faithfulness", "All other units hold their mean (dotted: the mean of another emotion and theme)."),
        "ablate": ("Completeness", "The units hold their mean; lower means that they were needed."),
        "enhance": ("Enhancement", "The emotion's difference is added to the units in neutral replies; 100% would be "
                    "the score of replies in the emotion."),
    }  # fmt: skip
    figures = [
        page.figure(plots.circuit_curves(curves["rows"], action), title, caption)
        for action, (title, caption) in captions.items()
    ]
    rows = [[esc(name), num(value)] for name, value in curves["areas"].items()]
    head = ["curve", "mean height"]
    return f'<div class="grid">{"".join(figures)}</div>' + table(
        "Area under each curve over log size.", head, rows, wide=False
    )


def _discovery(page: Page, found: Data) -> str:
    emotions, heads = found["emotions"], found["heads"]
    figures = []
    for i, emotion in enumerate(emotions):
        label = f"{emotion}: what taking out each head changes (mean ablation, downstream included)"
        figures.append(page.figure(plots.head_map(heads["total"][i]), label))
    neurons = found["neurons"]
    figures.append(
        page.figure(
            plots.neuron_ranks(neurons["scores"], neurons["ranks"], emotions), "Neurons by rank",
            "A steep line means that few neurons carry the emotion.",
        )
    )  # fmt: skip
    figures.append(
        page.figure(
            plots.influence_by_sublayer(found["influence"], emotions), "Influence of each sublayer",
            "Solid MLP, dashed attention. Correlation with the plain cosine to the reference: "
            f"{num(found['influence']['correlation_with_cosine'])}; near 1 it says little more than that.",
        )
    )  # fmt: skip
    rows = [
        [emotion_label(e), esc(m["heads"]), esc(m["neurons"]), _units("h", m["top_heads"]),
         _units("n", m["top_neurons"])]
        for e, m in found["members"].items()
    ]  # fmt: skip
    named = "Members, best first; h11.2 is head 2 of layer 11, n3.17 neuron 17 of layer 3, counted from 0."
    members = table(named, ["emotion", "heads", "neurons", "top heads", "top neurons"], rows)
    members += _reads(found.get("reads") or {})
    facts = [
        [esc(kind), num(o["jaccard"]), num(o["chance"]), num(o["excess"]), num(found["stability"].get(kind))]
        for kind, o in found["overlap"].items()
    ]
    shared = table(
        "How much the emotions' circuits share, and how far two halves of the training themes agree, given the "
        "same directions (both corrected for chance: 0 is chance, 1 identity).",
        ["units", "Jaccard between emotions", "by chance", "excess", "stability over themes"], facts, wide=False,
    )  # fmt: skip
    agreement = [[esc(name), num(value)] for name, value in heads["agreement"].items()]
    scores = table("Correlation of head scores.", ["scores", "Pearson"], agreement, wide=False)
    return f'<div class="grid">{"".join(figures)}</div>{members}{shared}{scores}'


def _rank_curves(page: Page, found: Data) -> str:
    """How far the best k units go."""
    figures = []
    for kind in ("neurons", "heads"):
        for action, title in (("ablate", "Without the best"), ("enhance", "What is added by the best")):
            if any((r["kind"], r["action"]) == (kind, action) for r in found["rows"]):
                caption = "Solid: the best anywhere; dashed: the best of each layer; grey: as many random units."
                figures.append(page.figure(plots.rank_curves(found["rows"], kind, action), f"{title} {kind}", caption))
    return f'<div class="grid">{"".join(figures)}</div>'


def _graphs(page: Page, found: Data) -> str:
    """Who feeds whom, and how much of the score the members leave to units outside the graph."""
    figures, rows = [], []
    for emotion, graph in found["graphs"].items():
        caption = (
            "Units that the score needs most; heads are circles, neurons squares. An edge is the part of the emotion "
            f"score ({esc(found['readout'])}) that one unit gives through another, or directly (to the diamond); green "
            "raises it, orange lowers it."
        )
        figures.append(page.figure(plots.circuit_graph(graph, emotion), f"{emotion}: how its units work", caption))
        effects = sum(abs(n["effect"]) for n in graph["nodes"])
        inside, direct = sum(abs(e[2]) for e in graph["edges"]), sum(abs(n["direct"]) for n in graph["nodes"])
        if effects:
            rows.append([emotion_label(emotion), num(inside / effects), num(direct / effects)])
    shares = table(
        "Size of the flow between members and straight to the score, as a share of the members' effects (the rest "
        "goes through units that are not drawn).",
        ["emotion", "between members", "directly"], rows, wide=False,
    )  # fmt: skip
    return f'<div class="grid">{"".join(figures)}</div>{shares}'


def _stability(found: Data) -> str:
    rows = [
        [esc(r["what"]), num(r["n_pairs"], ".0f"), *(_excess(r[kind]) for kind in ("heads", "neurons"))]
        for r in found["rows"]
    ]
    return table(
        "Circuits found again, directions and all, from other texts: overlap in excess of chance (0 chance, 1 "
        f"identity), and the emotion with the least. {found['n_scenarios']} training scenarios each.",
        ["what changed", "pairs", "heads", "neurons"], rows,
    )  # fmt: skip


def _excess(found: Data) -> str:
    return f"{num(found['excess'])} ({esc(found['least_emotion'])} {num(found['least'])})"


def _reads(reads: Data) -> str:
    rows = [
        [f"{emotion_label(emotion)} h{'.'.join(map(str, row['head']))}",
         esc(", ".join(f"{token!r} {share:.0%}" for token, share in row["tokens"]))]
        for emotion, heads in reads.items() for row in heads
    ]  # fmt: skip
    caption = "What the best heads attend to at the end of a reply in their emotion, as shares of their attention."
    return table(caption, ["head", "tokens"], rows) if rows else ""


def _units(letter: str, units: list[list[int]]) -> str:
    return esc(", ".join(f"{letter}{layer}.{unit}" for layer, unit in units))
