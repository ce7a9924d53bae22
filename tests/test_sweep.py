"""Sweeps over a trace: complete, resumed after a kill, frugal where the answer is clear, honest about their cost."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from served import tiny

from emocircuits.errors import InputError
from emocircuits.reasoning.engines import Completion, Job, LocalEngine, Sampling
from emocircuits.reasoning.store import RolloutStore
from emocircuits.reasoning.sweep import CLOSING, adaptive, forced, sweep
from emocircuits.reasoning.traces import Rollout, Steps, Trace

TEXT = "We add two. So \\boxed{7} it is. Then we check."
TRACE = Trace("Q: what is 2 + 2?\n", Steps(TEXT, (0, 11, 31, len(TEXT))), truth="q")
SAMPLING = Sampling(8, temperature=5.0, seed=2)
PLACES = [(k, i) for k in range(4) for i in range(3)]


def split(text: str) -> Steps:
    """Steps of four characters."""
    return Steps(text, (*range(0, len(text), 4), len(text)))


class Letters:
    """The answer is the first small letter; it is complete with the second one."""

    def extract(self, text: str) -> str | None:
        return next(iter(re.findall("[a-z]", text)), None)

    def finished(self, text: str) -> bool:
        return len(re.findall("[a-z]", text)) > 1

    def correct(self, answer: str | None, truth: str | None) -> bool | None:
        return None if truth is None else answer == truth


class Boxed(Letters):
    """The answer is what the first box holds."""

    def extract(self, text: str) -> str | None:
        return next(iter(re.findall(r"\\boxed\{(.)", text)), None)

    def finished(self, text: str) -> bool:
        return self.extract(text) is not None


class Scored(Letters):
    """Answers scored by likelihood after a stem."""

    scored, stem = True, "\nAnswer: "
    labels = texts = ("q", "yes", "no")


class Watched:
    """An engine that notes the jobs it is given, and is interrupted after `patience` of them."""

    def __init__(self, engine: Any, patience: int = 10**6) -> None:
        self.engine, self.patience, self.jobs = engine, patience, list[Job]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def complete(self, jobs: Sequence[Job], *rest: Any) -> Iterator[Completion]:
        self.jobs += jobs
        for done in self.engine.complete(jobs, *rest):
            if self.patience == 0:
                raise KeyboardInterrupt
            self.patience -= 1
            yield done


def local() -> LocalEngine:
    return LocalEngine(*tiny("gemma3_text"), batch_size=3)


# ---------------------------------------------------------------- full sweeps


def test_every_boundary_has_its_rollouts_read_for_step_answer_and_truth() -> None:
    found = sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=3, split=split)
    assert [(r.boundary, r.index) for r in found.items] == PLACES
    jobs = [Job(TRACE.prefix(k), k, i) for k, i in PLACES]
    done = {(c.boundary, c.index): c for c in local().complete(jobs, SAMPLING, Letters().finished)}
    for r in found.items:
        c = done[r.boundary, r.index]
        assert (r.text, r.finish, r.n_tokens) == (c.text, c.finish, c.n_tokens)
        assert (r.step, r.answer) == (c.text[:4].strip(), Letters().extract(c.text))
        assert r.correct is (r.answer == "q")
    assert {r.finish for r in found.items} == {"answer", "length"}
    some = sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=2, split=split, boundaries=[3, 1])
    assert some.items == tuple(r for r in found.items if r.boundary in (1, 3) and r.index < 2)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=3, split=split)
    path, first = tmp_path / "r.jsonl", Watched(local(), patience=5)
    with pytest.raises(KeyboardInterrupt):
        sweep(TRACE, first, Letters(), sampling=SAMPLING, n=3, split=split, store=path)
    kept = RolloutStore(path).rollouts(3).items
    assert len(kept) == 5, "what was finished is kept"
    second = Watched(local())
    with Progress(disable=True) as progress:
        found = sweep(TRACE, second, Letters(), sampling=SAMPLING, n=3, split=split, store=path, progress=progress)
        assert [(task.completed, task.total) for task in progress.tasks] == [(7, 7)]
    assert found == whole
    assert len(second.jobs) == 7
    third = Watched(local())
    more = sweep(TRACE, third, Letters(), sampling=SAMPLING, n=4, split=split, store=RolloutStore(path))
    assert [(j.boundary, j.index) for j in third.jobs] == [(k, 3) for k in range(4)]
    assert set(more.items) > set(whole.items)


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}]
import test_sweep as t
class Slow(t.LocalEngine):
    def complete(self, *rest):
        for done in super().complete(*rest):
            time.sleep(0.05)
            yield done
t.sweep(t.TRACE, Slow(*t.tiny("gemma3_text"), batch_size=3), t.Letters(), sampling=t.SAMPLING, n=100, split=t.split,
        store={path!r})
"""


