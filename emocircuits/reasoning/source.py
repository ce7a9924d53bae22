"""One rollout after the other: from a store where it is there, else from an engine, read for its answer, and stored."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from rich.progress import Progress

from ..errors import InputError
from .engines import Completion, Job, Sampling
from .store import Key, RolloutStore
from .traces import Rollout, Rollouts, Steps, Trace

FLUSH_ROLLOUTS, FLUSH_SECONDS = 16, 2.0
"""How much may be lost when a process is killed."""

Splitter = Callable[[str], Steps]


@dataclass(eq=False)
class Source:
    """Rollouts of one trace by (boundary, index): from the store, or sampled and put there.

    closing and stem follow every prefix; with `forced` they make it say its answer, and only that is kept. Raises
    InputError before anything is sampled for what cannot work, and for a store that was made from something else.
    """

    trace: Trace
    engine: Any
    answers: Any
    sampling: Sampling
    store: Any = None
    split: Splitter | None = None
    progress: Progress | None = None
    closing: str = ""
    stem: str = ""
    forced: bool = False
    _held: dict[Key, Rollout] = field(default_factory=dict)
    _task: Any = None

    def __post_init__(self) -> None:
        self.scored = is_scored(self.answers)
        if self.split is None and not self.forced:
            from .steps import split

            self.split = split
        if self.scored and not hasattr(self.engine, "likelihoods"):
            raise InputError("answers scored by likelihood need the model's logits; use a LocalEngine")
        if not self.trace.prompt:
            raise InputError("the trace has no prompt to sample from; give what the model saw before the reasoning")
        if self.store is not None:
            self.store = self.store if isinstance(self.store, RolloutStore) else RolloutStore(self.store)
            self.store.claim(self._made_from())

    def get(self, keys: Sequence[Key]) -> Rollouts:
        """The rollouts of these keys, sampled where they are missing."""
        if self.store is not None:
            held = {(r.boundary, r.index): r for r in self.store.rollouts(len(self.trace)).items}
            self._held |= {key: r for key, r in held.items() if key not in self._held and r.finish != "error"}
        missing = [key for key in keys if key not in self._held]
        if missing:
            self._sample(missing)
        return Rollouts(len(self.trace), tuple(self._held[key] for key in keys))

    def _sample(self, keys: Sequence[Key]) -> None:
        fresh: list[Rollout] = []
        flushed = time.monotonic()
        self._announce(len(keys))
        try:
            with contextlib.closing(self._completions(keys)) as completions:
                for rollout in map(self._rollout, completions):
                    self._held[rollout.boundary, rollout.index] = rollout
                    fresh.append(rollout)
                    if self.progress is not None:
                        self.progress.advance(self._task)
                    if len(fresh) >= FLUSH_ROLLOUTS or time.monotonic() - flushed > FLUSH_SECONDS:
                        self._flush(fresh)
                        flushed = time.monotonic()
        finally:  # also when interrupted: what is finished is kept
            self._flush(fresh)

    def _flush(self, fresh: list[Rollout]) -> None:
        if self.store is not None and fresh:
            self.store.add(fresh)
        fresh.clear()

    def _announce(self, n: int) -> None:
        if self.progress is None:
            return
        if self._task is None:
            self._task = self.progress.add_task("rollouts", total=0)
        known = next(task.total for task in self.progress.tasks if task.id == self._task)
        self.progress.update(self._task, total=(known or 0) + n)

    def _prefix(self, boundary: int) -> str:
        return self.trace.prefix(boundary) + self.closing + ("" if self.scored else self.stem)

    def _completions(self, keys: Sequence[Key]) -> Generator[Completion, None, None]:
        if self.scored and self.forced:  # nothing to draw: the answer is scored where the reasoning is closed
            yield from (Completion(boundary, index, "", "answer") for boundary, index in keys)
            return
        prefixes = {boundary: self._prefix(boundary) for boundary in dict.fromkeys(k for k, _ in keys)}
        jobs = [Job(prefixes[boundary], boundary, index) for boundary, index in keys]
        ends = getattr(self.answers, "finished", None)
        finished = None if ends is None else lambda text: ends(self.stem + text)
        yield from self.engine.complete(jobs, self.sampling, finished)

    def _rollout(self, done: Completion) -> Rollout:
        rollout = Rollout(
            done.boundary, done.index, done.text, finish=done.finish, n_tokens=done.n_tokens, reason=done.reason
        )
        if done.finish == "error":
            return rollout
        step = "" if self.forced else self._first_step(done.text)
        before = self._prefix(done.boundary)
        return replace(rollout, step=step, **answered(
            self.engine, self.answers, before, done.text, self.trace.truth, stem=self.stem, keep=self.forced
        ))  # fmt: skip

    def _first_step(self, text: str) -> str:
        return self.split(text).texts[0] if self.split is not None and text.strip() else ""

    def _made_from(self) -> dict[str, Any]:
        """What another store must not be mixed with, by the name that the error gives it."""
        steps = self.trace.steps
        told = repr((self.trace.prompt, steps.text, steps.bounds, self.trace.truth))
        rule: dict[str, Any] = {"stem": self.stem, "closing": self.closing, "forced": self.forced}
        if self.scored:
            rule |= {"stem": self.answers.stem, "labels": list(self.answers.labels)}
        rule["answers"] = repr(self.answers) if is_dataclass(self.answers) else type(self.answers).__name__
        return {
            "trace": hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest(),
            "sampling": asdict(self.sampling),
            "model": dict(self.engine.identity),
            "way of answering": rule,
        }


def answered(
    engine: Any, answers: Any, before: str, text: str, truth: str | None, *, stem: str = "", keep: bool = False
) -> dict[str, Any]:
    """The fields answer, correct and probabilities of a continuation `text` of what stood `before`."""
    chances = None
    if is_scored(answers):
        found = engine.likelihoods(before + text + answers.stem, answers.texts, keep=keep)
        chances = dict(zip(answers.labels, found.values()))
        answer = max(chances, key=lambda label: chances[label])
    else:
        answer = answers.extract(stem + text)
    return {"answer": answer, "correct": answers.correct(answer, truth), "probabilities": chances}


def is_scored(answers: Any) -> bool:
    """Whether answers are scored by the likelihood of their labels instead of drawn."""
    return bool(getattr(answers, "scored", False))
