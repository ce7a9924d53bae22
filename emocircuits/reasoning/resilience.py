"""Does a step's content come back when it is taken out? Sample on, cut where it returns, and sample again.

Thought Branches (arXiv 2510.27484): a step that the model would say anyway looks unimportant when it is resampled once.
Here a rollout that says it again is cut before that sentence, until it stays away or patience ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .engines import Engine, Job, Sampling
from .importance import Similarity
from .source import answered
from .steps import split
from .traces import Rollout, Rollouts, Steps, Trace


@dataclass(frozen=True)
class Resilience:
    """How often the content of step `step` came back.

    rounds [n]: returns in each rollout before it stayed away, `max_rounds` where it never did. rollouts: those where it
    did, at the step's boundary, each the whole text from there on. errors: rollouts that the engine failed on.
    """

    step: int
    rounds: NDArray[np.int64]
    max_rounds: int
    rollouts: tuple[Rollout, ...]
    errors: tuple[Rollout, ...] = ()

    @property
    def mean_rounds(self) -> float:
        """Mean number of returns; a lower bound where some never stayed away. NaN when every rollout failed."""
        return float(self.rounds.mean()) if len(self.rounds) else float("nan")

    @property
    def persistent(self) -> float:
        """Share of rollouts in which the content always came back."""
        return float((self.rounds >= self.max_rounds).mean()) if len(self.rounds) else float("nan")

    def instead_of(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with those at this step's boundary replaced: `importance` of them is the resilient one."""
        others = tuple(r for r in rollouts.items if r.boundary != self.step)
        return Rollouts(rollouts.n, (*others, *self.rollouts))


def resilience(
    trace: Trace,
    step: int,
    engine: Engine,
    answers: Any,
    *,
    sampling: Sampling,
    n: int = 20,
    max_rounds: int = 5,
    tau: float = 0.8,
    similarity: Similarity | None = None,
    cut: Callable[[str], Steps] = split,
) -> Resilience:
    """Sample `n` rollouts from before a step and cut each where a sentence of cosine >= tau with the step returns.

    A rollout draws from its own stream in every round, so that the result depends on the seed alone. Raises InputError
    for a step that is not there.
    """
    if not 0 <= step < len(trace):
        raise InputError(f"a trace of {len(trace)} steps has steps 0..{len(trace) - 1}, not {step}")
    if n < 1 or max_rounds < 1:
        raise InputError(f"n and max_rounds must be at least 1, not {n} and {max_rounds}")
    similarity, start, target = similarity or Similarity(), trace.prefix(step), trace.steps.texts[step]
    kept = dict.fromkeys(range(n), "")  # what each rollout has said that is not the step
    tokens, rounds = dict.fromkeys(range(n), 0), np.zeros(n, dtype=np.int64)
    away: dict[int, Rollout] = {}
    failed: dict[int, Rollout] = {}
    for turn in range(max_rounds):
        jobs = [Job(start + text, step, turn * n + i) for i, text in kept.items()]
        for done in engine.complete(jobs, sampling, getattr(answers, "finished", None)):
            i = done.index - turn * n
            if done.finish == "error":
                failed[i] = Rollout(step, i, kept.pop(i), finish="error", reason=done.reason)
                continue
            tokens[i] += done.n_tokens
            at = _returns(done.text, target, cut, similarity, tau)
            if at is not None:
                rounds[i] += 1
                kept[i] += done.text[:at]
                continue
            text = kept.pop(i) + done.text
            found = answered(engine, answers, start, text, trace.truth)
            first = cut(text).texts[0] if text.strip() else ""
            away[i] = Rollout(step, i, text, first, finish=done.finish, n_tokens=tokens[i], **found)
        if not kept:
            break
    whole = [i for i in range(n) if i not in failed]
    ordered = tuple(away[i] for i in sorted(away))
    return Resilience(step, rounds[whole], max_rounds, ordered, tuple(failed[i] for i in sorted(failed)))


def _returns(text: str, target: str, cut: Callable[[str], Steps], similarity: Similarity, tau: float) -> int | None:
    """Where the first sentence like the target begins in a text; None where there is none."""
    if not text.strip():
        return None
    steps = cut(text)
    like = np.flatnonzero(similarity.to(target, steps.texts) >= tau)
    return steps.bounds[like[0]] if len(like) else None
