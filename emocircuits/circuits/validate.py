"""Does a circuit carry the emotion? Ablate it, keep nothing but it, enhance it, always beside controls.

Conditions run as rows of shared batches: one forward pass holds the same texts under many interventions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ..activations import capture
from ..activations.edit import edit
from ..activations.edits import Ablate, Add, Blend, Edit
from ..data.prompts import encode_prompt
from ..errors import InputError, unknown
from ..reading import Example, pad
from .assemble import Circuit
from .readout import Readout
from .units import Units

ACTIONS = ("ablate", "keep", "enhance")
BASELINES = ("mean", "zero", "resample")


@dataclass(frozen=True)
class Condition:
    """What happens to a text of each emotion: its `circuits[emotion]` is ablated, alone kept, or enhanced.

    baseline: what ablated units hold instead: their "mean" over all texts, "zero", or "resample" (the mean of another
    emotion and theme, drawn per text). strength scales the difference that "enhance" adds.
    """

    name: str
    circuits: Mapping[str, Circuit]
    action: str = "ablate"
    baseline: str = "mean"
    strength: float = 1.0

    def __post_init__(self) -> None:
        for what, value, choices in (("action", self.action, ACTIONS), ("baseline", self.baseline, BASELINES)):
            if value not in choices:
                raise unknown(what, value, choices)


@torch.no_grad()
def scores(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    readout: Readout,
    units: Units,
    conditions: Sequence[Condition],
    *,
    rows: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "validating",
) -> Tensor:
    """[n_examples, 1 + n_conditions] emotion score of each text: untouched first, then under each condition.

    The score is the readout of the text's own emotion less the mean of the others'. Raises InputError when texts,
    readout and units are not about the same emotions.
    """
    if set(readout.emotions) != set(units.emotions):
        raise InputError(
            f"the readout is about {', '.join(readout.emotions)}, the units about {', '.join(units.emotions)};"
            " both must have the same emotions"
        )
    for example in examples:
        if example.label not in units.emotions:
            raise unknown("emotion", example.label, units.emotions)
    order = sorted(range(len(examples)), key=lambda i: len(_text(examples[i])))
    jobs = [(i, c) for i in order for c in range(len(conditions) + 1)]
    masks = [_masks(c, units) for c in conditions]
    means = {site: units.baseline(site) for site in ("z", "mlp_post")}
    deltas = {site: units.deltas(site) for site in means}
    out = torch.zeros(len(examples), len(conditions) + 1)
    task = progress.add_task(title, total=len(jobs)) if progress else None
    for start in range(0, len(jobs), rows):
        part = jobs[start : start + rows]
        ids, mask = pad([encode_prompt(tokenizer, _text(examples[i])) for i, _ in part], "right", 0)
        labels = [units.emotions.index(examples[i].label) for i, _ in part]
        edits = list(_edits(part, labels, conditions, masks, units, means, deltas, seed))
        device = next(model.parameters()).device if hasattr(model, "parameters") else ids.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if edits:
            with edit(model, edits, compile_to="hook", strict=False):
                found = capture(model, inputs, readout.site, readout.layer)
        else:
            found = capture(model, inputs, readout.site, readout.layer)
        values = readout(next(iter(found.values()))).cpu()
        column = torch.tensor([readout.emotions.index(examples[i].label) for i, _ in part])
        own = values[torch.arange(len(part)), column]
        contrast = own - (values.sum(1) - own) / (values.shape[1] - 1)
        for (i, c), value in zip(part, contrast):
            out[i, c] = value
        if progress is not None and task is not None:
            progress.advance(task, len(part))
    return out


def _text(example: Example) -> str:
    return example.prompt + example.continuation + example.response


def _masks(condition: Condition, units: Units) -> tuple[Tensor, Tensor]:
    """([E, L, heads], [E, L, d_mlp]) True where a unit is touched."""
    n_layers, n_heads = units.z.shape[2:4]
    width = units.mlp_post.shape[-1]
    heads = torch.zeros(len(units.emotions), n_layers, n_heads, dtype=torch.bool)
    neurons = torch.zeros(len(units.emotions), n_layers, width, dtype=torch.bool)
    for e, emotion in enumerate(units.emotions):
        if emotion in condition.circuits:
            heads[e] = condition.circuits[emotion].mask("heads", n_layers, n_heads)
            neurons[e] = condition.circuits[emotion].mask("neurons", n_layers, width)
    return (~heads, ~neurons) if condition.action == "keep" else (heads, neurons)


def _edits(
    part: Sequence[tuple[int, int]], labels: Sequence[int], conditions: Sequence[Condition],
    masks: Sequence[tuple[Tensor, Tensor]], units: Units,
    means: Mapping[str, Tensor], deltas: Mapping[str, Tensor], seed: int,
) -> Iterator[Edit]:  # fmt: skip
    """Per-row edits of one batch: at z and mlp_post of every layer, what each row's condition asks for."""
    for kind, site in enumerate(means):
        for layer in range(len(means[site])):
            shape = means[site][layer].shape
            keep = torch.ones(len(part), *shape[:1], *((1,) if site == "z" else ()))
            value, push = torch.zeros(len(part), *shape), torch.zeros(len(part), *shape)
            for row, (i, c) in enumerate(part):
                if c == 0:
                    continue
                condition, mask = conditions[c - 1], masks[c - 1][kind][labels[row], layer].float()
                mask = mask[:, None] if site == "z" else mask
                if condition.action == "enhance":
                    push[row] = condition.strength * mask * deltas[site][labels[row], layer]
                    continue
                keep[row] = 1 - mask
                if condition.baseline == "mean":
                    value[row] = means[site][layer]
                elif condition.baseline == "resample":
                    value[row] = _other_cell(getattr(units, site), labels[row], seed + i)[layer]
            if bool((keep != 1).any()):
                yield Blend(site=site, layer=layer, keep=keep, value=value)
            if bool(push.any()):
                yield Add(site=site, layer=layer, vector=push)


