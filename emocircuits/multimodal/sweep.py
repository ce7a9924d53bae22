"""How answers move as attention is reallocated: a few ways to move it, each at several strengths.

Nothing here knows in which direction a model should be moved, so all are tried; `balance` says what drives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..models.spans import ModalitySpans
from ..steering.policies import Multiply, Policy, Transfer
from ..steering.reallocation import Reallocation
from .balance import Answers, spans_of

LESS = (0.5, 0.1, 0.01, 0.0)
MORE = (2.0, 10.0, 100.0)
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Way:
    """One way to reallocate attention: what it is called, and its policy at each strength, weakest first."""

    name: str
    strengths: tuple[float, ...]
    policy: Callable[[float], Policy]


def ways(names: Sequence[str]) -> list[Way]:
    """Less and more attention to each modality, and attention moved between every two of them."""
    found = []
    for name in names:
        found.append(Way(f"attention to {name}, less: times", LESS, lambda s, n=name: Multiply({n: s})))
        found.append(Way(f"attention to {name}, more: times", MORE, lambda s, n=name: Multiply({n: s})))
    for a, b in permutations(names, 2):
        found.append(Way(f"share of {a}'s attention to {b}", SHARES, lambda s, a=a, b=b: Transfer(a, b, s)))
    return found


@torch.no_grad()
def sweep(
    model: Any,
    inputs: Mapping[str, Any],
    answers: Answers,
    tried: Sequence[Way] | None = None,
    spans: ModalitySpans | None = None,
    *,
    queries: str = "after",
) -> dict[str, Tensor]:
    """{way: [strengths, B, A]} probability of each answer among all answers; one forward pass per strength.

    tried: all of `ways` by default. queries: which of them look elsewhere, as in `Reallocation`. Raises InputError for
    prompts without spans.
    """
    found = spans_of(model, inputs, spans)
    result = {}
    for way in ways(found.present()) if tried is None else tried:
        rows = []
        for strength in way.strengths:
            with Reallocation(way.policy(strength), queries=queries).attach(model, found):
                rows.append(answers.scores(model, inputs).exp().cpu())
        result[way.name] = torch.stack(rows)
    return result
