"""Score the trained model on held-out people, and what attention reallocation does to its preference for a modality.

python experiments/nano_mllm/evaluate.py            # the committed checkpoint; writes experiments/results/nano_mllm
python experiments/nano_mllm/evaluate.py --checkpoint runs/nano/checkpoint --out runs/nano/results

Answers are scored by the likelihood of the answer words, one forward pass a prompt. Preference gap: P(emotion of the
voice) - P(emotion of the face) on clips where the two differ and the question names no modality; intervals resample
people. Read as audio-aligned, the voice of such a clip is right; read as video-aligned, the face is (as in CA-MER).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rebalance
import torch
import transformers
from clips import EMOTIONS, Knobs
from model import CHECKPOINT, label_probabilities, load
from numpy.typing import NDArray
from report import markdown
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sets import HELD_OUT, VALIDATION, EvaluationSet, Recipe, evaluation_sets, knob_sweep

from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.evaluation.statistics import Interval, clustered_bootstrap, paired_test

RESULTS = Path(__file__).parents[1] / "results" / "nano_mllm"
console = Console()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make every set, score, reallocate, and write nano_mllm.json and nano_mllm.md."""
    options = _options(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    started, model = time.perf_counter(), load(options.checkpoint)
    trained = json.loads((options.checkpoint / "training.json").read_text())
    recipe = recipe_of(trained)
    with console.status("drawing faces and speaking"):
        held_out = evaluation_sets(HELD_OUT, options.persons, options.seed, recipe)
        validation = evaluation_sets(VALIDATION, options.validation, options.seed, recipe, ("consistent", "conflict"))
        names = named_sets(options, recipe)
    result = {
        "manifest": _manifest(options, trained),
        "scores": scores(model, held_out),
        "named": named(model, names),
        "knobs": knobs(model, options, recipe),
        "attention": rebalance.attention_shares(model, held_out["conflict"]),
    }
    if not options.no_reallocation:
        result["reallocation"] = reallocation(model, validation, held_out | names, options.seed)
    result["manifest"]["minutes"] = round((time.perf_counter() - started) / 60, 2)
    write_json_atomic(options.out / "nano_mllm.json", result)
    write_text_atomic(options.out / "nano_mllm.md", markdown(result))
    console.print(f"wrote {options.out}/nano_mllm.json and nano_mllm.md in {result['manifest']['minutes']} minutes")


def scores(model: Any, sets: dict[str, EvaluationSet]) -> dict[str, Any]:
    """Accuracy of each modality alone and of both, and how conflict is decided, with intervals."""
    found: dict[str, Any] = {}
    for kind in ("audio", "image", "consistent"):
        right = rebalance.right(label_probabilities(model, sets[kind].items), sets[kind])
        found[kind] = as_json(clustered_bootstrap(right, sets[kind].persons))
    conflict = sets["conflict"]
    return found | decided(label_probabilities(model, conflict.items), conflict)


def decided(p: NDArray[np.float64], clips: EvaluationSet) -> dict[str, Any]:
    """Conflict clips read both ways: share answered with the voice's and with the face's emotion, and the gap."""
    answers = p.argmax(1)
    columns = {"gap": rebalance.gaps(p, clips), "as voice": answers == clips.heard, "as face": answers == clips.seen}
    return {name: as_json(clustered_bootstrap(np.asarray(x, float), clips.persons)) for name, x in columns.items()}


def named_sets(options: argparse.Namespace, recipe: Recipe) -> dict[str, EvaluationSet]:
    """{"voice" or "face": held-out conflict clips whose question names that modality; the other is a distractor}."""
    people = (HELD_OUT, options.persons, options.seed, recipe, ("conflict",))
    return {question: evaluation_sets(*people, question)["conflict"] for question in ("voice", "face")}


def named(model: Any, sets: rebalance.Sets, setting: rebalance.Setting | None = None) -> dict[str, Any]:
    """Accuracy on the named sets, with or without a change."""
    found = {}
    for question in ("voice", "face"):
        clips = sets[question]
        wanted = clips.heard if question == "voice" else clips.seen
        right = rebalance.probabilities(model, clips, setting and setting.made).argmax(1) == wanted
        found[question] = as_json(clustered_bootstrap(right.astype(float), clips.persons))
    return found


def knobs(model: Any, options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """The gap on held-out conflict clips with one knob changed: number of audio tokens, clarity of either cue."""
    found = {}
    for name, changed in knob_sweep(recipe):
        clips = evaluation_sets(HELD_OUT, options.persons, options.seed, changed, ("conflict",))["conflict"]
        found[name] = decided(label_probabilities(model, clips.items), clips)
    return found


def reallocation(
    model: Any, validation: dict[str, EvaluationSet], held_out: dict[str, EvaluationSet], seed: int
) -> dict[str, Any]:
    """Sweep on validation, choose a strength for each policy, then measure it and its random control on held-out."""
    bias, consistent = rebalance.measured(model, validation)
    source, target = ("audio", "image") if bias > 0 else ("image", "audio")  # measured, never assumed
    size = rebalance.sink_size(model, validation["conflict"])
    tried = list(rebalance.settings(source, target, size))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("sweep on validation", total=len(tried))
        rows = rebalance.sweep(model, validation, tried, lambda: progress.advance(task))
        chosen = rebalance.choose(rows, tried, consistent)
        task = progress.add_task("held-out", total=len(chosen))
        table = []
        for setting in chosen:
            table.append(_row(model, held_out, setting, seed))
            progress.advance(task)
    return {
        "from": source, "to": target, "sink_size": size, "validation_gap": bias,
        "validation_consistent": consistent, "allowed_loss": rebalance.ALLOWED_LOSS,
        "sweep": rows, "held_out": table,
    }  # fmt: skip


def _row(model: Any, sets: dict[str, EvaluationSet], setting: rebalance.Setting, seed: int) -> dict[str, Any]:
    """One chosen setting on held-out clips: gap, consistent accuracy, both under random spans, and paired tests."""
    conflict, consistent = sets["conflict"], sets["consistent"]
    before = rebalance.gaps(label_probabilities(model, conflict.items), conflict)
    p = rebalance.probabilities(model, conflict, setting.made)
    after = rebalance.gaps(p, conflict)
    kept = rebalance.right(rebalance.probabilities(model, consistent, setting.made), consistent)
    random_gap, random_kept = (
        np.mean([score(q, clips) for q in rebalance.control(model, clips, setting.made, seed)], axis=0)
        for score, clips in ((rebalance.gaps, conflict), (rebalance.right, consistent))
    )
    change, beyond = (paired_test(after, other, conflict.persons) for other in (before, random_gap))
    return {
        "way": setting.way, "strength": setting.strength, **decided(p, conflict),
        "consistent": as_json(clustered_bootstrap(kept, consistent.persons)),
        "named": named(model, sets, setting),
        "random gap": as_json(clustered_bootstrap(random_gap, conflict.persons)),
        "random consistent": as_json(clustered_bootstrap(random_kept, consistent.persons)),
        "change": {**as_json(change.difference), "p": change.p},
        "change beyond random": {**as_json(beyond.difference), "p": beyond.p},
    }  # fmt: skip


def as_json(interval: Interval) -> dict[str, Any]:
    """An interval as plain data."""
    return {
        "estimate": interval.estimate, "low": interval.low, "high": interval.high,
        "n": interval.n, "people": interval.n_clusters,
    }  # fmt: skip


def recipe_of(trained: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint's training.json records."""
    kept = dict(trained["recipe"])
    for name in ("voices", "faces"):
        kept[name] = Knobs(**{**kept[name], "seconds": tuple(kept[name]["seconds"])})
    return Recipe(**{**kept, "reliable": tuple(kept["reliable"]), "alone": tuple(kept["alone"])})


def _manifest(options: argparse.Namespace, trained: dict[str, Any]) -> dict[str, Any]:
    weights = (options.checkpoint / "model.safetensors").read_bytes()
    return {
        "seed": options.seed, "persons": options.persons, "validation_persons": options.validation,
        "emotions": list(EMOTIONS), "weights_sha256": hashlib.sha256(weights).hexdigest(), "threads": options.threads,
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers, np)},
        "training": {k: v for k, v in trained.items() if k != "validation_curve"},
    }  # fmt: skip


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=1, help="seed of the evaluation clips and of the control")
    parser.add_argument("--persons", type=int, default=60, help="held-out people; six clips of each kind for each")
    parser.add_argument("--validation", type=int, default=30, help="people of the sweep")
    parser.add_argument("--no-reallocation", action="store_true", help="scores only")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