def _other_cell(cells: Tensor, label: int, seed: int) -> Tensor:
    """The mean of a random other emotion and theme, the same for every layer and site of one text."""
    rng = np.random.default_rng(seed)
    n, folds = cells.shape[:2]
    emotion = (label + 1 + int(rng.integers(n - 1))) % n
    return cells[emotion, int(rng.integers(folds))]


def mean_ablation(circuit: Circuit, units: Units, positions: Any = "all") -> list[Edit]:
    """Edits that hold a circuit's heads and neurons at their mean over all emotions; none for an empty circuit."""
    edits: list[Edit] = []
    for kind, site in (("heads", "z"), ("neurons", "mlp_post")):
        baseline = units.baseline(site)
        for at in sorted({at for at, _ in circuit.units(kind)}):
            members = [unit for place, unit in circuit.units(kind) if place == at]
            value = baseline[at][members]
            edits.append(Ablate(site=site, layer=at, units=members, positions=positions, mode="mean", value=value))
    return edits


def normalised(full: np.ndarray, part: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    """(part - nothing) / (full - nothing) over clusters [..., n]: 1 is the whole effect, 0 none.

    Means first, then the ratio; NaN where full and nothing do not differ.
    """
    gap = full.mean(-1) - nothing.mean(-1)
    return np.where(np.abs(gap) > 1e-12, (part.mean(-1) - nothing.mean(-1)) / np.where(gap == 0, 1, gap), np.nan)


def ratio_interval(
    full: np.ndarray,
    part: np.ndarray,
    nothing: np.ndarray,
    clusters: Sequence[str],
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, float | None]:
    """`normalised` over texts [n] with a 95 % bootstrap interval clustered by scenario.

    Raises InputError for fewer than two scenarios.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        raise InputError("an interval needs texts of at least two scenarios")
    sums = np.stack([np.bincount(index, weights=v, minlength=len(names)) for v in (full, part, nothing)])
    rng = np.random.default_rng(seed)
    drawn = sums[:, rng.integers(len(names), size=(n_boot, len(names)))]
    values = normalised(drawn[0], drawn[1], drawn[2])
    estimate = float(normalised(*sums))
    if not np.isfinite(estimate):
        return {"estimate": None, "low": None, "high": None}
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"estimate": estimate, "low": float(low), "high": float(high)}


def area(ks: Sequence[int], values: Sequence[float]) -> float:
    """Mean height of a curve over log k (area under it divided by its width); NaN with fewer than two finite points."""
    pairs = [(np.log(k), v) for k, v in zip(ks, values) if v is not None and np.isfinite(v)]
    if len(pairs) < 2:
        return float("nan")
    x, y = np.asarray(pairs).T
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (x[-1] - x[0]))
