"""Attention reallocation and diagnosis: one attention call at 2,048 tokens, and whole generate() calls."""

from __future__ import annotations

from typing import Any

import torch
from harness import MIB, Cell, Line, Table, Way, interleaved, memory_of
from torch import Tensor
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from workloads import llama, random_ids

from emocircuits.activations import reweigh
from emocircuits.activations.attention import Call, probabilities
from emocircuits.models.spans import ModalitySpans
from emocircuits.steering.policies import Multiply, SetPoint, Transfer
from emocircuits.steering.reallocation import Reallocation

LENGTH, HEADS, HEAD_DIM = 2048, 16, 64
SPANS = {"audio": (64, 1088), "image": (1100, 1400)}
STOCK, FIXED, MASSES, MOVED, EVERYWHERE, WHOLE = (
    "sdpa", "fixed factors", "diagnosis: masses of two spans", "transfer, queries after the spans",
    "transfer, all queries", "eager",
)  # fmt: skip
MATRIX, TIME, PEAK, GROWTH = "attention matrix returned", "time, x sdpa", "peak MiB", "peak, x half the length"
TARGETS = {FIXED: 1.3, MASSES: 1.7}


def run(repetitions: int) -> list[Table]:
    """One attention call, then decoding."""
    return [_one_call(repetitions), _decoding(repetitions, 1), _decoding(repetitions, 8)]


def _one_call(repetitions: int) -> Table:
    ways, half = _ways(LENGTH), _ways(LENGTH // 2)
    timing = interleaved(ways, repetitions)
    lines = []
    for name, way in ways.items():
        peak = memory_of(way).peak
        cells = {
            TIME: timing.ratio(name, STOCK, TARGETS.get(name)),
            PEAK: Cell(peak / MIB),
            GROWTH: Cell(
                peak / memory_of(half[name]).peak, target=2.1 if name in (*TARGETS, MOVED, EVERYWHERE) else None
            ),
        }
        lines.append(Line(name, cells))
    workload = (
        f"one causal attention call, {LENGTH} tokens, {HEADS} heads of {HEAD_DIM}, float32; spans of"
        f" {SPANS['audio'][1] - SPANS['audio'][0]} and {SPANS['image'][1] - SPANS['image'][0]} tokens"
    )
    return Table("Reallocation, attention alone", workload, lines)


@torch.no_grad()
def _ways(length: int) -> dict[str, Way]:
    config = LlamaConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, num_hidden_layers=1)
    module = LlamaAttention(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
    call = Call(0, module, q, k, v, None, {"scaling": HEAD_DIM**-0.5})
    share = length / LENGTH
    spans = ModalitySpans.of_positions(
        {n: [(round(a * share), round(b * share))] for n, (a, b) in SPANS.items()}, (1, length)
    )
    regions = torch.stack([spans.mask(name) for name in SPANS], dim=1)
    gate = torch.ones(1, HEADS, length, dtype=torch.bool)
    fixed, moved = Multiply({"audio": 0.5, "image": 2.0}), Transfer("audio", "image", 0.5)
    mask = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -1e30)

    def proceed(c: Call) -> Any:
        return sdpa_attention_forward(c.module, c.query, c.key, c.value, c.mask, **c.kwargs)

    after = torch.arange(length) >= round(SPANS["image"][1] * share)

    def transferred(gate: Tensor) -> Tensor:
        result, masses = reweigh.with_masses(call, proceed, regions)
        weights = torch.where(gate[:, None], moved.weights(masses), 1.0)
        return reweigh.reweighted(call, result[0], masses, regions, weights)

    ways: dict[str, Way] = {
        STOCK: lambda: proceed(call),
        FIXED: lambda: reweigh.biased(call, proceed, fixed.log_weights(regions), gate.float()),
        MASSES: lambda: reweigh.with_masses(call, proceed, regions),
        MOVED: lambda: transferred(after),
        EVERYWHERE: lambda: transferred(torch.ones_like(after)),
        WHOLE: lambda: eager_attention_forward(module, q, k, v, mask, HEAD_DIM**-0.5),
        MATRIX: lambda: probabilities(call),
    }
    return {name: torch.no_grad()(way) for name, way in ways.items()}


def _decoding(repetitions: int, batch: int) -> Table:
    model, prompt, new = llama(), 512, 32
    ids = random_ids(batch, prompt, 32_000)
    spans = ModalitySpans.of_positions({"audio": [(16, 272)], "image": [(280, 340)]}, (batch, prompt))
    policies = {
        FIXED: Multiply({"audio": 0.5, "image": 2.0}), MOVED: Transfer("audio", "image", 0.5),
        "set point": SetPoint("audio", "image"),
    }  # fmt: skip

    def plain() -> Tensor:
        return model.generate(ids, max_new_tokens=new, do_sample=False)

    def way(made: Reallocation) -> Way:
        def steered() -> Tensor:
            with made.attach(model, spans):
                return plain()

        return steered

    ways: dict[str, Way] = {"untouched": plain}
    ways |= {name: way(Reallocation(policy)) for name, policy in policies.items()}
    timing = interleaved(ways, repetitions)
    column = "time, x untouched generate()"
    lines = [Line(n, {column: timing.ratio(n, "untouched", 1.05 if n in policies else None)}) for n in ways]
    workload = f"{batch} x {prompt} tokens, {new} new ones, all 18 layers of a random Llama of the demo model's size"
    return Table(f"Reallocation in generate(), batch {batch}", workload, lines)