def test_a_killed_process_loses_a_few_rollouts_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 100
        while not path.exists() or path.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, "it must not end before it is killed"
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 7)  # as if the kill had come in the middle of a line
    kept = RolloutStore(path).rollouts(3).items
    assert 15 <= len(kept) < 400
    second = Watched(local())
    found = sweep(TRACE, second, Letters(), sampling=SAMPLING, n=8, split=split, store=path)
    wanted = {(k, i) for k in range(4) for i in range(8)}
    assert {(j.boundary, j.index) for j in second.jobs} == wanted - {(r.boundary, r.index) for r in kept}
    assert found == sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=8, split=split)


def test_errors_are_kept_and_tried_again_by_the_next_call(tmp_path: Path) -> None:
    class Failing(Watched):
        def complete(self, jobs: Sequence[Job], *rest: Any) -> Iterator[Completion]:
            for done in super().complete(jobs, *rest):
                bad = (done.boundary, done.index) == (1, 2)
                yield Completion(1, 2, "", "error", reason="HTTP 500") if bad else done

    path = tmp_path / "r.jsonl"
    found = sweep(TRACE, Failing(local()), Letters(), sampling=SAMPLING, n=3, split=split, store=path)
    assert [r for r in found.items if r.finish == "error"] == [Rollout(1, 2, "", finish="error", reason="HTTP 500")]
    assert len(found.at(1)) == 2
    again = Watched(local())
    mended = sweep(TRACE, again, Letters(), sampling=SAMPLING, n=3, split=split, store=path)
    assert [(j.boundary, j.index) for j in again.jobs] == [(1, 2)]
    assert mended == sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=3, split=split)


