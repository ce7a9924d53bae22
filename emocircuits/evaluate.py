"""Judge a file of texts from any source: the `emocircuits evaluate` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import artefact
from .errors import InputError
from .evaluation import scoring
from .evaluation.expression import score_expression
from .evaluation.fluency import loops, perplexity, repetition_rate
from .models.load import load


def evaluate_file(path: Path, emotion: str | None, model_name: str, seed: int = 0) -> dict[str, Any]:
    """Rates with intervals over the rows of a JSONL file (`text`, and `emotion` unless one is given for all).

    Perplexity under the unsteered model is added when rows have a `prompt`; a text counts as degenerate when it
    loops, since no unsteered texts are at hand to fit a perplexity limit. Raises InputError naming the line.
    """
    from .evaluation.judges import EmbeddingJudge

    rows = artefact.read_jsonl(path)
    judge = EmbeddingJudge(seed=seed)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{path}, line {number}: no 'text' to judge")
        target = emotion or row.get("emotion")
        if target not in judge.labels:
            raise InputError(
                f"{path}, line {number}: emotion {target!r} is none of {', '.join(judge.labels)}; give --emotion"
            )
        row["emotion"] = target
        row.setdefault("skeleton_id", row.get("id", number))
    if all(isinstance(r.get("prompt"), str) for r in rows):
        model, tokenizer = load(model_name)
        for row, value in zip(
            rows, perplexity(model, tokenizer, [r["prompt"] for r in rows], [r["text"] for r in rows])
        ):
            row["perplexity"] = scoring.number(value)
    return _scores(rows, judge, seed)


def _scores(rows: list[dict[str, Any]], judge: Any, seed: int) -> dict[str, Any]:
    import numpy as np

    texts, targets = [r["text"] for r in rows], [r["emotion"] for r in rows]
    found = score_expression(texts, targets, judge, np.asarray([loops(t) for t in texts]))
    for i, row in enumerate(rows):
        row |= {"predicted": found.predicted[i], "expressed": bool(found.expressed[i]), "named": bool(found.named[i])}
        row |= {"degenerate": bool(found.degenerate[i]), "coherent": bool(found.coherent[i])}
    keys = ("coherent", "expressed", "named", "degenerate")
    return {
        "n": len(rows),
        **{k: scoring.interval(rows, k, seed) for k in keys},
        "perplexity": scoring.median(rows) if "perplexity" in rows[0] else None,
        "repetition": float(np.mean([repetition_rate(t) for t in texts])),
        "judge": judge.name,
        "rows": [{k: row[k] for k in ("skeleton_id", "emotion", "predicted", *keys)} for row in rows],
    }
