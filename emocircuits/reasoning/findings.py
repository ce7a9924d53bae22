"""What many measured traces say together, and the page that shows it.

The unit of analysis is the trace: correlations are ranks within one trace, averaged over traces, and intervals
resample traces. Position is the control that any measure along a trace must beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._figures import number
from .._markdown import markdown_table, plain
from .._report_html import Page, esc, interval, num, table
from ..evaluation.statistics import clustered_bootstrap, holm, rank_correlation
from . import plots
from .label_tables import category_table
from .names import PUSHES, name_of, pair
from .parts import strongest, window
from .receivers import mean_map, receiver_heads, split_half
from .traces import Steps, Trace

Part = Mapping[str, Any]
Floats = NDArray[np.float64]
HEADS = 16
FEWEST = 5
"""Traces that an interval over traces needs: resamples of fewer are too much alike."""
MEASURES: dict[str, tuple[str, Callable[[Part], Any]]] = {
    "forced": ("the answer moves when asked at once (KL)", lambda p: _column(p["forced"]["kl"], "value")),
    "resampling": ("rollouts' answers move (KL)", lambda p: _column(p["sampled"]["resampling"], "value")),
    "counterfactual": (
        "rollouts' answers move when another step is said (KL)",
        lambda p: _column(p["sampled"]["counterfactual"], "value"),
    ),
    "hidden": ("the answer moves when later tokens cannot see the step (KL)", lambda p: p["suppression"]["on_answer"]),
    "receivers": ("receiver heads look back to the step", lambda p: p["receiver_score"]),
    "carried": ("the judged emotion in the step's activations", lambda p: _judged(p, 0)),
    "carried_other": ("control: the emotion judged least likely", lambda p: _judged(p, -1)),
    "pushed": ("the judgement moves per push of the step", lambda p: _slope(p, "odds")),
    "pushed_random": ("control: random pushes of the same norm", lambda p: _slope(p, "control")),
    "named": ("control: emotion words in the step", lambda p: p["named"]),
    "position": ("control: position", lambda p: list(range(len(p["steps"])))),
    "length": ("control: length in tokens", lambda p: p["tokens"]),
}


def _column(rows: Sequence[Part], name: str) -> list[float | None]:
    return [r[name] for r in rows]


def _judged(part: Part, place: int) -> list[float | None]:
    """What steps carry of the emotion that is judged most (0) or least (-1) likely in the end."""
    final = {e: part["forced"]["shares"][e][-1] for e in part["emotion"]["emotions"]}
    ranked = sorted(final, key=lambda e: -final[e])
    row = part["emotion"]["emotions"].index(ranked[place])
    return [step[row] for step in part["emotion"]["carried"]]


def _slope(part: Part, name: str) -> list[float]:
    """Change of log-odds per residual norm of push, by least squares through 0 over the doses."""
    doses = np.array(part["emotion"]["doses"])
    values = np.array(part["emotion"][name], dtype=float)
    return (values @ doses / (doses @ doses)).tolist()


def measures(part: Part) -> dict[str, Floats]:
    """Every measure that this trace has, [n] each."""
    found = {}
    for name, (_, read) in MEASURES.items():
        try:
            found[name] = np.array(read(part), dtype=float)
        except KeyError:  # it was not measured
            continue
    return found


def correlation(x: Floats, y: Floats, given: Floats | None = None) -> float:
    """Rank correlation within a trace, of four steps at least; with `given` the partial one, of five."""
    return rank_correlation(x, y, given, fewest=4 if given is None else 5)


def mean_over(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean over traces with its interval, from five traces on; where it is undefined they are left out and counted."""
    known = [v for v in values if not math.isnan(v)]
    found = asdict(clustered_bootstrap(np.array(known), range(len(known)), seed=seed))
    if 0 < len(known) < FEWEST:
        found |= {"low": math.nan, "high": math.nan, "reason": f"an interval needs {FEWEST} traces, got {len(known)}"}
    return {**found, "undefined": len(values) - len(known)}