def test_what_cannot_work_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    engine, path = Watched(local()), tmp_path / "r.jsonl"
    sweep(TRACE, local(), Letters(), sampling=SAMPLING, n=1, split=split, store=path, boundaries=[0])
    other = Trace("Q: another?\n", TRACE.steps)
    seeded = Sampling(8, temperature=5.0, seed=3)
    for trace, options, message in (
        (other, {"store": path}, "with another trace; choose another path"),
        (TRACE, {"store": path, "sampling": seeded}, "with another sampling"),
        (TRACE, {"boundaries": [4]}, r"a trace of 3 steps has boundaries 0\.\.3, not 4"),
        (TRACE, {"n": 0}, "n must be at least 1, not 0"),
        (Trace("", TRACE.steps), {}, "no prompt to sample from"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(trace, engine, Letters(), split=split, **{"sampling": SAMPLING, **options})
    renamed = LocalEngine(*tiny("gemma3_text"), name="steered by 2")
    with pytest.raises(InputError, match="with another model"):
        sweep(TRACE, renamed, Letters(), sampling=SAMPLING, split=split, store=path)
    with pytest.raises(InputError, match="with another way of answering"):
        sweep(TRACE, engine, Boxed(), sampling=SAMPLING, split=split, store=path)
    with pytest.raises(InputError, match="need the model's logits; use a LocalEngine"):
        sweep(TRACE, Planted([0.5] * 4), Scored(), sampling=SAMPLING, split=split)
    assert engine.jobs == []


# ---------------------------------------------------------------- answers scored, answers forced


def test_scored_answers_are_likelihoods_after_the_continuation() -> None:
    found = sweep(TRACE, local(), Scored(), sampling=SAMPLING, n=2, split=split)
    for r in found.items:
        expected = local().likelihoods(TRACE.prefix(r.boundary) + r.text + Scored.stem, Scored.labels)
        assert r.probabilities == pytest.approx(expected, abs=1e-5)
        assert r.answer == max(expected, key=lambda label: expected[label])
        assert r.correct is (r.answer == "q")
    assert len({tuple(r.probabilities.values()) for r in found.items if r.probabilities}) > 6


def test_forced_answers_are_read_from_the_stem_on_and_never_from_the_prefix(tmp_path: Path) -> None:
    stem, path = "So: \\boxed{", tmp_path / "forced.jsonl"
    found = forced(TRACE, local(), Boxed(), stem, 3, sampling=SAMPLING, store=path)
    assert [(r.boundary, r.index) for r in found.items] == PLACES
    jobs = [Job(TRACE.prefix(k) + CLOSING + stem, k, i) for k, i in PLACES]
    done = {(c.boundary, c.index): c.text for c in local().complete(jobs, SAMPLING, lambda t: len(t) > 0)}
    for r in found.items:
        assert r.text == done[r.boundary, r.index]
        assert r.answer == r.text[:1] != "7"
        assert (r.finish, r.step) == ("answer", "")
    with pytest.raises(InputError, match="with another way of answering"):
        sweep(TRACE, local(), Boxed(), sampling=SAMPLING, split=split, store=path)
    assert forced(TRACE, Watched(local(), 0), Boxed(), stem, 3, sampling=SAMPLING, store=path) == found


def test_forced_answers_that_are_scored_need_no_drawing() -> None:
    engine = local()
    found = forced(TRACE, engine, Scored())
    assert [(r.boundary, r.index, r.text, r.n_tokens) for r in found.items] == [(k, 0, "", 0) for k in range(4)]
    for r in found.items:
        text = TRACE.prefix(r.boundary) + CLOSING + Scored.stem
        assert r.probabilities == pytest.approx(local().likelihoods(text, Scored.labels), abs=1e-5)
    ends = 4 * len(CLOSING + Scored.stem) + 4 * 3 * 3
    assert engine.computed_tokens <= len(TRACE.prompt + TEXT) + 1 + ends, "steps are read once"


# ---------------------------------------------------------------- adaptive sweeps


class Planted:
    """An engine whose rollouts at boundary k say "q" with chance p[k], else "r", in 1 to 5 tokens."""

    identity, computed_tokens = {"name": "planted"}, None

    def __init__(self, p: Sequence[float]) -> None:
        self.p = p

    def complete(self, jobs: Sequence[Job], sampling: Sampling, _: Any = None) -> Iterator[Completion]:
        for job in jobs:
            stream = sampling.stream(job.boundary, job.index)
            said = "q" if stream.random() < self.p[job.boundary] else "r"
            yield Completion(job.boundary, job.index, said, "stop", int(stream.integers(1, 6)))


def planted(p: Sequence[float], truth: str | None = "q", answer: str | None = None) -> tuple[Trace, Planted]:
    text = "step. " * (len(p) - 1)
    return Trace("Q", Steps(text, tuple(range(0, len(text) + 1, 6))), truth=truth, answer=answer), Planted(p)


def counts(rollouts: Any) -> list[int]:
    return [len(rollouts.at(k)) for k in range(rollouts.n + 1)]


@settings(max_examples=20)
@given(
    p=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=2, max_size=6), seed=st.integers(0, 99),
    budget=st.sampled_from([1, 300, 10**6]), batch=st.sampled_from([1, 7, 20]),
)  # fmt: skip
def test_adaptive_rollouts_are_the_first_ones_of_the_full_sweep(
    p: list[float], seed: int, budget: int, batch: int
) -> None:
    trace, engine = planted(p)
    sampling = Sampling(5, seed=seed)
    full = sweep(trace, engine, Letters(), sampling=sampling, n=60, split=split)
    found = adaptive(
        trace, engine, Letters(), sampling=sampling, budget=budget, n=60, batch=batch, split=split, width=0.4
    )
    assert all(found.rollouts.at(k) == full.at(k)[:m] for k, m in enumerate(counts(found.rollouts)))
    assert all(10 <= m <= 60 for m in counts(found.rollouts))
    assert found.spent.rollouts == len(found.rollouts.items)
    assert found.spent.sampled_tokens == sum(r.n_tokens for r in found.rollouts.items)
    least = 5 * 10 * len(p)  # what is sampled everywhere, whatever the budget
    assert found.spent.sampled_tokens <= max(budget, least) + 5 * batch
    for i, effect in enumerate(found.effects):
        vague = effect.high - effect.low > 0.4 or effect.low < -0.2 < effect.high or effect.low < 0.2 < effect.high
        assert vague == (i in found.open)
        if vague and budget == 10**6:
            assert min(counts(found.rollouts)[i : i + 2]) == 60, "a vague step is left only when all is sampled"


def test_adaptive_sweeps_spend_where_a_step_matters_and_find_it() -> None:
    p = [0.05] * 6 + [0.95] * 6
    trace, engine = planted(p)
    found = adaptive(trace, engine, Letters(), sampling=Sampling(5), budget=10**6, split=split)
    anchors = [i for i, effect in enumerate(found.effects) if effect.low > 0.2]
    assert anchors == [5]
    assert found.open == ()
    assert found.spent.rollouts < 0.6 * 100 * len(p)
    assert found.spent.computed_tokens is None


def test_the_budget_goes_to_the_vaguest_steps_first() -> None:
    trace, engine = planted([0.0, 0.0, 0.0, 0.5, 0.5])
    found = adaptive(trace, engine, Letters(), sampling=Sampling(5), budget=420, split=split)
    assert 0.8 * 420 < found.spent.sampled_tokens <= 420 + 50
    assert min(counts(found.rollouts)[3:]) > max(counts(found.rollouts)[:2])
    assert found.open


@pytest.mark.parametrize(("truth", "answer", "target"), [("q", None, "q"), (None, "r", "r"), (None, None, "q")])
def test_importance_is_about_truth_or_else_the_given_or_else_the_usual_answer(
    truth: str | None, answer: str | None, target: str
) -> None:
    trace, engine = planted([0.6, 0.6, 1.0], truth, answer)
    found = adaptive(trace, engine, Letters(), sampling=Sampling(5), budget=10**6, n=40, split=split)
    for i, effect in enumerate(found.effects):
        before, after = ([r.answer == target for r in found.rollouts.at(k)] for k in (i, i + 1))
        assert effect.estimate == pytest.approx(sum(after) / len(after) - sum(before) / len(before))
        assert effect.low < effect.estimate < effect.high


def test_a_resumed_adaptive_sweep_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    trace, engine = planted([0.2, 0.5, 0.9])
    path, options = tmp_path / "r.jsonl", {"sampling": Sampling(5), "budget": 500, "split": split}
    whole = adaptive(trace, engine, Letters(), **options)
    with pytest.raises(KeyboardInterrupt):
        adaptive(trace, Watched(engine, patience=70), Letters(), store=path, **options)
    assert adaptive(trace, engine, Letters(), store=path, **options) == whole
    known = Watched(engine)
    assert adaptive(trace, known, Letters(), store=path, **options) == whole
    assert known.jobs == []
    sweep(trace, engine, Letters(), sampling=Sampling(5), n=100, split=split, store=path)
    assert adaptive(trace, known, Letters(), store=path, **options) == whole, "what else is there changes nothing"


def test_computed_tokens_are_those_of_this_run() -> None:
    engine = local()
    sweep(TRACE, engine, Letters(), sampling=SAMPLING, n=1, split=split)
    before = engine.computed_tokens
    found = adaptive(TRACE, engine, Letters(), sampling=SAMPLING, budget=10**5, n=12, split=split)
    assert found.spent.computed_tokens == engine.computed_tokens - before
    assert 0 < found.spent.computed_tokens < found.spent.sampled_tokens + 40, "a known prefix costs its last token"
