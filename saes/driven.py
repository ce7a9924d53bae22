"""Which latents a circuit drives: what is left of their activation when its heads and neurons hold their mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emocircuits.activations.edit import edit
from emocircuits.activations.edits import Edit
from emocircuits.activations.sites import Key
from emocircuits.circuits.assemble import Circuit, random_like
from emocircuits.circuits.units import Units
from emocircuits.circuits.validate import mean_ablation, ratio_interval
from emocircuits.errors import InputError
from emocircuits.evaluation.statistics import paired_test
from emocircuits.reasoning.traces import Trace

from .features import check_latents, encode_items
from .metrics import Coder
from .splice import check_place
from .tokens import Splitter, paragraphs, place_steps

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Driven:
    """Shares of a latent's activation, summed over tokens, that are lost when units are ablated, with 95 % intervals.

    whole: its mean activation per token. lost: without the circuit's units. random: without as many others of the same
    layers, mean over draws. p: of the difference, paired by cluster. A latent that fires nowhere has no share (None).
    """

    latent: int
    whole: float
    lost: dict[str, float | None]
    random: dict[str, float | None]
    p: float


@torch.no_grad()
def driven_by(
    model: Any,
    tokenizer: Any,
    sae: Coder,
    key: Key,
    traces: Iterable[Trace | str],
    latents: Sequence[int],
    circuit: Circuit,
    units: Units,
    *,
    split: Splitter = paragraphs,
    draws: int = 5,
    batch_size: int = 8,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Driven]:
    """How much of each latent is the circuit's doing, beside random units of its layers.

    clusters: of the traces, such as scenarios; intervals and tests are over them (default: each trace by itself).
    Raises InputError before any forward pass for latents that do not exist, an empty circuit or one wholly above `key`,
    fewer than two traces, other clusters than traces, and as `check_place` and `place_steps` do.
    """
    check_place(model, sae, key)
    check_latents(sae, latents)
    reach = key[1] + (key[0] in ("resid_post", "mlp_out"))  # layers from here on come after what latents read
    circuit = _below(circuit, reach)
    if not len(circuit):
        raise InputError(f"no unit of this circuit lies below {key[0]} {key[1]}, so it cannot drive latents there")
    items = place_steps(model, tokenizer, traces, "all", split)
    if len(items) < 2:
        raise InputError("intervals need at least two traces")
    names = [item.trace for item in items] if clusters is None else list(clusters)
    if len(names) != len(items):
        raise InputError(f"{len(items)} traces were given, but {len(names)} clusters; give one for each trace")
    widths = {"heads": units.z.shape[3], "neurons": units.mlp_post.shape[-1]}
    others = [_below(random_like(circuit, widths, units.z.shape[2], seed=seed + i), reach) for i in range(draws)]

    def sums(edits: Sequence[Edit]) -> Floats:
        """[traces, latents] activation summed over a trace's tokens."""
        with edit(model, list(edits)) if edits else nullcontext():
            codes = encode_items(model, tokenizer, sae, key, items, batch_size)
        return np.array([np.asarray(code[:, list(latents)].sum(0)).ravel() for code in codes], dtype=np.float64)

    whole, without = sums([]), sums(mean_ablation(circuit, units))
    control = np.mean([sums(mean_ablation(other, units)) for other in others], axis=0)
    nothing, n = np.zeros(len(items)), sum(len(item.read) for item in items)
    found = []
    for j, latent in enumerate(latents):
        lost, random = (
            ratio_interval(whole[:, j], (whole - left)[:, j], nothing, names, seed=seed) for left in (without, control)
        )
        p = paired_test(control[:, j], without[:, j], names, seed=seed).p
        found.append(Driven(latent, float(whole[:, j].sum()) / n, lost, random, p))
    return found


def _below(circuit: Circuit, reach: int) -> Circuit:
    """The members in layers under `reach`."""
    parts: dict[str, Any] = {}
    for kind, scores in (("heads", circuit.head_scores), ("neurons", circuit.neuron_scores)):
        kept = [(unit, score) for unit, score in zip(circuit.units(kind), scores) if unit[0] < reach]
        parts[kind], parts[f"{kind[:-1]}_scores"] = tuple(u for u, _ in kept), tuple(s for _, s in kept)
    return replace(circuit, **parts)
