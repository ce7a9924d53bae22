"""Would other texts have given the same circuit? Rediscovery from other scenarios, other wordings, another reading.

Each time directions and units are found anew, by direct effect, and the members compared: overlap in excess of chance,
0 is chance and 1 identity, for each emotion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .circuits.assemble import KINDS, Circuit, overlap, top
from .circuits.units import collect
from .data.prompts import wordings_for
from .demo import spread
from .directions import fit
from .evaluation import scoring
from .examples import prompt_examples, reply_examples
from .reading import Example, read

if TYPE_CHECKING:
    from .circuit_study import CircuitStudy

N_SPLITS = 2


def stability(study: CircuitStudy) -> dict[str, Any]:
    """The content of stability.json: rows of what changed, with the excess overlap of heads and neurons."""
    demo, n = study.demo, study.plan.n_stability
    emotions = demo.plan.emotions
    replies = lambda scenarios: _found(study, reply_examples(spread(scenarios, n), emotions), "response_mean")  # noqa: E731
    splits = []
    for seed in range(demo.plan.seed, demo.plan.seed + N_SPLITS):
        a, b = demo.train.split("scenario", 0.5, seed)
        splits.append((replies(a), replies(b)))
    same = spread(demo.train, n)
    asked = [_found(study, prompt_examples(same, emotions, [w]), "last_prompt") for w in wordings_for(emotions)]
    shown = replies(same)
    rows = [
        _row(study, "scenarios (random halves, two seeds)", splits),
        _row(study, "wording of the prompt that asks for the emotion", list(combinations(asked, 2))),
        _row(study, "replies in the emotion against prompts that ask for it", [(shown, w) for w in asked]),
    ]
    return {"rows": rows, "n_scenarios": len(same)}


def _found(study: CircuitStudy, examples: Sequence[Example], position: str) -> dict[str, Circuit]:
    """Circuits by direct effect from these texts alone, of the size that steers."""
    demo = study.demo
    model, tokenizer = demo.loaded
    emotions, norms = demo.plan.emotions, demo.norms()
    features = read(model, tokenizer, examples, position=position, progress=demo.progress)
    directions = fit(features, emotions, norms=norms, seed=demo.plan.seed)
    units = collect(model, tokenizer, examples, directions, position=position, progress=demo.progress)
    heads, neurons = units.heads() / norms[:, None], units.neurons() / norms[:, None]
    return {e: top(e, heads[i], neurons[i], *study.counts()) for i, e in enumerate(emotions)}


def _row(
    study: CircuitStudy, what: str, pairs: Sequence[tuple[Mapping[str, Circuit], Mapping[str, Circuit]]]
) -> dict[str, Any]:
    """Mean excess overlap over pairs, by kind: over all emotions and for the least stable one."""
    row: dict[str, Any] = {"what": what, "n_pairs": len(pairs)}
    for kind, scores in zip(KINDS, study.scores()):
        by_emotion = {
            e: float(np.mean([overlap(a[e], b[e], kind, scores[0].numel())["excess"] for a, b in pairs]))
            for e in study.demo.plan.emotions
        }
        least = min(by_emotion, key=by_emotion.__getitem__)
        row[kind] = {
            "excess": scoring.number(np.mean(list(by_emotion.values()))), "least": scoring.number(by_emotion[least]),
            "least_emotion": least,
        }  # fmt: skip
    return row