def summary(parts: Sequence[Part], seed: int = 0) -> dict[str, Any]:
    """The tables of a run: what agrees with what, categories, receiver heads, pushes, and how good the answers are."""
    maps = [torch.tensor(np.array(p["receivers"]["kurtosis"], dtype=float)) for p in parts]
    shown = mean_map(maps)
    k = min(HEADS, int((~mean_map(maps, 1).isnan()).sum()))
    heads = receiver_heads(maps, k) if k else []
    parts = [{**p, "receiver_score": _receiver_score(p, heads)} for p in parts]
    every = [measures(p) for p in parts]
    names = [n for n in MEASURES if all(n in m for m in every)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {
        "n_traces": len(parts), "n_steps": sum(len(p["steps"]) for p in parts),
        "measures": {n: MEASURES[n][0] for n in names},
        "correlations": [
            {"a": a, "b": b, **mean_over([correlation(m[a], m[b]) for m in every], seed)} for a, b in pairs
        ],
        "beyond_position": [
            {"a": a, "b": b, **mean_over([correlation(m[a], m[b], m["position"]) for m in every], seed)}
            for a, b in pairs if "position" not in (a, b)
        ],
        "categories": _categories(parts, every, [n for n in names if n not in ("position",)], seed),
        "answers": _answers(parts, seed), "anchors": _anchors(parts, seed), "pushes": _pushes(parts, every, seed),
        "receivers": {
            "kurtosis": shown.tolist(), "heads": [list(h) for h in heads],
            "split_half": split_half(maps, seed=seed).tolist() if len(maps) > 1 else [],
        },
    }  # fmt: skip


def _receiver_score(part: Part, heads: Sequence[tuple[int, int]]) -> list[float]:
    vertical = np.array(part["receivers"]["vertical"], dtype=float)
    if not heads:
        return [math.nan] * vertical.shape[-1]
    return np.mean([vertical[layer, head] for layer, head in heads], axis=0).tolist()


def _categories(
    parts: Sequence[Part], every: Sequence[Mapping[str, Floats]], names: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Mean of every measure per category: within a trace first, then across traces."""
    kept = [(p, m) for p, m in zip(parts, every) if p["labels"]]
    if not kept:
        return []
    # Only labels and places count here, so one letter stands for each step.
    traces = [Trace("", Steps.of("x" * len(p["steps"])), labels=tuple(p["labels"])) for p, _ in kept]
    rows: dict[str | None, dict[str, Any]] = {}
    for name in names:
        for found in category_table(traces, [m[name] for _, m in kept], seed=seed):
            row = rows.setdefault(found.label, {"category": found.label, "n": 0, "mean_position": found.position})
            row["n"] = max(row["n"], found.n)
            row[name] = {**asdict(found.mean), "undefined": found.n_missing}
    return [row for kind, row in rows.items() if kind is not None]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _answers(parts: Sequence[Part], seed: int) -> dict[str, Any]:
    """How often the answer is right before any step and after all of them, and how sure it is."""
    known = [p for p in parts if p["truth"] is not None]
    found: dict[str, Any] = {"n_known": len(known)}
    for name, place in (("before", 0), ("after", -1)):
        tops = [max(p["forced"]["shares"], key=lambda a: p["forced"]["shares"][a][place]) for p in known]
        right = [float(t.casefold() == str(p["truth"]).casefold()) for t, p in zip(tops, known)]
        chance = [p["forced"]["shares"].get(p["truth"], [0.0] * (len(p["steps"]) + 1))[place] for p in known]
        found[f"right_{name}"], found[f"chance_{name}"] = mean_over(right, seed), mean_over(chance, seed)
    return found


def _anchors(parts: Sequence[Part], seed: int) -> dict[str, Any]:
    """Steps whose resampling importance passes the null (Holm within the trace), and where they stand."""
    rolled = [p for p in parts if "sampled" in p]
    if not rolled:
        return {}
    passed = [holm(np.array(_column(p["sampled"]["resampling"], "p"), dtype=float)) <= 0.05 for p in rolled]
    places = [i / max(1, len(w) - 1) for w in passed for i in np.flatnonzero(w)]
    rooms = [_mean(np.array(_column(p["sampled"]["resampling"], "headroom"), dtype=float)) for p in rolled]
    return {
        "share": mean_over([float(w.mean()) for w in passed], seed), "n": int(sum(w.sum() for w in passed)),
        "mean_position": float(np.mean(places)) if places else math.nan,
        "headroom": mean_over(rooms, seed),
    }  # fmt: skip


def _pushes(parts: Sequence[Part], every: Sequence[Mapping[str, Floats]], seed: int) -> list[dict[str, Any]]:
    """Change of the pushed emotion's log-odds by dose: at the step that matters most, least, at all, and at random."""
    with_emotion = [(p, m) for p, m in zip(parts, every) if "emotion" in p]
    rows = []
    for d, dose in enumerate(with_emotion[0][0]["emotion"]["doses"] if with_emotion else []):
        row: dict[str, Any] = {"dose": dose}
        for name, pick in (("most", np.nanargmax), ("least", np.nanargmin)):
            values = []
            for p, m in with_emotion:
                odds = np.array(p["emotion"]["odds"], dtype=float)
                values.append(odds[pick(m["forced"]), d] if not np.isnan(m["forced"]).all() else math.nan)
            row[name] = mean_over(values, seed)
        pushed, random = (
            [float(p["emotion"][n][d]) for p, _ in with_emotion] for n in ("everywhere", "control_everywhere")
        )
        row |= {"everywhere": mean_over(pushed, seed), "control_everywhere": mean_over(random, seed)}
        row["beyond_random"] = mean_over([a - b for a, b in zip(pushed, random)], seed)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- as text


def markdown(found: Part, model: str) -> str:
    """The tables of a run as Markdown."""
    said = [f"# What carries the reasoning of {model}", *map(plain, sentences(found))]
    beyond = {(r["a"], r["b"]): r for r in found["beyond_position"]}
    rows = [
        [name_of(r["a"]), name_of(r["b"]), cell(r), cell(beyond.get((r["a"], r["b"]))), str(r["n"])]
        for r in found["correlations"]
        if r["n"]
    ]
    said.append("Spearman correlation within a trace, mean over traces [95 %]; beside it with position taken out.")
    said.append(markdown_table(["measure", "with", "correlation", "beyond position", "traces"], rows))
    said.append("\n".join(f"- {name_of(n)}: {words}" for n, words in found["measures"].items()))
    if found["pushes"]:
        rows = [[f"{r['dose']:+.2f}", *(cell(r[n], "+.2f") for n in PUSHES)] for r in found["pushes"]]
        said.append("Change of the runner-up emotion's log-odds when steps are pushed, by dose in residual norms.")
        said.append(markdown_table(["dose", *PUSHES.values()], rows))
    if found["categories"]:
        names = [n for n in found["measures"] if n in found["categories"][0]]
        rows = [[c["category"], str(c["n"]), *(cell(c[n], ".3f") for n in names)] for c in found["categories"]]
        said.append("Means by kind of step: within a trace first, then across traces.")
        said.append(markdown_table(["kind", "steps", *map(name_of, names)], rows))
    return "\n\n".join(said) + "\n"


def cell(found: Part | None, form: str = ".2f") -> str:
    """An interval as text."""
    return "" if found is None else plain(interval(found, form))


# ---------------------------------------------------------------- the page


def page(found: Part, parts: Sequence[Part], model: str) -> str:
    """anchors.json and the traces as one self-contained HTML document."""
    made = Page(f"What carries the reasoning of {model}")
    made.add("agreement", "Do the measures agree?", _agreement(made, found))
    if found["categories"]:
        made.add("categories", "Kinds of steps", _category_table(found))
    if found["pushes"]:
        made.add("pushes", "Pushing a single step", _push_table(found))
    made.add("receivers", "Receiver heads", _receivers(made, found))
    for i, part in enumerate(parts[:6]):
        made.add(f"trace-{i}", f"Trace {part['id'] or i}", _trace(made, part))
    return made.render(f"<h1>{esc(made.title)}</h1>{''.join(f'<p>{s}</p>' for s in sentences(found))}")


def sentences(found: Part) -> list[str]:
    """The findings in words, whichever way they came out; HTML."""
    said = [f"{found['n_traces']} traces with {found['n_steps']} steps."]
    answers = found["answers"]
    if answers["n_known"]:
        before, after = interval(answers["right_before"]), interval(answers["right_after"])
        said.append(f"Asked before any reasoning the judgement is right in {before}, after all of it in {after}.")
    if anchors := found["anchors"]:
        said.append(
            f"{interval(anchors['share'])} of the steps move the answers of rollouts by more than two samples of the"
            " same size differ by chance (5 %, Holm within the trace)."
        )
    row = next((r for r in found["correlations"] if (r["a"], r["b"]) == ("forced", "carried")), None)
    if row:
        low, high = number(row["low"]), number(row["high"])
        verdict = (
            "are" if low is not None and low > 0 else "are not" if high is not None and high < 0 else "are not clearly"
        )
        said.append(f"Steps that move the judgement {verdict} those that carry its emotion: {interval(row, '.2f')}.")
    return said


def _agreement(made: Page, found: Part) -> str:
    main = [r for r in found["correlations"] if r["a"] in ("forced", "resampling")]
    beyond = {(r["a"], r["b"]): r for r in found["beyond_position"]}
    drawn = [{**r, "name": pair(r)} for r in main]
    rows = [
        [
            esc(name_of(r["a"])),
            esc(name_of(r["b"])),
            interval(r, ".2f"),
            interval(beyond.get((r["a"], r["b"])), ".2f"),
            str(r["n"]),
        ]
        for r in found["correlations"]
    ]
    legend = "".join(f"<li><b>{esc(name_of(n))}</b>: {esc(w)}</li>" for n, w in found["measures"].items())
    words = "Spearman correlation within a trace, averaged over traces; beside it with position partialled out."
    return (
        f"<ul>{legend}</ul>"
        + made.figure(plots.agreement_bars(drawn), "Agreement with what moves the answer")
        + table(words, ["measure", "with", "correlation", "beyond position", "traces"], rows, wide=True)
    )


def _category_table(found: Part) -> str:
    names = [n for n in found["measures"] if n in found["categories"][0]]
    rows = [
        [esc(c["category"]), str(c["n"]), num(c["mean_position"]), *(interval(c[n], ".3f") for n in names)]
        for c in sorted(found["categories"], key=lambda c: c["mean_position"])
    ]
    return table(
        "Means within a trace, then across.",
        ["category", "steps", "position", *(esc(name_of(n)) for n in names)],
        rows,
        wide=True,
    )


def _push_table(found: Part) -> str:
    rows = [[num(r["dose"], "+.2f"), *(interval(r[c], "+.2f") for c in PUSHES)] for r in found["pushes"]]
    words = "Change of the runner-up emotion's log-odds when its direction is added, by dose in residual norms."
    return table(words, ["dose", *PUSHES.values()], rows, wide=True)


def sharpness(found: Part) -> str:
    """Which heads the map of receiver heads rings, in words; plain text."""
    kurtosis, heads = found["receivers"]["kurtosis"], found["receivers"]["heads"]
    if not heads:
        return "No head is ringed: over steps so few none has a kurtosis."
    if sharp := plots.sharp_heads(kurtosis, heads):
        return f"Ringed: the {len(sharp)} sharpest heads with an excess kurtosis above 0, where 0 is even."
    layer, head = heads[0]
    top = num(kurtosis[layer][head])
    return (
        "No head is sharper than even: beyond the first layer none has an excess kurtosis above 0 "
        f"(the greatest is {top}), so none is ringed."
    )


def _receivers(made: Page, found: Part) -> str:
    halves = found["receivers"]["split_half"]
    words = f"{esc(sharpness(found))} Split-half reliability over traces: "
    words += f"{num(float(np.mean(halves)) if halves else None)}."
    drawn = plots.receiver_map(found["receivers"]["kurtosis"], found["receivers"]["heads"])
    return made.figure(drawn, "Who looks back at single steps", words)


def _trace(made: Page, part: Part) -> str:
    """A trace's figures; of a long one the steps around the most important one."""
    source = part.get("sampled") or part["forced"]
    rows = part["sampled"]["resampling"] if "sampled" in part else part["forced"]["kl"]
    n = len(part["steps"])
    start, stop = window(n, strongest(rows))
    steps, labels = part["steps"][start:stop], part["labels"][start:stop]
    shares = {answer: curve[start : stop + 1] for answer, curve in source["shares"].items()}
    answers = plots.answers_along(shares, part["truth"], asked="sampled" not in part, first=start)
    body = made.figure(answers, "Answers along the trace")
    body += made.figure(plots.importance_along(steps, rows[start:stop], first=start), "Importance of each step")
    links = plots.step_graph(part["suppression"]["kl"].block(start, stop), steps, labels, first=start)
    body += made.figure(links, "What each step needs of earlier ones")
    listed = "".join(f"<li>{esc(s)}</li>" for s in steps)
    cut = f"<p>Steps {start} to {stop - 1} of {n}, around the most important one.</p>" if len(steps) < n else ""
    return f'{cut}<ol start="{start}">{listed}</ol>{body}'
