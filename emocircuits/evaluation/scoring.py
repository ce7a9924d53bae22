"""From generated texts to numbers: judge, naming rule, coherence gate, intervals clustered by scenario."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .expression import score_expression
from .fluency import (
    FluencyThresholds,
    content_similarity,
    degenerate,
    distinct_n,
    length_words,
    opener_concentration,
    repetition_rate,
)
from .judges import Judge
from .statistics import Interval, clustered_bootstrap, paired_test

Row = dict[str, Any]


def score_rows(rows: Sequence[Row], judge: Judge, thresholds: FluencyThresholds) -> list[Row]:
    """Rows with `text`, `emotion` and `perplexity`, plus the verdicts (the judge never sees the target).

    An unsteered row has emotion None; it gets a predicted label and no `expressed`.
    """
    texts = [row["text"] for row in rows]
    bad, reasons = degenerate(texts, np.asarray([row["perplexity"] for row in rows], dtype=float), thresholds)
    targets = [row["emotion"] or "neutral" for row in rows]
    scores = score_expression(texts, targets, judge, bad)
    verdicts = zip(
        scores.predicted, scores.target_probability, scores.expressed, scores.named, bad, reasons, scores.coherent
    )
    keys = ("predicted", "target_probability", "expressed", "named", "degenerate", "reason", "coherent")
    return [{**row, **{k: _plain(v) for k, v in zip(keys, verdict)}} for row, verdict in zip(rows, verdicts)]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def summarise(
    rows: Sequence[Row],
    emotions: Sequence[str],
    labels: Sequence[str],
    unsteered: dict[str, str],
    embed: Callable,
    seed: int,
) -> dict[str, Any]:
    """Everything the report says about one method; intervals are clustered by scenario."""
    texts = [r["text"] for r in rows]
    ppl = np.asarray([r["perplexity"] for r in rows], dtype=float)
    quartiles = np.nanquantile(ppl, [0.25, 0.5, 0.75]) if np.isfinite(ppl).any() else [np.nan] * 3
    similarity = content_similarity(texts, [unsteered[r["skeleton_id"]] for r in rows], embed)
    return {
        **{key: interval(rows, key, seed) for key in ("coherent", "named", "degenerate")},
        "expression": interval(rows, "expressed", seed),
        "perplexity": dict(zip(("q25", "median", "q75"), map(number, quartiles))),
        "distinct_2": number(distinct_n(texts, 2)),
        "opener_concentration": number(
            np.mean([opener_concentration(t) for t in _by_emotion(rows, emotions).values()])
        ),
        "repetition": number(np.mean([repetition_rate(t) for t in texts])),
        "length_words": number(np.mean([length_words(t) for t in texts])),
        "similarity_to_unsteered": number(np.nanmean(similarity)),
        "by_emotion": {e: _one_emotion([r for r in rows if r["emotion"] == e], seed) for e in emotions},
        "confusion": {"rows": list(emotions), "columns": list(labels), "counts": _confusion(rows, emotions, labels)},
    }


def _by_emotion(rows: Sequence[Row], emotions: Sequence[str]) -> dict[str, list[str]]:
    found = {e: [r["text"] for r in rows if r["emotion"] == e] for e in emotions}
    return {e: texts for e, texts in found.items() if texts} or {"": [r["text"] for r in rows]}


def _one_emotion(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    return {
        "coherent": interval(rows, "coherent", seed),
        "expression": interval(rows, "expressed", seed),
        "named": rate(rows, "named"),
        "degenerate": rate(rows, "degenerate"),
        "perplexity": median(rows),
    }


def _confusion(rows: Sequence[Row], emotions: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    kept = [r for r in rows if r["emotion"] in emotions]
    counts = Counter((r["emotion"], r["predicted"]) for r in kept)
    return [[counts[e, lab] for lab in labels] for e in emotions]


def interval(rows: Sequence[Row], key: str, seed: int = 0) -> dict[str, Any]:
    """Mean of a verdict with its 95 % interval, clustered by scenario, as JSON."""
    if not rows:
        return {"estimate": None, "low": None, "high": None, "n": 0, "n_clusters": 0, "reason": "no texts"}
    values = np.asarray([float(r[key]) for r in rows])
    return as_json(clustered_bootstrap(values, np.asarray([r["skeleton_id"] for r in rows]), seed=seed))


def as_json(value: Interval) -> dict[str, Any]:
    """An Interval as JSON: undefined numbers become null and keep their reason."""
    return {k: number(v) if isinstance(v, float) else v for k, v in asdict(value).items()}


def compare(a: Sequence[Row], b: Sequence[Row], key: str, names: tuple[str, str], seed: int) -> dict[str, Any]:
    """Paired difference of a verdict between two methods over the same scenarios and emotions, with its p-value."""
    index = {(r["skeleton_id"], r["emotion"]): r for r in b}
    pairs = [(r, index[r["skeleton_id"], r["emotion"]]) for r in a if (r["skeleton_id"], r["emotion"]) in index]
    left, right = (np.asarray([float(p[i][key]) for p in pairs]) for i in (0, 1))
    test = paired_test(left, right, np.asarray([p[0]["skeleton_id"] for p in pairs]), seed=seed)
    return {"a": names[0], "b": names[1], "what": key, "difference": as_json(test.difference), "p": number(test.p)}


def rate(rows: Sequence[Row], key: str) -> float | None:
    """Share of rows for which a verdict is true; None (null) without rows."""
    return float(np.mean([r[key] for r in rows])) if rows else None


def median(rows: Sequence[Row]) -> float | None:
    """Median perplexity of the rows; None (null) where undefined."""
    values = [r["perplexity"] for r in rows if r["perplexity"] is not None and np.isfinite(r["perplexity"])]
    return float(np.median(values)) if values else None


def number(value: Any) -> float | None:
    """A float, or None where it is not finite (JSON has no NaN)."""
    value = float(value)
    return value if np.isfinite(value) else None
