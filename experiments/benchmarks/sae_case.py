"""Sparse autoencoders: a TopK training step next to SAELens's, and collecting step vectors next to the bare forward."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Line, Table, Timing, Way, build, interleaved
from peers import require
from torch import Tensor
from workloads import demo

from emocircuits.activations import batches
from emocircuits.data.scenarios import discovery
from emocircuits.reading import pad
from saes.collect import collect
from saes.tokens import StepTokens, place_steps

D, WIDTH, K, ROWS = 640, 4096, 32, 4096
OURS, DEFAULT, SPARSE = "saes, sparse TopK step", "SAELens TopK (default)", "SAELens TopK, use_sparse_activations"
TO_DEFAULT, TO_PRODUCT = "time, x SAELens default", "time, x one dense product"
TO_BODY, PROCESSOR = "time, x body", "processor time, x body"
TRACES, SENTENCES, BATCH = 4, 12, 4


def run(repetitions: int) -> list[Table]:
    """A training step, then collection."""
    return [_training(repetitions), _collecting(repetitions)]


# ---------------------------------------------------------------- training


def _training(repetitions: int) -> Table:
    require("sae_lens")
    from sae_lens import TopKTrainingSAE

    from saes.topk import SparseTopKTrainingSAE

    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
    plain = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    weights = torch.randn(D, WIDTH)
    ways: dict[str, Way] = {
        DEFAULT: _step(TopKTrainingSAE, x),
        OURS: _step(SparseTopKTrainingSAE, x),
        "one dense product, x @ W_enc": lambda: x @ weights,
    }
    others, missing = build({
        SPARSE: lambda: _tried(_step(TopKTrainingSAE, x, use_sparse_activations=True)),
        f"{SPARSE}, no rescaling": lambda: _step(TopKTrainingSAE, x, **plain),
    })  # fmt: skip
    ways |= others
    notes = {OURS: _agreement(TopKTrainingSAE, SparseTopKTrainingSAE, x)}
    timing = interleaved(ways, repetitions)
    lines = [
        Line(
            name,
            {
                TO_DEFAULT: timing.ratio(name, DEFAULT, 0.4 if name == OURS else None),
                TO_PRODUCT: timing.ratio(name, "one dense product, x @ W_enc"),
            },
            notes.get(name, ""),
        )
        for name in ways
    ]
    workload = f"one step of SAELens's trainer (losses, gradients, Adam) on {ROWS} vectors, d {D}, width {WIDTH}, k {K}"
    return Table("SAE: TopK training step", workload, lines + missing)


def _sae(make: Callable[..., Any], **options: Any) -> Any:
    from sae_lens import TopKTrainingSAEConfig

    torch.manual_seed(0)
    return make(TopKTrainingSAEConfig(d_in=D, d_sae=WIDTH, k=K, decoder_init_norm=1.0, **options))


def _step(make: Callable[..., Any], x: Tensor, **options: Any) -> Way:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=ROWS, lr_end=3e-5)
    trainer = SAETrainer(config, _sae(make, **options), iter(()))
    return lambda: float(trainer.step(x).loss.detach())


def _tried(way: Way) -> Way:
    try:
        way()
    except NotImplementedError as error:
        raise RuntimeError("torch cannot differentiate it with rescale_acts_by_decoder_norm, the default") from error
    return way


def _agreement(theirs: Callable[..., Any], ours: Callable[..., Any], x: Tensor) -> str:
    """How far losses and gradients are apart, relative to the largest; a tenth of the latents counts as dead."""
    from sae_lens.saes.sae import TrainStepInput

    found = []
    for make in (theirs, ours):
        sae = _sae(make)
        output = sae.training_forward_pass(TrainStepInput(x, {}, torch.arange(WIDTH) % 10 == 0, 0, False))
        output.loss.backward()
        losses = torch.stack([loss.detach() for loss in output.losses.values()])
        found.append([losses, *(p.grad for p in sae.parameters())])
    apart = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found)]
    return f"losses differ by {apart[0]:.0e}, gradients by {max(apart[1:]):.0e}, auxiliary loss included"


# ---------------------------------------------------------------- collection


def _collecting(repetitions: int) -> Table:
    loaded = demo()
    texts = _texts()
    placed = place_steps(loaded.model, loaded.tokenizer, texts, "closing")
    inputs = [
        _padded([placed[i] for i in index]) for index in batches(len(placed), [len(p.ids) for p in placed], BATCH)
    ]

    @torch.no_grad()
    def body() -> None:
        for ids, mask in inputs:
            loaded.model.model(ids, attention_mask=mask, use_cache=False)

    def ours(reduce: str) -> Way:
        def run() -> int:
            with tempfile.TemporaryDirectory() as folder:
                return len(collect(*loaded, texts, Path(folder) / "store", reduce=reduce, batch_size=BATCH))

        return run

    ways: dict[str, Way] = {"HF body, no LM head": body} | {
        f"saes collect, {name}": ours(name) for name in ("closing", "mean", "all")
    }
    busy: dict[str, list[float]] = {name: [] for name in ways}
    timing = interleaved({name: _clocked(way, busy[name]) for name, way in ways.items()}, repetitions)
    processor = Timing({name: seconds[1:] for name, seconds in busy.items()}, {})  # without the warm-up
    base = "HF body, no LM head"
    lines = [
        Line(
            name,
            {
                PROCESSOR: processor.ratio(name, base, None if name == base or "all" in name else 1.05),
                TO_BODY: timing.ratio(name, base),
            },
            f"{rows:,} rows to disk" if (rows := timing.results[name]) else "",
        )
        for name in ways
    ]
    n_tokens, n_steps = sum(len(p.ids) for p in placed), sum(len(p.records) for p in placed)
    workload = (
        f"{len(texts)} texts, {n_tokens:,} tokens, {n_steps} steps, resid_post of all layers, tokenising and writing"
        f" included, {loaded.name}"
    )
    return Table("SAE: collecting step vectors", workload, lines)


def _clocked(way: Way, seconds: list[float]) -> Way:
    """The way, which notes the processor time of each call: what a busy machine does not stretch."""

    def run() -> Any:
        start = time.process_time()
        result = way()
        seconds.append(time.process_time() - start)
        return result

    return run


def _texts() -> list[str]:
    """Scenario texts in paragraphs, about as many steps a text as a short reasoning trace has."""
    groups = [group.text for group in discovery().groups()]
    return ["\n\n".join(groups[i * SENTENCES : (i + 1) * SENTENCES]) for i in range(TRACES)]


def _padded(batch: Sequence[StepTokens]) -> tuple[Tensor, Tensor]:
    return pad([one.ids for one in batch], "right", 0)
