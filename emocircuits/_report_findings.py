"""What a run found, in sentences, in key figures, and against its targets."""

from __future__ import annotations

from dataclasses import dataclass

from emocircuits import _report_sections as sections
from emocircuits._report_html import esc, interval, points, table
from emocircuits._report_run import Data, RunData
from emocircuits.plots import number


def header(title: str, data: RunData) -> str:
    settings = data.manifest.get("settings") or {}
    facts = [f"emocircuits {data.manifest.get('package_version', 'of unknown version')}"]
    facts += [f"seed {settings['seed']}"] if "seed" in settings else []
    sentences = "".join(f"<p>{sentence}</p>" for sentence in headline(data))
    heading = esc(title).replace(f"{esc(data.model)}:", f'<span class="model">{esc(data.model)}:</span>', 1)
    return (
        f'<h1>{heading}</h1><p class="byline">{esc(", ".join(facts))}</p>'
        f'<div class="headline">{sentences}</div>{_tiles(data)}'
    )


def headline(data: RunData) -> list[str]:
    """The result in a few sentences of HTML, whichever way it came out."""
    said = [_said_directions(data), _said_steering(data), _said_cost(data), _said_targets(data)]
    return [sentence for sentence in said if sentence] or ["Nothing has been measured in this run yet."]


def _direction_result(data: RunData) -> tuple[Data, Data]:
    """The first direction set, and the held-out-theme score of the read-out (method and layer) of its training themes.

    A run without a read-out is judged by the first set at its own best layer.
    """
    found = ((data.quality or {}).get("sets") or [{}])[0]
    readout = (data.quality or {}).get("readout")
    return found, readout or sections.row_at(sections.held_out_test(found), found.get("best_layer"))


def _said_directions(data: RunData) -> str:
    found, row = _direction_result(data)
    if not row or number(row.get("accuracy")) is None:
        return ""
    chance = 1 / len(data.emotions)
    above = (number(row.get("low")) or 0.0) > max(chance, _null_limit(data, found) or 0.0)
    start = f"{esc(data.model)} {'has' if above else 'shows no reliable'} linear emotion directions"
    goal = f"{len(data.emotions)} emotions" if len(data.emotions) > 1 else "one emotion"
    null, words = _null_limit(data, found), _words_alone(data)
    beside = f"chance {chance:.2f}" + ("" if null is None else f", shuffled labels up to {null:.2f}")
    beside += "" if words is None else f", the replies' own letters without a model {words:.2f}"
    end = "" if above else " That is not clearly more than chance."
    if above and words is not None and (number(row.get("low")) or 0.0) <= words:
        end = " That is not clearly more than the words of the replies give without a model."
    return (
        f"{start}: read at layer {esc(row.get('layer'))}, they tell {goal} apart on themes "
        f"never used in fitting with accuracy {interval(sections.as_interval(row), '.2f')} ({beside}).{end}"
    )


def _words_alone(data: RunData) -> float | None:
    """Accuracy of the fit that saw no activations."""
    fits = (data.quality or {}).get("fits") or []
    return next((number(f.get("accuracy")) for f in fits if f.get("layer") is None), None)


def _null_limit(data: RunData, found: Data) -> float | None:
    layers, high = list((data.quality or {}).get("layers") or []), (found.get("null") or {}).get("high") or []
    at = layers.index(found["best_layer"]) if found.get("best_layer") in layers else None
    return number(high[at]) if at is not None and at < len(high) else None


def _said_steering(data: RunData) -> str:
    steered = data.methods.get("steered")
    if not steered:
        return ""
    others = [
        f"{words} {interval(data.methods[name].get('coherent'))}"
        for name, words in (
            ("prompted", "asking for it in the prompt gives"),
            ("random", "a random direction of the same norm"),
            ("unsteered", "no intervention"),
        )
        if name in data.methods
    ]
    beside = f"; {', '.join(others)}" if others else ""
    lead = _difference(data, "random") or {}
    low = number(lead.get("low"))
    doubt = "" if low is None or low > 0 else " Steering is not clearly better than the random direction."
    return (
        f"Adding a direction makes the text express the wanted emotion coherently in "
        f"{interval(steered.get('coherent'))} of held-out scenarios{beside}.{doubt}"
    )


def _said_cost(data: RunData) -> str:
    steered, base = (data.methods.get(m) or {} for m in ("steered", "unsteered"))
    after, before = (number((m.get("perplexity") or {}).get("median")) for m in (steered, base))
    if after is None or not before:
        return ""
    return (
        f"The cost: median perplexity under the unmodified model goes from {before:.1f} to {after:.1f}, and "
        f"{interval(steered.get('degenerate'))} of steered texts are degenerate."
    )


