"""Reasoning, white box: the suppression matrix against a whole pass per source; receiver heads against a plain pass."""

from __future__ import annotations

from typing import Any

import torch
from harness import MIB, Cell, Line, Table, Way, interleaved, memory_of
from torch import Tensor
from workloads import demo, llama, random_ids, text_ids

from emocircuits.activations.knockout import knockout
from emocircuits.reasoning.receivers import attention_blocks
from emocircuits.reasoning.suppression import suppression_matrix

PLAIN, MATRIX = "one plain forward per source", "emocircuits suppression_matrix"
LAST, BLOCKS, PATTERNS = "plain forward, last logits only", "emocircuits attention_blocks", "eager, all patterns kept"
LONG, TIMED, STEPS = 4096, 2048, 64
TIME, PEAK, HELD = "time, x one forward per source", "peak, x plain forward", "peak MiB"


def run(repetitions: int) -> list[Table]:
    """Suppression on two models, then receiver heads."""
    random_llama = "a random Llama of the demo model's size, vocabulary 32,000"
    return [
        _suppression(llama(), random_ids(1, 384, 32_000), 96, 16, random_llama, repetitions),
        _suppression(demo().model, text_ids(1, 192), 48, 12, f"{demo().name}, vocabulary 262,144", repetitions),
        _receivers(repetitions),
    ]


def _bounds(prompt: int, length: int, n: int) -> list[int]:
    return [prompt + round((length - prompt) * i / n) for i in range(n + 1)]


def _suppression(model: Any, ids: Tensor, prompt: int, n: int, name: str, repetitions: int) -> Table:
    length = ids.shape[1]
    bounds = _bounds(prompt, length, n)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(n):
            model(input_ids=ids, use_cache=False)

    ways: dict[str, Way] = {PLAIN: plain, MATRIX: lambda: suppression_matrix(model, ids, bounds)}
    timing = interleaved(ways, repetitions)
    found = timing.results[MATRIX]
    share = sum(length - stop + 1 for stop in bounds[1:-1]) / (n * length)
    source = n // 2
    exact = _one_source(model, ids, bounds, source)
    error = float((found.kl[source + 1 :, source] / exact[source + 1 :] - 1).abs().max())
    notes = {
        PLAIN: "no mask, no KL: less than the published way does",
        MATRIX: f"KL included; differs by {error:.0e} of the KL from masked whole passes (one source checked)",
    }
    lines = [Line(w, {TIME: timing.ratio(w, PLAIN, 0.5 if w == MATRIX else None)}, notes[w]) for w in ways]
    workload = (
        f"{n} steps in {length - prompt} tokens behind a prompt of {prompt}, {name}; the tokens after each source are"
        f" {share:.0%} of {n} whole passes, and half of them without a prompt"
    )
    return Table(f"Reasoning: suppression matrix, {length} tokens", workload, lines)


@torch.no_grad()
def _one_source(model: Any, ids: Tensor, bounds: list[int], source: int) -> Tensor:
    """[n] mean KL on each step when a source is masked in a whole pass."""
    span = (bounds[source], bounds[source + 1])
    p = (model(input_ids=ids, use_cache=False).logits[0].float() / 0.6).log_softmax(-1)
    with knockout(model, [((0, ids.shape[1]), span)]):
        q = (model(input_ids=ids, use_cache=False).logits[0].float() / 0.6).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack([kl[a - 1 : b - 1].mean() for a, b in zip(bounds, bounds[1:])])


def _receivers(repetitions: int) -> Table:
    model = llama()

    @torch.no_grad()
    def plain(ids: Tensor) -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def blocks(ids: Tensor) -> Any:
        return attention_blocks(model, ids, _bounds(ids.shape[1] // 16, ids.shape[1], STEPS))

    short, long = (random_ids(1, length, 32_000) for length in (TIMED, LONG))
    timing = interleaved({LAST: lambda: plain(short), BLOCKS: lambda: blocks(short)}, repetitions)
    peaks = {LAST: memory_of(lambda: plain(long)).peak, BLOCKS: memory_of(lambda: blocks(long)).peak}
    column = f"time at {TIMED:,} tokens, x plain forward"
    lines = [
        Line(
            way,
            {
                PEAK: Cell(peak / peaks[LAST], target=1.5 if way == BLOCKS else None),
                HELD: Cell(peak / MIB),
                column: timing.ratio(way, LAST),
            },
        )  # fmt: skip
        for way, peak in peaks.items()
    ]
    config = model.config
    kept = config.num_hidden_layers * config.num_attention_heads * LONG**2 * 4
    lines.append(
        Line(PATTERNS, {PEAK: Cell(kept / peaks[LAST]), HELD: Cell(kept / MIB)}, "computed from the shapes, not run")
    )
    workload = (
        f"attention between {STEPS} steps of {LONG:,} tokens in all {config.num_hidden_layers} layers of"
        f" {config.num_attention_heads} heads, a random Llama of the demo model's size"
    )
    return Table("Reasoning: receiver heads", workload, lines)
