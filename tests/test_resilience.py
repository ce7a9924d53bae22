"""Resilience: content that comes back is cut away until it stays away; by a scripted engine and a real one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from organisms import TOKENS, planted
from test_importance import axis

from emocircuits.errors import InputError
from emocircuits.reasoning.answers import Labels
from emocircuits.reasoning.engines import Completion, Job, LocalEngine, Sampling
from emocircuits.reasoning.importance import Similarity, importance
from emocircuits.reasoning.resilience import resilience
from emocircuits.reasoning.steps import split
from emocircuits.reasoning.traces import Rollout, Rollouts, Steps, Trace

TRACE = Trace("Q: ", split("Xenia lies. So she runs. Then home.", min_chars=1), truth="fear")
SAMPLING, ANSWERS, SIMILAR = Sampling(20), Labels(("fear", "joy")), Similarity(axis)


def cut(text: str) -> Steps:
    return split(text, min_chars=1)


class Scripted:
    """Says what its script has for each round and index; notes the prefixes that it was given."""

    def __init__(self, rounds: Sequence[Sequence[str]]) -> None:
        self.rounds, self.prefixes = rounds, list[str]()

    def complete(self, jobs: Sequence[Job], *_: Any) -> Iterator[Completion]:
        n = len(self.rounds[0])
        for job in jobs:
            self.prefixes.append(job.prefix)
            text = self.rounds[job.index // n][job.index % n]
            error = text == "!"
            yield Completion(job.boundary, job.index, text, "error" if error else "stop", 3, "503" if error else "")


def test_content_that_returns_is_cut_until_it_stays_away() -> None:
    engine = Scripted([
        ["Sun is out. Answer: joy\n", "Well then. Sun sets. Answer: fear\n", "!"],
        ["We rest. Answer: joy\n", " Still she runs. Answer: fear\n", ""],
        ["", " Home now. Answer: fear\n", ""],
    ])  # fmt: skip
    found = resilience(TRACE, 1, engine, ANSWERS, sampling=SAMPLING, n=3, similarity=SIMILAR, cut=cut)  # type: ignore[arg-type]
    assert found.rounds.tolist() == [1, 2]
    assert found.mean_rounds == 1.5
    assert found.persistent == 0
    start = TRACE.prefix(1)
    assert engine.prefixes == [start, start, start, start, start + "Well then.", start + "Well then."]
    assert [(r.text, r.answer, r.correct, r.n_tokens) for r in found.rollouts] == [
        ("We rest. Answer: joy\n", "joy", False, 6), ("Well then. Home now. Answer: fear\n", "fear", True, 9),
    ]  # fmt: skip
    assert [(r.index, r.reason) for r in found.errors] == [(2, "503")]


def test_content_that_never_stays_away_is_persistent() -> None:
    engine = Scripted([["She runs. Answer: fear\n"]] * 4)
    found = resilience(TRACE, 1, engine, ANSWERS, sampling=SAMPLING, n=1, max_rounds=4, similarity=SIMILAR, cut=cut)  # type: ignore[arg-type]
    assert (found.rounds.tolist(), found.persistent, found.rollouts) == ([4], 1.0, ())


def test_importance_without_the_content() -> None:
    """Resampled once, the step seems not to matter, for the model says it again; without its content it does."""

    def rolled(k: int, answers: str) -> list[Rollout]:
        names = {"f": "fear", "j": "joy"}
        return [Rollout(k, i, "", "She runs.", names[a], a == "f") for i, a in enumerate(answers)]

    once = Rollouts(3, (*rolled(1, "ffff"), *rolled(2, "ffff")))
    engine = Scripted([["She runs. Answer: fear\n"] * 4, ["Oh well. Answer: joy\n"] * 4])
    found = resilience(TRACE, 1, engine, ANSWERS, sampling=SAMPLING, n=4, similarity=SIMILAR, cut=cut)  # type: ignore[arg-type]
    assert importance(TRACE, once, metric="accuracy").value[1] == 0
    assert importance(TRACE, found.instead_of(once), metric="accuracy").value[1] == 1


def test_a_real_engine_repeats_under_its_seed() -> None:
    trace = Trace("w9 w10", split(" w7 w0. w6 w1. w8 w2.", min_chars=1))
    engine = LocalEngine(planted().model, TOKENS)
    similarity = Similarity(lambda texts: np.eye(8)[[len(t) % 8 for t in texts]])
    options: dict[str, Any] = {"sampling": Sampling(6, 1.0, 1.0), "n": 6, "max_rounds": 3, "similarity": similarity}
    a, b = (resilience(trace, 1, engine, ANSWERS, **options, cut=cut) for _ in range(2))
    assert (a.rounds.tolist(), a.rollouts) == (b.rounds.tolist(), b.rollouts)
    assert len(a.rollouts) + round(a.persistent * 6) == 6


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match=r"has steps 0\.\.2, not 3"):
        resilience(TRACE, 3, Scripted([[""]]), ANSWERS, sampling=SAMPLING)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1, not 0 and 5"):
        resilience(TRACE, 0, Scripted([[""]]), ANSWERS, sampling=SAMPLING, n=0)  # type: ignore[arg-type]
