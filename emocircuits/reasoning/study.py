"""`emocircuits anchors`: which steps of a model's reasoning carry its answer, and which carry the emotion.

Every trace is a stage of the run folder with a rollout store of its own, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from .. import artefact
from .._figures import number
from ..data.emotions import EKMAN6
from ..data.problems import ANSWER_STEM, Problem, few_shot_prompt, load_problems
from ..directions import DirectionSet
from ..errors import InputError, unknown
from ..models.fingerprint import fingerprint
from ..models.load import Loaded
from ..multimodal.balance import Answers as Scored
from ..runs import Run
from . import parts as saved
from .answers import LikelihoodAnswers
from .emotion import carried, push_steps
from .engines import Job, LocalEngine, Sampling
from .findings import markdown, page, summary
from .importance import Similarity, accuracy_along, answer_shares, importance
from .receivers import attention_blocks, kurtosis, vertical_scores
from .source import is_scored
from .steps import read_trace
from .suppression import suppression_matrix
from .sweep import CLOSING, forced, sweep
from .tokens import trace_tokens
from .traces import Steps, Trace

SOURCES = ("model", "written")
NEXT_PROBLEM = "\nSituation:"
LEAST, MOST = 4, 12
"""Steps of a sampled trace, the one that names the answer left out."""


@dataclass(frozen=True)
class Plan:
    """All that determines a run. doses in residual norms; receivers look back at least `distance` steps."""

    rollouts: int = 12
    max_new_tokens: int = 96
    temperature: float = 0.6
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    closing: str = CLOSING
    stem: str = ""
    by: str = "sentence"
    min_chars: int = 10
    distance: int = 2
    doses: tuple[float, ...] = (-0.08, -0.04, 0.04, 0.08)
    controls: int = 2
    n_boot: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rollouts < 0:
            raise InputError(f"rollouts must be 0 (only what needs none) or more, not {self.rollouts}")

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, seed=self.seed, stop=self.stop)


def emotional_plan(plan: Plan | None = None) -> Plan:
    """A plan for the project's own problems: the few-shot format ends reasoning, and steps are sentences."""
    return replace(plan or Plan(), stop=(ANSWER_STEM, NEXT_PROBLEM), closing="", min_chars=2, distance=1)


def emotional_answers() -> LikelihoodAnswers:
    """The judgement as the likelihood of each of the six emotions behind the answer's stem."""
    return LikelihoodAnswers(EKMAN6, ANSWER_STEM)


def problem_traces(
    loaded: Loaded, plan: Plan, n: int | None = None, source: str = "model", *, tries: int = 6,
    progress: Progress | None = None,
) -> list[Trace]:  # fmt: skip
    """Traces of `n` emotional-reasoning problems (None: all) that the plan's seed draws, under a few-shot prompt.

    source: "model" samples its reasoning and cuts it before the step that names the answer, which would only be copied
    (the first of `tries` that leaves enough steps; a problem without one is left out). "written" takes the hand-written
    solutions without their conclusion and without what they rule out.
    """
    if source not in SOURCES:
        raise unknown("source of traces", source, SOURCES)
    shots, problems = load_problems("shot"), load_problems()
    rng = np.random.default_rng(plan.seed)
    chosen = [problems[i] for i in sorted(rng.permutation(len(problems))[: n or len(problems)])]
    prompts = {p.id: few_shot_prompt(p, shots, plan.seed) for p in chosen}
    if source == "written":
        return [_written(p, prompts[p.id]) for p in chosen]
    engine = LocalEngine(loaded.model, loaded.tokenizer, batch_size=16)
    jobs = [Job(prompts[p.id], i, k) for i, p in enumerate(chosen) for k in range(tries)]
    task = progress.add_task("reasoning", total=len(jobs)) if progress else None
    texts: dict[tuple[int, int], str] = {}
    for done in engine.complete(jobs, plan.sampling):
        if done.finish == "stop":
            texts[done.boundary, done.index] = done.text
        if progress is not None and task is not None:
            progress.advance(task)
    found = (
        _sampled(p, prompts[p.id], [texts.get((i, k), "") for k in range(tries)], plan) for i, p in enumerate(chosen)
    )
    return [trace for trace in found if trace is not None]


def _written(problem: Problem, prompt: str) -> Trace:
    """Without the conclusion, which names the answer, and without what was ruled out, which a small model repeats."""
    kept = [(s, k) for s, k in zip(problem.sentences, problem.labels) if k not in ("alternative", "conclusion")]
    steps = Steps.of(f" {sentence}" for sentence, _ in kept)
    return Trace(prompt, steps, truth=problem.answer, labels=tuple(k for _, k in kept), id=problem.id)


