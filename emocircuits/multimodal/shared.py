"""Do modalities share an emotion's code? Directions fitted on one and read on another, and the units each uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import capture
from ..circuits.assemble import Circuit, overlap, top
from ..circuits.gradients import attribution
from ..circuits.readout import Readout
from ..directions import fit
from ..errors import InputError
from ..models.anatomy import resolve
from ..models.spans import ModalitySpans
from ..quality import cosines, held_out
from ..reading import Features
from .balance import spans_of

Batch = Mapping[str, Any]
ANSWER = "answer"
SITES = ("z", "mlp_post")


@torch.no_grad()
def read_spans(
    model: Any, batches: Sequence[tuple[Batch, Sequence[str], Sequence[str]]], spans: ModalitySpans | None = None
) -> dict[str, Features]:
    """{modality: readings} of resid_post, averaged over the modality's tokens, and of the last token ("answer").

    batches: (inputs, emotion of each row, group of each row); a group, such as a speaker, needs every emotion. Raises
    InputError for lengths that differ, or rows without a token of a modality that others in the batches have.
    """
    layers = tuple(range(resolve(model).n_layers))
    parts: dict[str, list[Tensor]] = {}
    labels, groups = [], []
    for inputs, emotions, members in batches:
        if not len(inputs["input_ids"]) == len(emotions) == len(members):
            raise InputError("every row of a batch needs an emotion and a group")
        found = spans_of(model, inputs, spans)
        acts = capture(model, inputs, "resid_post", positions="all")
        x = torch.stack([acts["resid_post", n] for n in layers], dim=1).float()  # [B, L, T, d]
        last = capture(model, inputs, "resid_post").stack("resid_post").transpose(0, 1)
        for name in found.present():
            mask = found.mask(name).to(x).unsqueeze(1).unsqueeze(-1)
            if not bool(mask.any(2).all()):
                raise InputError(f"some rows of a batch have no {name!r} token; put them in batches of their own")
            parts.setdefault(name, []).append(((x * mask).sum(2) / mask.sum(2)).cpu())
        parts.setdefault(ANSWER, []).append(last.float().cpu())
        labels += list(emotions)
        groups += list(members)
    uneven = [name for name, p in parts.items() if sum(map(len, p)) != len(labels)]
    if uneven:
        raise InputError(f"only some batches hold {uneven[0]!r}; read them in calls of their own")
    tags = (tuple(labels), tuple(groups), ("",) * len(labels), tuple(groups))
    return {name: Features(torch.cat(p), *tags, "resid_post", layers, name) for name, p in parts.items()}


def transfer(
    train: Mapping[str, Features], test: Mapping[str, Features], emotions: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Directions of each reading, tested on every other: rows of fit, read, layer, accuracy, low, high and cosine.

    The 95 % interval of the accuracy is clustered by group; chance is one over the emotions. cosine: mean over emotions
    of the two readings' directions. Raises InputError when the two do not name the same readings.
    """
    if set(train) != set(test):
        raise InputError("training and test readings must have the same names")
    sets = {name: fit(features, emotions, seed=seed) for name, features in train.items()}
    rows = []
    for a, directions in sets.items():
        for b, features in test.items():
            similar = cosines(directions, sets[b]).mean(0)
            for layer, score in enumerate(held_out(directions, features, seed=seed)):
                row = {"fit": a, "read": b, "layer": layer, "cosine": float(similar[layer])}
                rows.append({**row, **{k: score[k] for k in ("accuracy", "low", "high")}})
    return rows


def unit_effects(model: Any, batches: Sequence[tuple[Batch, Sequence[str]]], readout: Readout) -> dict[str, Tensor]:
    """What each unit does to its rows' own emotion: {"z": [E, L, heads], "mlp_post": [E, L, d_mlp]}, to first order.

    Attribution against the mean over all rows' last tokens; batches: (inputs, emotion of each row). Raises InputError
    for an emotion without a row.
    """
    layers = range(resolve(model).n_layers)
    sums: dict[str, Tensor] = {}
    rows = 0
    for inputs, _ in batches:
        acts = capture(model, inputs, list(SITES))
        for site in SITES:
            total = torch.stack([acts[site, n].float().sum(0) for n in layers])
            sums[site] = sums.get(site, torch.zeros_like(total)) + total
        rows += len(inputs["input_ids"])
    means = {site: total / rows for site, total in sums.items()}
    effects: dict[str, list[Tensor]] = {site: [] for site in SITES}
    labels: list[int] = []
    for inputs, emotions in batches:
        for site, value in attribution(model, inputs, readout, means).items():
            effects[site].append(value)
        labels += [readout.emotions.index(e) for e in emotions]
    if missing := set(range(len(readout.emotions))) - set(labels):
        raise InputError(f"no row shows {readout.emotions[min(missing)]}; every emotion of the readout needs one")
    return {site: _own(torch.cat(parts), torch.tensor(labels)) for site, parts in effects.items()}


def _own(effects: Tensor, labels: Tensor) -> Tensor:
    """[N, L, units, E] -> [E, L, units]: mean effect on the own emotion less that on the others."""
    n = effects.shape[-1]
    own = torch.stack([x[..., e] - (x.sum(-1) - x[..., e]) / (n - 1) for x, e in zip(effects, labels.tolist())])
    return torch.stack([own[labels == e].mean(0) for e in range(n)])


def shared_units(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], emotions: Sequence[str], n_heads: int, n_neurons: int
) -> list[dict[str, Any]]:
    """Overlap, corrected for chance (0 chance, 1 identity), of the best units of two modalities, for each emotion.

    a, b: `unit_effects` of prompts in one modality each. The control is another emotion's circuit in b.
    """
    made = [[_circuit(x, e, i, n_heads, n_neurons) for i, e in enumerate(emotions)] for x in (a, b)]
    totals = {"heads": a["z"][0].numel(), "neurons": a["mlp_post"][0].numel()}
    rows = []
    for i, emotion in enumerate(emotions):
        row: dict[str, Any] = {"emotion": emotion}
        for kind, n in totals.items():
            others = [overlap(made[0][i], c, kind, n)["excess"] for j, c in enumerate(made[1]) if j != i]
            row[kind] = overlap(made[0][i], made[1][i], kind, n) | {"other_emotion": float(np.mean(others))}
        rows.append(row)
    return rows


def _circuit(effects: Mapping[str, Tensor], emotion: str, index: int, n_heads: int, n_neurons: int) -> Circuit:
    return top(emotion, effects["z"][index], effects["mlp_post"][index], n_heads, n_neurons)
