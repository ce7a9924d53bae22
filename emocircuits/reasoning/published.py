"""Published rollouts of Thought Anchors (arXiv 2506.19143): the file tree, the hub's rows and the website's layout.

Whatever can be read is: files that are cut off give the items before the cut, and `problems` says what was lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .answers import Answers, Boxed
from .steps import cut_thinking, first_step, joined
from .traces import Rollout, Rollouts, Trace

Floats = NDArray[np.float64]
Reader = Callable[[str], "str | None"]
"""A file's name inside a problem's folder -> its text, None where there is no such file."""

VALUES = (
    "accuracy", "resampling_importance_accuracy", "resampling_importance_kl", "counterfactual_importance_accuracy",
    "counterfactual_importance_kl", "forced_importance_accuracy", "forced_importance_kl",
    "different_trajectories_fraction", "overdeterminedness",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One published problem: its trace, its rollouts, the numbers published for each step, and what was unreadable.

    values: {name: [n]}, NaN where a step has none. matrix and suppression [n, n]: effect of step (column) on later
    step (row), NaN elsewhere. `has_answers`: whether rollouts hold whole texts; the website's layout has only the
    resampled sentences.
    """

    trace: Trace
    rollouts: Rollouts
    values: Mapping[str, Floats]
    matrix: Floats | None = None
    suppression: Floats | None = None
    problems: tuple[str, ...] = ()
    has_answers: bool = field(default=True)


def load_published(folder: str | Path, answers: Answers | None = None) -> Published:
    """Read the folder of one problem, in either layout; raises InputError when it holds no labelled steps."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; give the folder of one problem (problem_...)")

    def read(name: str) -> str | None:
        path = root / name
        return path.read_text("utf-8", errors="replace") if path.is_file() else None

    return _problem(root.name, read, answers or Boxed())


def read_rows(rows: Iterable[Mapping[str, Any]], answers: Answers | None = None) -> dict[str, Published]:
    """Problems of a hub dataset whose rows are files {path, content}; keys are the problems' folders.

    Folders without labelled steps are left out. Raises InputError when no row has a path and a content.
    """
    folders: dict[str, dict[str, str]] = {}
    for row in rows:
        path, content = row.get("path"), row.get("content")
        if isinstance(path, str) and isinstance(content, str):
            parts = PurePosixPath(path).parts
            at = next((i for i, part in enumerate(parts) if part.startswith(("problem_", "scenario_"))), None)
            if at is not None and at + 1 < len(parts):
                folders.setdefault("/".join(parts[: at + 1]), {})["/".join(parts[at + 1 :])] = content
    if not folders:
        raise InputError("no row holds the path and the content of a problem's file; pass the dataset's own rows")
    whole = {name: files for name, files in folders.items() if "chunks_labeled.json" in files}
    return {name: _problem(name, files.get, answers or Boxed()) for name, files in whole.items()}


def _problem(name: str, read: Reader, answers: Answers) -> Published:
    problems: list[str] = []

    def load(file: str) -> Any:
        text = read(file)
        return None if text is None else _salvaged(text, f"{name}/{file}", problems)

    labelled, base = load("chunks_labeled.json"), load("base_solution.json") or load("scenario.json") or {}
    if not isinstance(labelled, list) or not labelled:
        raise InputError(f"{name} has no steps: chunks_labeled.json is missing, empty or no list")
    chunks = [str(row.get("chunk", "")) for row in labelled]
    given = load("problem.json") or {}
    trace = Trace(
        prompt=str(base.get("prompt", "")),
        steps=joined(chunks),
        ending=cut_thinking(str(base.get("solution", "")))[2],
        answer=_text(base.get("answer")),
        truth=_text(given.get("gt_answer")),
        labels=tuple(next(iter(row.get("function_tags") or [None])) for row in labelled),
        depends_on=tuple(_earlier(row.get("depends_on"), i) for i, row in enumerate(labelled)),
        id=name,
        meta={"summaries": [row.get("summary") for row in labelled], "problem": given.get("problem")},
    )
    values = {key: np.array([_number(row.get(key)) for row in labelled]) for key in VALUES}
    short = load("chunks_resampled.json")
    items = list(_resampled(short, len(chunks)) if isinstance(short, dict) else _rollouts(load, trace, answers))
    return Published(
        trace,
        Rollouts(len(chunks), tuple(items)),
        values,
        _matrix(load("step_importance.json"), len(chunks)),
        _matrix(load("step_importance_supp.json"), len(chunks)),
        tuple(problems),
        has_answers=not isinstance(short, dict) and any(r.finish != "error" for r in items),
    )


def _resampled(by_step: Mapping[str, Any], n: int) -> Iterable[Rollout]:
    """The website keeps the first sentence of every rollout and nothing else."""
    for key, sentences in by_step.items():
        if key.isdecimal() and int(key) < n:
            for index, sentence in enumerate(sentences):
                yield Rollout(int(key), index, str(sentence), step=str(sentence))


def _rollouts(load: Callable[[str], Any], trace: Trace, answers: Answers) -> Iterable[Rollout]:
    """chunk_{i}/solutions.json; an entry's own answer is not trusted, it may have been read from the prefix."""
    for boundary in range(len(trace)):
        for index, entry in enumerate(load(f"chunk_{boundary}/solutions.json") or ()):
            if not isinstance(entry, Mapping) or "error" in entry:
                reason = str(entry.get("error")) if isinstance(entry, Mapping) else "not an object"
                yield Rollout(boundary, index, "", finish="error", reason=reason)
                continue
            text = str(entry.get("rollout", ""))
            answer = answers.extract(text)
            step = _text(entry.get("chunk_resampled")) or first_step(text)
            correct, finish = answers.correct(answer, trace.truth), "answer" if answer is not None else "length"
            yield Rollout(boundary, index, text, step, answer, correct, finish=finish)


def _matrix(sources: Any, n: int) -> Floats | None:
    """[target, source] of [{source_chunk_idx, target_impacts: [{target_chunk_idx, importance_score}]}]."""
    if not isinstance(sources, list):
        return None
    found = np.full((n, n), math.nan)
    for source in sources:
        for target in source.get("target_impacts", ()):
            i, j = int(source["source_chunk_idx"]), int(target["target_chunk_idx"])
            if 0 <= i < j < n:
                found[j, i] = _number(target.get("importance_score"))
    return found


def _salvaged(text: str, name: str, problems: list[str]) -> Any:
    """The JSON value of a file; of a list or object that is cut off, the items before the cut."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = text.lstrip()
        items: list[Any] = []
        if cut.startswith("["):
            decoder, at = json.JSONDecoder(), 1
            while True:
                while at < len(cut) and cut[at] in " \t\r\n,":
                    at += 1
                try:
                    item, at = decoder.raw_decode(cut, at)
                except json.JSONDecodeError:
                    break
                items.append(item)
        problems.append(f"{name} is damaged ({error.msg}, line {error.lineno}): kept {len(items)} items before that")
        return items or None


def _earlier(given: Any, i: int) -> tuple[int, ...]:
    numbers = {int(x) for x in given or () if str(x).isdecimal()}
    return tuple(sorted(x for x in numbers if x < i))


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