def _sampled(problem: Problem, prompt: str, texts: Sequence[str], plan: Plan) -> Trace | None:
    """The first text with enough steps before the one that names its answer, which becomes the ending."""
    for text in filter(str.strip, texts):
        trace = read_trace(prompt, text, truth=problem.answer, id=problem.id, by=plan.by, min_chars=plan.min_chars)
        n, answer = len(trace), next(iter(_named(trace.steps.texts[-1])), None)
        if answer is None or not LEAST < n <= MOST:
            continue
        cut = trace.steps.bounds[n - 1]
        steps = Steps(trace.steps.text[:cut], trace.steps.bounds[:n])
        return replace(trace, steps=steps, ending=trace.steps.text[cut:], answer=answer)
    return None


def _named(text: str) -> list[str]:
    """The emotions that a text names, in its order."""
    return re.findall(rf"\b(?:{'|'.join(EKMAN6)})\b", text.casefold())


# ---------------------------------------------------------------- one trace


def measure(
    loaded: Loaded, trace: Trace, answers: Any, plan: Plan, *, directions: DirectionSet | None = None,
    layer: int | None = None, store: Path | None = None, similarity: Similarity | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one trace, as `parts.read` gives it: black box, white box and, with directions, emotion."""
    model, tokenizer = loaded.model, loaded.tokenizer
    engine = LocalEngine(model, tokenizer)
    found: dict[str, Any] = {
        "id": trace.id, "steps": list(trace.steps.texts), "labels": list(trace.labels or ()), "truth": trace.truth,
        "answer": trace.answer, "named": [len(_named(s)) for s in trace.steps.texts],
    }  # fmt: skip
    short = replace(plan.sampling, max_new_tokens=min(32, plan.max_new_tokens))
    asked = forced(
        trace, engine, answers, plan.stem, max(plan.rollouts, 1), sampling=short, closing=plan.closing,
        store=_beside(store, "forced"),
    )  # fmt: skip
    found["forced"] = {
        "shares": _lists(answer_shares(asked)),
        "kl": importance(trace, asked, "forced", n_boot=plan.n_boot, seed=plan.seed).rows(),
    }
    if plan.rollouts:
        rolled = sweep(trace, engine, answers, sampling=plan.sampling, n=plan.rollouts, store=store, progress=progress)
        found["sampled"] = {"shares": _lists(answer_shares(rolled)), "tokens": sum(r.n_tokens for r in rolled.items)}
        for kind in ("resampling", "counterfactual"):
            rows = importance(trace, rolled, kind, similarity=similarity, n_boot=plan.n_boot, seed=plan.seed).rows()
            found["sampled"][kind] = rows
        if trace.truth is not None:
            rows = importance(trace, rolled, metric="accuracy", n_boot=plan.n_boot, seed=plan.seed).rows()
            found["sampled"]["accuracy"] = rows
            found["sampled"]["right"] = accuracy_along(rolled).tolist()
    found |= _inside(model, tokenizer, trace, plan, answers)
    if directions is not None and layer is not None:
        found["emotion"] = _emotion(
            model, tokenizer, trace, plan, answers, directions, layer, found["forced"]["shares"]
        )
    return _clean(found)


def _inside(model: Any, tokenizer: Any, trace: Trace, plan: Plan, answers: Any) -> dict[str, Any]:
    """Receiver scores of every head, and what hiding a step does to later ones and to the answer."""
    stem = plan.closing + (answers.stem if is_scored(answers) else plan.stem)
    ids, bounds = trace_tokens(tokenizer, trace, stem)
    blocks = attention_blocks(model, ids, bounds)
    scores = vertical_scores(blocks, plan.distance)
    # One more token stands for the answer, so that what predicts it is scored; its stem is a step of its own.
    ends = (len(ids), len(ids) + 1) if stem else (len(ids) + 1,)
    hidden, n = suppression_matrix(model, [*ids, ids[-1]], (*bounds, *ends)), len(trace)
    return {
        "tokens": [b - a for a, b in pairwise(bounds)],
        "receivers": {"kurtosis": kurtosis(scores).tolist(), "vertical": scores.float().numpy()},
        "suppression": {
            "kl": saved.Lower.of(hidden.kl[:n, :n].numpy()),
            "on_answer": hidden.kl[-1, :n].tolist(),
            "noise": hidden.noise,
        },
    }


def _emotion(
    model: Any, tokenizer: Any, trace: Trace, plan: Plan, answers: Any, directions: DirectionSet, layer: int,
    shares: dict[str, list[float]],
) -> dict[str, Any]:  # fmt: skip
    """What steps carry, and a push of each towards the emotion that the judgement holds for next best."""
    carry = carried(model, tokenizer, trace, directions, layer)
    final = {e: shares[e][-1] for e in directions.emotions if e in shares}
    first, second = sorted(final, key=lambda e: -final[e])[:2]
    scored = Scored.of_words(tokenizer, dict(zip(answers.labels, answers.texts)))
    near = [x for x in directions.layers if abs(x - layer) <= 2]
    push = push_steps(
        model, tokenizer, trace, directions, second, scored, plan.closing + answers.stem, doses=plan.doses, layers=near,
        n_controls=plan.controls, seed=plan.seed,
    )  # fmt: skip
    return {
        "layer": layer, "emotions": list(directions.emotions), "carried": carry.tolist(), "judged": first,
        "pushed": second, "doses": list(push.doses), "odds": push.odds.tolist(), "everywhere": push.everywhere.tolist(),
        "control": push.control.tolist(), "control_everywhere": push.control_everywhere.tolist(), "clean": push.clean,
    }  # fmt: skip


# ---------------------------------------------------------------- all of them


def run_anchors(
    loaded: Loaded, traces: Sequence[Trace], answers: Any, out: str | Path, plan: Plan, *,
    directions: DirectionSet | None = None, layer: int | None = None, progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Measure every trace and write anchors.json and report.html into `out`; returns the page.

    directions: with them (and answers scored by likelihood over their emotions) steps are read and pushed, at `layer`
    (default: the middle one). Raises InputError, before any work, for no traces, two of one id, one of a single step,
    and directions without scored answers.
    """
    names = _checked(traces)
    if directions is not None:
        if not is_scored(answers):
            raise InputError("reading and pushing emotions needs answers that are scored; leave the directions out")
        layer = directions.layers[len(directions.layers) // 2] if layer is None else layer
        directions.slots(layer)
    told = [[t.prompt, t.steps.text, list(t.steps.bounds), t.truth, t.labels] for t in traces]
    settings = {
        "kind": "anchors", "model": fingerprint(loaded.model), "plan": asdict(plan), "traces": _digest(told),
        "answers": repr(answers), "layer": layer,
        "directions": None if directions is None else _digest([directions.emotions, directions.vectors.tolist()]),
    }  # fmt: skip
    run = Run(out, settings)
    similarity = Similarity()
    task = progress.add_task("traces", total=len(traces)) if progress else None
    parts = []
    for name, trace in zip(names, traces):
        stage = f"trace_{_file_name(name)}"
        store = run.file(f"{stage}.rollouts.jsonl")
        parts.append(
            _stage(
                run, stage,
                lambda t=trace, s=store: measure(
                    loaded, t, answers, plan, directions=directions, layer=layer, store=s, similarity=similarity
                ),
            )
        )  # fmt: skip
        if progress is not None and task is not None:
            progress.advance(task)
    found = run.json_stage("anchors", lambda: _clean(summary(parts, plan.seed)))
    artefact.write_text_atomic(run.file("anchors.md"), markdown(found, loaded.name))
    return artefact.write_text_atomic(run.file("report.html"), page(found, parts, loaded.name))


def _stage(run: Run, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A trace as a stage: measured once, and read from its files."""
    file = run.file(f"{name}.json")
    files = [file.name, saved.matrices(file).name]
    return run.stage(name, files, lambda: saved.write(file, make()), lambda: saved.read(file))


def _checked(traces: Sequence[Trace]) -> list[str]:
    """The traces' names; InputError for traces that cannot be measured."""
    if not traces:
        raise InputError("there are no traces to measure")
    names = [t.id or str(i) for i, t in enumerate(traces)]
    if len(set(names)) < len(names):
        raise InputError("two traces have the same id; ids must be unique")
    for name, trace in zip(names, traces):
        if len(trace) < 2:
            raise InputError(f"trace {name!r} has one step only, and steps act on one another; leave it out")
    return names


def emotion_directions(loaded: Loaded, seed: int = 0, progress: Progress | None = None) -> tuple[DirectionSet, int]:
    """Directions of the six emotions from the project's replies, and the layer that left-out themes choose."""
    from .. import quality
    from ..data.scenarios import discovery
    from ..directions import fit_examples
    from ..examples import reply_examples

    examples = reply_examples(discovery(), EKMAN6)
    made, features = fit_examples(loaded.model, loaded.tokenizer, examples, EKMAN6, seed=seed, progress=progress)
    return made, made.layers[int(np.argmax(quality.across_themes(features, EKMAN6, seed=seed)))]


def _beside(store: Path | None, name: str) -> Path | None:
    return None if store is None else store.with_suffix(f".{name}.jsonl")


def _lists(shares: dict[str, Any]) -> dict[str, list[float]]:
    return {answer: curve.tolist() for answer, curve in shares.items()}


def _clean(value: Any) -> Any:
    """The same with None for NaN, as JSON has it."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _clean(value.tolist())
    return number(value) if isinstance(value, float) else value


def _digest(value: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _file_name(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80]
    return kept if kept == name else f"{kept}_{_digest(name)[:8]}"