def _said_targets(data: RunData) -> str:
    found = [t for t in targets(data) if t.met is not None]
    missed = [f"{esc(t.name)} (wanted {esc(t.goal)}, measured {t.measured})" for t in found if not t.met]
    if not found:
        return ""
    checked = "" if len(found) == len(targets(data)) else " that could be checked"
    if not missed:
        return f"All {len(found)} targets{checked} are met."
    return f"{len(found) - len(missed)} of {len(found)} targets{checked} are met; missed: {'; '.join(missed)}."


def _tiles(data: RunData) -> str:
    _, row = _direction_result(data)
    tiles = []
    if data.quality:
        tiles.append(("Direction accuracy, held-out themes", interval(sections.as_interval(row), ".2f")))
    names = {
        "steered": "Coherent expression, steered",
        "prompted": "Coherent, prompted",
        "random": "Coherent, random",
    }
    tiles += [(words, interval(data.methods[m].get("coherent"))) for m, words in names.items() if m in data.methods]
    steered, base = (data.methods.get(m) or {} for m in ("steered", "unsteered"))
    after, before = (number((m.get("perplexity") or {}).get("median")) for m in (steered, base))
    if after is not None and before:
        tiles.append(("Perplexity, steered over unsteered", f"{after / before:.2f}\N{MULTIPLICATION SIGN}"))
    body = "".join(f'<div class="tile"><dt>{words}</dt><dd>{value}</dd></div>' for words, value in tiles)
    return f'<dl class="tiles">{body}</dl>' if tiles else ""


# ---------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A promise made before the run: `measured` is HTML; `met` is None where it was not measured."""

    name: str
    goal: str
    measured: str
    met: bool | None
    sure: bool = True


def targets(data: RunData) -> list[Target]:
    """The five targets of a demo run, judged from its data alone."""
    _, row = _direction_result(data)
    steered = data.methods.get("steered") or {}
    found = [
        _target("accuracy of the directions on held-out themes", "≥ 0.90", sections.as_interval(row), 0.90, ".2f"),
        _target("coherent expression on average", "≥ 75%", steered.get("coherent"), 0.75),
        _weakest(steered.get("by_emotion") or {}),
    ]
    for other, gap, words in (("prompted", 0.30, "prompting"), ("random", 0.50, "the random direction")):
        row = _difference(data, other)
        found.append(_target(f"lead over {words}", f"≥ {gap * 100:.0f} points", row, gap, "points"))
    return found


def _target(name: str, goal: str, found: Data | None, threshold: float, form: str = ".1%") -> Target:
    found = found or {"reason": "not measured in this run"}
    estimate, low = number(found.get("estimate")), number(found.get("low"))
    measured = points(found) if form == "points" else interval(found, form)
    if estimate is None:
        return Target(name, goal, measured, None)
    return Target(name, goal, measured, estimate >= threshold, low is not None and low >= threshold)


def _weakest(by_emotion: Data) -> Target:
    rates = {e: scores.get("coherent") or {} for e, scores in by_emotion.items()}
    known = {e: rate for e, found in rates.items() if (rate := number(found.get("estimate"))) is not None}
    name = "coherent expression of the weakest emotion"
    if not known:
        return _target(name, "≥ 50%", None, 0.5)
    weakest = min(known, key=lambda e: known[e])
    return _target(f"{name} ({weakest})", "≥ 50%", rates[weakest], 0.5)


def _difference(data: RunData, other: str) -> Data | None:
    """The recorded paired difference steered minus `other`, turned round if it was stored the other way."""
    for row in (data.evaluation or {}).get("comparisons") or []:
        found = row.get("difference") or {}
        if (row.get("a"), row.get("b")) == ("steered", other):
            return found
        if (row.get("a"), row.get("b")) == (other, "steered"):
            flip = {k: None if (x := number(found.get(k))) is None else -x for k in ("estimate", "low", "high")}
            return {**found, "estimate": flip["estimate"], "low": flip["high"], "high": flip["low"]}
    return None


def targets_table(data: RunData) -> str:
    """The targets, what was measured, and a plain verdict on each."""
    verdicts = {
        (True, True): '<span class="badge good">met</span>',
        (True, False): '<span class="badge mid">met, but the interval reaches below</span>',
    }
    unmet, unknown = '<span class="badge bad">not met</span>', '<span class="badge mid">not measured</span>'
    rows = []
    for target in targets(data):
        sure = verdicts.get((True, target.sure), unmet)
        verdict = unknown if target.met is None else sure if target.met else unmet
        rows.append([esc(target.name), esc(target.goal), target.measured, verdict])
    return table(
        "Fixed in advance, the same for every run.",
        ["target", "wanted", "measured", "verdict"],
        rows,
        wide=False,
    )
