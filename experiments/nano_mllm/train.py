"""Train the small audio-visual model on generated clips.

python experiments/nano_mllm/train.py --out runs/nano              # 5 to 10 minutes on one CPU thread
python experiments/nano_mllm/train.py --out runs/even --reliable 0.85 0.85   # a model without a built-in preference
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clips import EMOTIONS, Knobs
from model import build, collate, label_probabilities, tokenizer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sets import VALIDATION, Pool, Recipe, evaluation_sets
from torch import nn

from emocircuits.artefact import write_json_atomic

BATCH, PEAK, WARM_UP, CHECK_EVERY = 32, 2e-3, 100, 200
console = Console()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, check on people of the validation split, and write the checkpoint and training.json."""
    options = _options(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    recipe, started = _recipe(options), time.perf_counter()
    with console.status("drawing faces and speaking"):
        pool = Pool(recipe, options.seed)
        checks = evaluation_sets(VALIDATION, options.people, options.seed, recipe)
    model, curve = build(options.seed), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps)
        for step, loss in enumerate(_steps(model, pool, options.steps), 1):
            progress.update(task, advance=1, description=f"step {step}, loss {loss:.3f}")
            if step % CHECK_EVERY == 0 or step == options.steps:
                curve.append({"step": step, "loss": loss, **quick_look(model, checks)})
                shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in curve[-1].items())
                progress.console.print("  ".join(shown))
    minutes = (time.perf_counter() - started) / 60
    _save(options, model, recipe, curve, minutes)
    console.print(f"wrote {options.out}/checkpoint after {minutes:.1f} minutes on {options.threads} thread(s)")


def quick_look(model: Any, sets: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each modality alone and of both, and the preference gap; without intervals."""
    model.eval()
    found = {}
    for kind, clips in sets.items():
        p = label_probabilities(model, clips.items)
        rows = np.arange(len(p))
        if kind == "conflict":
            found["gap"] = float(np.mean(p[rows, clips.heard] - p[rows, clips.seen]))
        else:
            found[kind] = float(np.mean(p.argmax(1) == np.maximum(clips.heard, clips.seen)))
    return found


def _steps(model: nn.Module, pool: Pool, steps: int):
    """Train one batch after another with AdamW, a warm-up and a cosine; yields each loss (of the answer's tokens)."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for _ in range(steps):
        model.train()
        loss = model(**collate(*pool.batch(BATCH)), use_cache=False).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield float(loss.detach())


def _save(options: argparse.Namespace, model: Any, recipe: Recipe, curve: list[Any], minutes: float) -> None:
    folder = options.out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    manifest = {
        "seed": options.seed, "steps": options.steps, "batch": BATCH, "peak_learning_rate": PEAK,
        "recipe": asdict(recipe), "expected_gap": recipe.expected_gap(), "emotions": list(EMOTIONS),
        "parameters": sum(p.numel() for p in model.parameters()), "minutes": round(minutes, 2),
        "cpu_minutes": round(time.process_time() / 60, 2), "threads": options.threads,
        "torch": str(torch.__version__), "validation_curve": curve,
    }  # fmt: skip
    write_json_atomic(folder / "training.json", manifest)


def _recipe(options: argparse.Namespace) -> Recipe:
    audio, image = options.reliable
    voices = Knobs(noise=options.noise, strength=options.voice_strength, seconds=tuple(options.seconds))
    faces = Knobs(noise=options.noise, strength=options.face_strength)
    return replace(Recipe(), voices=voices, faces=faces, reliable=(audio, image), clips=options.clips)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder of the run (default: runs/nano)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--clips", type=int, default=Recipe().clips, help="faces, and voices, to draw rows from")
    parser.add_argument("--people", type=int, default=20, help="validation people of the checks during training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--reliable", type=float, nargs=2, default=Recipe().reliable, metavar=("VOICE", "FACE"),
        help="probability that each modality shows the emotion of an audio-visual clip",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=Knobs().seconds, metavar=("LEAST", "MOST"),
        help="length of voices, at most 1 (25 audio tokens a second; an image is 16 tokens)",
    )  # fmt: skip
    parser.add_argument("--voice-strength", type=float, default=1.0, help="clarity of voices; 0 is neutral")
    parser.add_argument("--face-strength", type=float, default=1.0, help="clarity of faces; 0 is neutral")
    parser.add_argument("--noise", type=float, default=Knobs().noise, help="noise of pixels and samples")
    options = parser.parse_args(arguments)
    if not 0 < options.seconds[0] <= options.seconds[1] <= 1:
        parser.error("--seconds must rise, from above 0 to at most 1")
    if not all(0 <= p <= 1 for p in options.reliable):
        parser.error("--reliable takes two probabilities")
    return options


if __name__ == "__main__":
    main()
