"""The cost card of a steerer: what each dose gains and what it costs, beside a random direction of the same norm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from .data.prompts import completion_prompt
from .data.scenarios import discovery, heldout
from .errors import InputError, unknown
from .evaluation import scoring
from .evaluation.capability import capability
from .evaluation.fluency import FluencyThresholds, fit_thresholds, kl_on_neutral, perplexity, repetition_rate
from .examples import one_valence
from .generation import Decoding, generate
from .models.fingerprint import fingerprint
from .steering import Steerer

DOSES = (-1.0, -0.5, 0.5, 1.0, 1.5)
N_NEUTRAL = 12

Row = dict[str, Any]


def measure(
    steerer: Steerer,
    model: Any,
    tokenizer: Any,
    emotion: str,
    *,
    doses: Sequence[float] = DOSES,
    n_scenarios: int = 8,
    max_new_tokens: int = 26,
    batch_size: int = 48,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The cost card as plain JSON: one row per method ("steered", "random") and dose, and one for no steering.

    doses: multiples of the steerer's own strength, at least five with both signs. Texts continue held-out scenarios;
    the coherence gate is fitted on unsteered texts of other scenarios. Raises InputError for doses without both signs,
    an emotion the judge does not know, or fewer than two scenarios.
    """
    from .evaluation.judges import EmbeddingJudge

    judge = EmbeddingJudge(seed=seed)
    if emotion not in judge.labels:
        raise unknown("emotion", emotion, judge.labels)
    if len(set(doses)) < 5 or min(doses) >= 0 or max(doses) <= 0 or 0 in doses:
        raise InputError("a cost card needs at least five doses of both signs, none of them 0")
    if n_scenarios < 2:
        raise InputError("a cost card needs at least two scenarios for its intervals")
    steerer.check(model)
    arms = {"steered": steerer}
    if any(t.mode != "add" for t in steerer.terms):
        said = {"control": "No random control: a removal or bound of a random component has no known level."}
    else:
        arms["random"], said = steerer.randomised(seed), {}
    cells = [("none", 0.0, None), *((m, d, d * s) for d in sorted(doses) for m, s in arms.items())]
    write = partial(
        written, model=model, tokenizer=tokenizer, decoding=Decoding(max_new_tokens, min(12, max_new_tokens)),
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    limits = fluency_limits(write, n_scenarios)
    prompts = scenario_prompts(heldout(), n_scenarios)
    rows = write([{**p, "method": m, "dose": d, "emotion": emotion} for m, d, _ in cells for p in prompts],
                 [s for *_, s in cells for _ in prompts], title=f"cost of {steerer.name}")  # fmt: skip
    scored = scoring.score_rows(rows, judge, limits)
    groups = [scored[i : i + len(prompts)] for i in range(0, len(scored), len(prompts))]
    return {
        "emotion": emotion,
        "strength": scoring.number(steerer.strength),
        "cells": [
            _cell(group, method, dose, s, model, tokenizer, seed) for group, (method, dose, s) in zip(groups, cells)
        ],
        "n_scenarios": len(prompts),
        "judge": judge.name,
        "model": fingerprint(model)["name"],
        "seed": seed,
        **said,
    }


def fluency_limits(write: Any, n_scenarios: int) -> FluencyThresholds:
    """The coherence gate, fitted on unsteered texts of training scenarios; `write` is `written` with its settings."""
    rows = scenario_prompts(discovery(), max(20, n_scenarios))
    rows = write(rows, [None] * len(rows), title="unsteered")
    return fit_thresholds([r["text"] for r in rows], [r["perplexity"] for r in rows])


def scenario_prompts(scenarios: Any, n: int) -> list[Row]:
    """n scenarios spread over the themes, as rows with their prompt."""
    groups = one_valence(scenarios)
    picked = [groups[round(i)] for i in np.linspace(0, len(groups) - 1, min(n, len(groups)))]
    return [{"skeleton_id": g.skeleton_id, "prompt": completion_prompt(g)} for g in picked]


def written(
    rows: list[Row], steerers: Sequence[Steerer | None], *, model: Any, tokenizer: Any, decoding: Decoding,
    batch_size: int, seed: int, progress: Progress | None, title: str,
) -> list[Row]:  # fmt: skip
    """Rows with their text and its perplexity under the unsteered model."""
    prompts = [r["prompt"] for r in rows]
    texts = generate(
        model, tokenizer, prompts, steerers, decoding=decoding, batch_size=batch_size, seed=seed, progress=progress,
        title=title,
    )  # fmt: skip
    odd = perplexity(model, tokenizer, prompts, texts)
    return [{**row, "text": text, "perplexity": float(p)} for row, text, p in zip(rows, texts, odd)]


def _cell(
    rows: list[Row], method: str, dose: float, steerer: Steerer | None, model: Any, tokenizer: Any, seed: int
) -> Row:
    from .evaluation.judges import corpus_rows

    neutral = [r["text"] for r in corpus_rows() if r["emotion"] == "neutral" and r["style"] == "plain"][:N_NEUTRAL]
    # Neutral texts and items are read, not written: there, a steerer is measured as if it were fully on.
    attach = nullcontext if steerer is None else partial(steerer.steady().attach, model)
    kl = 0.0 if steerer is None else kl_on_neutral(model, tokenizer, neutral, attach)
    texts = [r["text"] for r in rows]
    return {
        "method": method,
        "dose": dose,
        **{name: scoring.interval(rows, key, seed) for name, key in
           (("coherent", "coherent"), ("expression", "expressed"), ("degenerate", "degenerate"))},
        "perplexity": scoring.median(rows),
        "repetition": scoring.number(np.mean([repetition_rate(t) for t in texts])),
        "kl_on_neutral": scoring.number(kl),
        "capability": float(capability(model, tokenizer, attach).mean()),
        "example": texts[0].strip(),
    }  # fmt: skip


def write_card(steerer: Steerer, path: str | Path) -> Path:
    """The steerer's cost card as Markdown with an SVG plot beside it; raises InputError when it has none."""
    from ._card_text import markdown, plot
    from .artefact import write_text_atomic

    path = Path(path)
    if not steerer.cost or "cells" not in steerer.cost:
        raise InputError(f"{steerer.name!r} has no cost card yet; measure one first")
    picture = path.with_suffix(".svg")
    write_text_atomic(picture, plot(steerer.cost))
    return write_text_atomic(path, markdown(steerer, picture.name))
