"""Emotion in reasoning: which steps carry it in their activations, and what it does to push a single one.

A step can matter for the judgement without carrying the emotion, and the reverse; these two functions measure the
second side of that comparison, `importance` the first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..activations.capture import capture
from ..activations.edit import edit
from ..activations.edits import Add
from ..circuits.assemble import Circuit
from ..circuits.units import Units
from ..circuits.validate import mean_ablation
from ..directions import DirectionSet
from ..errors import InputError, unknown
from ..models.anatomy import unwrap
from ..multimodal.balance import Answers
from ..reading import has_cache, prefix_cache
from .tokens import trace_tokens
from .traces import Trace

READ = ("mean", "last")


@torch.no_grad()
def carried(
    model: Any, tokenizer: Any, trace: Trace, directions: DirectionSet, layer: int, *, read: str = "mean"
) -> Tensor:
    """[n, E] how far each step's activations lie along each emotion, in residual norms; NaN for a step with no token.

    Read at one layer over the step's tokens (mean) or at its last one, as distance from the directions' training
    mean; what all emotions share is taken out, so a row sums to 0.
    """
    if read not in READ:
        raise unknown("reading of a step", read, READ)
    slot = directions.slots(layer)[0]
    ids, bounds = trace_tokens(tokenizer, trace)
    found = torch.full((len(trace), len(directions.emotions)), torch.nan)
    spans = [(a, b) if read == "mean" else (b - 1, b) for a, b in pairwise(bounds) if a < b]
    acts = capture(model, torch.tensor([ids]), directions.site, layer, positions=[spans], reduce="mean")
    x = acts[directions.site, layer][0].reshape(len(spans), -1).float().cpu() - directions.center[slot]
    scores = x @ directions.units[:, slot].T / directions.norms[slot]
    found[[a < b for a, b in pairwise(bounds)]] = scores - scores.mean(-1, keepdim=True)
    return found


@torch.no_grad()
def carried_by_circuit(
    model: Any, tokenizer: Any, trace: Trace, directions: DirectionSet, layer: int, circuit: Circuit, units: Units
) -> Tensor:
    """[n, E] how much of what steps carry is the circuit's doing: `carried`, less the same with its units ablated.

    Ablated heads and neurons hold their mean over all emotions (`units`) on the steps' tokens, so what is left of a
    step's emotion then came by other ways. Raises InputError as `carried` does.
    """
    ids, bounds = trace_tokens(tokenizer, trace)
    edits = mean_ablation(circuit, units, [(bounds[0], bounds[-1])])
    whole = carried(model, tokenizer, trace, directions, layer)
    if not edits:
        return torch.zeros_like(whole)
    with edit(model, edits):
        return whole - carried(model, tokenizer, trace, directions, layer)


@dataclass(frozen=True)
class StepEffects:
    """What pushing one step towards an emotion does to the judgement at the end.

    odds: change of the emotion's log-odds among the answers, [n, D] for each step and dose. everywhere [D]: all steps
    pushed at once. control [n, D], control_everywhere [D]: the same with random directions of the same norm, averaged
    over draws. clean: log-odds without a push. NaN for steps without tokens.
    """

    emotion: str
    doses: tuple[float, ...]
    odds: Tensor
    everywhere: Tensor
    control: Tensor
    control_everywhere: Tensor
    clean: float


@torch.no_grad()
def push_steps(
    model: Any,
    tokenizer: Any,
    trace: Trace,
    directions: DirectionSet,
    emotion: str,
    answers: Answers,
    stem: str,
    *,
    doses: Sequence[float] = (-0.2, -0.1, 0.1, 0.2),
    layers: Sequence[int] | None = None,
    label: str | None = None,
    n_controls: int = 4,
    batch_size: int = 32,
    seed: int = 0,
) -> StepEffects:
    """Push each step's tokens alone along an emotion and read the answers' log-odds behind `stem`, teacher-forced.

    doses: in residual norms, at every one of `layers` (default: all that the directions have). label: the answer
    whose log-odds are read (default: the emotion). One row of a batch per step and dose, all of them behind one cached
    prompt. Raises InputError for an unknown emotion or answer and for doses that are none.
    """
    doses = tuple(float(d) for d in doses)
    if not doses or not all(torch.isfinite(torch.tensor(doses))):
        raise InputError("doses must be one or more finite numbers")
    row, target = directions.index(emotion), answers.index([label or emotion])
    slots = directions.slots(layers)
    ids, bounds = trace_tokens(tokenizer, trace, stem)
    spans: list[list[tuple[int, int]]] = [[(a, b)] if a < b else [] for a, b in pairwise(bounds)]
    spans.append([s for part in spans for s in part])  # all steps at once
    unit = directions.units[row, slots]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_controls, *unit.shape, generator=generator)
    vectors = torch.cat([unit[None], torch.nn.functional.normalize(noise, dim=-1)]) * directions.norms[slots, None]
    plan = [(v, s, d) for v in range(len(vectors)) for s in range(len(spans)) for d in range(len(doses))]
    plan = [p for p in plan if spans[p[1]]]
    odds = torch.full((len(vectors), len(spans), len(doses)), torch.nan)
    prefix = _Prefix(model, ids, bounds[0])
    clean = float(answers.odds(answers.scores(model, prefix.rows(1)).float().cpu(), target))
    used = [directions.layers[s] for s in slots]
    for start in range(0, len(plan), batch_size):
        part = plan[start : start + batch_size]
        where, sizes = [spans[s] for _, s, _ in part], torch.tensor([doses[d] for _, _, d in part])
        which = torch.tensor([v for v, _, _ in part])
        edits = [
            Add(site=directions.site, layer=layer, vector=vectors[which, i], coefficient=sizes, positions=where)
            for i, layer in enumerate(used)
        ]
        rows = prefix.rows(len(part))  # read outside the edits
        with edit(model, edits):
            scores = answers.scores(model, rows).float().cpu()
        for (v, s, d), value in zip(part, answers.odds(scores, target.expand(len(part))).tolist()):
            odds[v, s, d] = value
    change = odds - clean
    control = change[1:].mean(0) if n_controls else torch.full_like(change[0], torch.nan)
    return StepEffects(emotion, doses, change[0, :-1], change[0, -1], control[:-1], control[-1], clean)


class _Prefix:
    """Rows of the same text, what stands before the steps read once and cached where the model allows it."""

    def __init__(self, model: Any, ids: Sequence[int], start: int) -> None:
        device = next(unwrap(model).parameters()).device
        self.ids = torch.tensor([list(ids)], device=device)
        self.start = start if start > 1 and has_cache(model) else 0
        before = self.ids[:, : self.start]
        self.cache = prefix_cache(model, before, torch.ones_like(before)) if self.start else None

    def rows(self, n: int) -> dict[str, Any]:
        """Model inputs of n rows; each call has a cache of its own."""
        inputs = {
            "input_ids": self.ids[:, self.start :].expand(n, -1),
            "attention_mask": torch.ones(n, self.ids.shape[1], dtype=torch.long, device=self.ids.device),
        }
        if self.cache is None:
            return inputs
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(n)
        return {**inputs, "past_key_values": cache, "use_cache": True}
