"""What `emocircuits anchors` does with its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..artefact import read_jsonl
from ..demo import bars
from ..directions import DirectionSet
from ..errors import InputError, unknown
from ..models.load import load
from .answers import Answers, Boxed, Labels, Pattern
from .labels import APPRAISAL, EmbeddingLabeller
from .steps import read_trace
from .study import Plan, emotion_directions, emotional_answers, emotional_plan, problem_traces, run_anchors
from .traces import Trace


def anchors(args: argparse.Namespace) -> Path:
    """Measure the project's problems or the user's own traces; returns the report's path."""
    plan = Plan(args.rollouts, args.max_new_tokens, seed=args.seed)
    if args.traces is not None:
        if args.directions is not None or args.layer is not None:
            raise InputError("--directions and --layer go with our own problems, whose answers are emotions")
        answers = parse_answers(args.answers)
        traces = read_traces(args.traces, answers)
        loaded = load(args.model)
        with bars() as progress:
            return run_anchors(loaded, traces, answers, args.out, plan, progress=progress)
    if args.problems is not None and args.problems < 1:
        raise InputError(f"--problems must be at least 1, not {args.problems}")
    plan = emotional_plan(plan)
    loaded = load(args.model)
    with bars() as progress:
        given = DirectionSet.load(args.directions) if args.directions else None
        directions, layer = (given, args.layer) if given else emotion_directions(loaded, args.seed, progress)
        traces = problem_traces(loaded, plan, args.problems, args.source, progress=progress)
        if args.source == "model":
            labeller = EmbeddingLabeller(APPRAISAL)
            traces = [labeller.label(trace) for trace in traces]
        return run_anchors(
            loaded, traces, emotional_answers(), args.out, plan, directions=directions,
            layer=layer if args.layer is None else args.layer, progress=progress,
        )  # fmt: skip


def parse_answers(text: str) -> Answers:
    """The answers that "boxed", "labels:anger,fear" or "regex:PATTERN" name; raises InputError for anything else."""
    kind, _, rest = text.partition(":")
    if kind == "boxed" and not rest:
        return Boxed()
    if kind == "labels" and rest:
        return Labels(tuple(word.strip() for word in rest.split(",") if word.strip()))
    if kind == "regex" and rest:
        return Pattern(rest)
    raise unknown("way to answer", text, ("boxed", "labels:A,B,C", "regex:PATTERN"))


def read_traces(path: Path, answers: Answers) -> list[Trace]:
    """Traces of a JSONL file with prompt and completion; raises InputError that names the row it cannot use."""
    traces = []
    for i, row in enumerate(read_jsonl(path)):
        name = str(row.get("id", i))
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise InputError(f"{path}, trace {name!r}: {key} must be a text, not {_shown(row.get(key))}")
        truth = row.get("truth")
        traces.append(
            read_trace(row["prompt"], row["completion"], answers, truth=None if truth is None else str(truth), id=name)
        )
    return traces


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:40]
