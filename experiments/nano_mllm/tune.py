"""Fine-tune the trained model with modality experts (MoSE) or plain LoRA, and see what becomes of its preference.

python experiments/nano_mllm/tune.py                # writes experiments/results/nano_mllm/experts.json and experts.md

Data: "biased" trusts the voice as the first training did, "even" makes voice and face equally reliable. All adapters
have the same rank, places, steps and data; held-out people, intervals over people, as in evaluate.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from model import CHECKPOINT, collate, label_probabilities, load
from peft import LoraConfig, get_peft_model
from rebalance import gaps, right
from rich.console import Console
from sets import HELD_OUT, VALIDATION, EvaluationSet, Pool, Recipe, evaluation_sets
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.evaluation.statistics import clustered_bootstrap
from emocircuits.steering import experts

RESULTS = Path(__file__).parents[1] / "results" / "nano_mllm"
RECIPES = {"biased": Recipe(clips=2400), "even": Recipe(clips=2400, reliable=(0.85, 0.85))}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FACTORS = [{"audio": a, "image": i} for a in (1.0, 0.5, 0.0) for i in (1.0, 2.0, 4.0)]
"""Tried on the experts of the model tuned on biased data, without training it again."""
console = Console()


class Rows(Dataset):
    """Prompts with answers, drawn once."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.rows = list(zip(*pool.batch(size)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune every arm, score it on held-out people, and write the table."""
    options = _options(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    with console.status("drawing faces and speaking"):
        held_out = evaluation_sets(HELD_OUT, options.persons, 1, Recipe())
        validation = evaluation_sets(VALIDATION, 20, 1, Recipe(), ("consistent", "conflict"))
        data = {name: Rows(Pool(recipe, options.seed + 1), 32 * options.steps) for name, recipe in RECIPES.items()}
    arms: dict[str, Callable[[], Any]] = {
        "LoRA, even data": lambda: _lora(data["even"], options),
        "MoSE, even data": lambda: _mose(data["even"], options),
        "LoRA, biased data": lambda: _lora(data["biased"], options),
        "MoSE, biased data": lambda: _mose(data["biased"], options),
    }
    rows, factor = {"untouched": scored(load(), held_out)}, None
    for name, make in arms.items():
        model = make()
        rows[name] = scored(model, held_out) | {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)
        }
        if name == "MoSE, biased data":
            factor = _factor(model, validation)
            with experts.rebalance(model, factor):
                rows["the same, experts turned"] = scored(model, held_out)
        console.print(f"{name}: gap {rows[name]['gap']['estimate']:+.2f}")
    manifest = {
        "seed": options.seed, "steps": options.steps, "batch": 32, "rank": options.rank, "targets": list(TARGETS),
        "factor": factor, "factors": FACTORS, "persons": options.persons, "threads": options.threads,
        "recipes": {n: asdict(r) for n, r in RECIPES.items()},
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(options.out / "experts.json", {"manifest": manifest, "rows": rows})
    write_text_atomic(options.out / "experts.md", markdown(manifest, rows))


def scored(model: Any, sets: dict[str, EvaluationSet]) -> dict[str, Any]:
    """Accuracies and the preference gap with intervals over people."""
    model.eval()
    found: dict[str, Any] = {}
    for kind, clips in sets.items():
        p = label_probabilities(model, clips.items)
        values = gaps(p, clips) if kind == "conflict" else right(p, clips)
        interval = clustered_bootstrap(values, clips.persons.tolist())
        found["gap" if kind == "conflict" else kind] = {
            k: getattr(interval, k) for k in ("estimate", "low", "high", "n", "n_clusters")
        }
    return found


def _factor(model: Any, validation: dict[str, EvaluationSet]) -> dict[str, float]:
    """The factors with the smallest gap on validation people, at most 2 points off the consistent accuracy of 1, 1."""
    tried = []
    for factors in FACTORS:
        with experts.rebalance(model, factors):
            tried.append(scored(model, validation))
    least = tried[0]["consistent"]["estimate"] - 0.02
    kept = [i for i, found in enumerate(tried) if found["consistent"]["estimate"] >= least]
    return FACTORS[min(kept, key=lambda i: abs(tried[i]["gap"]["estimate"]))]


def _mose(data: Rows, options: argparse.Namespace) -> Any:
    config = experts.MoSEConfig(r=options.rank, alpha=2.0 * options.rank, n_experts=3, target_modules=TARGETS)
    return _trained(experts.wrap(load(CHECKPOINT), config), data, options)


def _lora(data: Rows, options: argparse.Namespace) -> Any:
    places = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=rf".*{places}")
    return _trained(get_peft_model(load(CHECKPOINT), config), data, options)


def _trained(model: Any, data: Rows, options: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=32, max_steps=options.steps, learning_rate=2e-3, warmup_steps=20,
            lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_steps=50, seed=options.seed,
            remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        collator = lambda rows: collate([i for i, _ in rows], [a for _, a in rows])  # noqa: E731
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    return model.eval()


def markdown(manifest: dict[str, Any], rows: dict[str, Any]) -> str:
    """The table, with what was trained on what."""
    kinds = ("gap", "consistent", "audio", "image")
    head = (
        "| model | trained weights | preference gap | consistent | voice alone | face alone |\n" + "| --- " * 6 + "|\n"
    )
    body = ""
    for name, row in rows.items():
        trained = f"{row['trained']:,}" if row.get("trained") else ""
        cells = " | ".join(f"{row[k]['estimate']:.2f} [{row[k]['low']:.2f}, {row[k]['high']:.2f}]" for k in kinds)
        body += f"| {name} | {trained} | {cells} |\n"
    even = RECIPES["even"].expected_gap()
    return (
        f"# Modality experts on the small model\n\n{manifest['steps']} steps of {manifest['batch']} on the committed"
        f" checkpoint, rank {manifest['rank']}, on {', '.join(manifest['targets'])}; seed {manifest['seed']},"
        f" {manifest['minutes']} minutes on {manifest['threads']} thread(s). Even data make voice and face equally"
        f" reliable (ideal gap {even:.2f}), biased data are those of the first training (ideal gap"
        f" {RECIPES['biased'].expected_gap():.2f}). {manifest['persons']} held-out people, 95% intervals over people."
        f" Experts turned, without training: audio times {manifest['factor']['audio']:g}, image times"
        f" {manifest['factor']['image']:g}, chosen on validation people.\n\n"
        f"{head}{body}"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--persons", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
