"""From scores to a circuit: which heads and neurons, how many, and by which rule.

Rules: "quota" (the published budget: a share per sublayer by influence, with floors), "top" (the best K anywhere), and
`greedy` (add what raises a measured behaviour most). Positive and negative members are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import artefact
from ..errors import InputError

KIND = "circuit"
KINDS = ("heads", "neurons")

Unit = tuple[int, int]
"""(layer, head) or (layer, neuron)."""


@dataclass(frozen=True)
class Circuit:
    """Members of one emotion's circuit with their scores; a negative score works against the emotion."""

    emotion: str
    heads: tuple[Unit, ...]
    neurons: tuple[Unit, ...]
    head_scores: tuple[float, ...]
    neuron_scores: tuple[float, ...]
    rule: str = "top"
    fingerprint: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.heads) + len(self.neurons)

    def units(self, kind: str) -> tuple[Unit, ...]:
        """Members of kind "heads" or "neurons"."""
        return self.heads if kind == "heads" else self.neurons

    def signed(self, positive: bool) -> Circuit:
        """Only the members that work for the emotion, or only those that work against it."""
        keep = {
            kind: [(u, s) for u, s in zip(self.units(kind), scores) if (s > 0) == positive]
            for kind, scores in (("heads", self.head_scores), ("neurons", self.neuron_scores))
        }
        return replace(
            self,
            heads=tuple(u for u, _ in keep["heads"]),
            head_scores=tuple(s for _, s in keep["heads"]),
            neurons=tuple(u for u, _ in keep["neurons"]),
            neuron_scores=tuple(s for _, s in keep["neurons"]),
        )

    def counts(self, kind: str, n_layers: int) -> list[int]:
        """Members of one kind in each layer."""
        return np.bincount([layer for layer, _ in self.units(kind)], minlength=n_layers).tolist()

    def mask(self, kind: str, n_layers: int, width: int) -> Tensor:
        """[n_layers, width] True on members."""
        out = torch.zeros(n_layers, width, dtype=torch.bool)
        for layer, unit in self.units(kind):
            out[layer, unit] = True
        return out

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        tensors = {k: torch.tensor(self.units(k), dtype=torch.int32).reshape(-1, 2) for k in KINDS}
        tensors["head_scores"] = torch.tensor(self.head_scores)
        tensors["neuron_scores"] = torch.tensor(self.neuron_scores)
        header = {
            "emotion": self.emotion, "rule": self.rule, "provenance": dict(self.provenance),
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
        }  # fmt: skip
        return artefact.save(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a saved circuit; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, h = artefact.load(path, KIND)
        units = {k: tuple((int(a), int(b)) for a, b in tensors[k].tolist()) for k in KINDS}
        scores = {k: tuple(tensors[k].tolist()) for k in ("head_scores", "neuron_scores")}
        return cls(h["emotion"], **units, **scores, rule=h["rule"], fingerprint=h["fingerprint"],
                   provenance=h["provenance"])  # fmt: skip


def allocate(
    influence: Sequence[float], total: int, available: int, *, floor: int = 0, cap_share: float = 0.4
) -> list[int]:
    """Units per layer for a budget of `total`, by influence clipped at zero, with `floor` units in every layer first.

    The rest is shared by influence, rounded down, capped at `cap_share` of the budget per layer, and filled up by
    largest remainder; what exceeds `available` per layer goes to the layers with the largest shares. This is the
    published rule, bit for bit. Raises InputError when more units are asked for than exist.
    """
    weights = np.clip(np.asarray(influence, dtype=float), 0, None)
    n = len(weights)
    if total > available * n:
        raise InputError(f"a budget of {total} units was asked for, but {n} layers hold {available * n}")
    if total < floor * n:
        floor = 1 if total >= n else 0
    share = weights / weights.sum() if weights.sum() > 0 else np.full(n, 1 / n)
    rest = total - floor * n
    cap = int(cap_share * total)
    raw = share * rest
    counts = np.minimum(np.floor(raw).astype(int), cap)
    order = np.argsort(-(raw - np.floor(raw)), kind="stable")
    _fill(counts, rest - int(counts.sum()), order, np.full(n, cap if cap * n >= rest else rest))
    counts += floor
    surplus = int(np.clip(counts - available, 0, None).sum())
    counts = np.minimum(counts, available)
    _fill(counts, surplus, np.argsort(-share, kind="stable"), np.full(n, available))
    return counts.tolist()


def _fill(counts: np.ndarray, missing: int, order: np.ndarray, limit: np.ndarray) -> None:
    """Hand out `missing` units one at a time in `order`, round after round, below `limit`."""
    while missing > 0:
        open_ = [i for i in order if counts[i] < limit[i]]
        for i in open_[:missing]:
            counts[i] += 1
        missing -= min(missing, len(open_))
        if not open_:
            return


def by_counts(
    emotion: str, head_scores: Tensor, neuron_scores: Tensor, counts: Mapping[str, Sequence[int]], **made: Any
) -> Circuit:
    """The best counts[kind][layer] units of each layer by signed score [L, width] (published: also negative ones).

    NaN ranks last. Raises InputError when a layer has fewer units.
    """
    picked: dict[str, Any] = {"emotion": emotion}
    for kind, scores in (("heads", head_scores), ("neurons", neuron_scores)):
        units: list[Unit] = []
        for layer, k in enumerate(counts[kind]):
            if k > scores.shape[1]:
                raise InputError(f"{k} {kind} were asked for in layer {layer}, which has {scores.shape[1]}")
            units += [(layer, int(u)) for u in scores[layer].nan_to_num(-torch.inf).topk(k).indices]
        picked |= _members(kind, units, scores)
    return Circuit(**picked, rule="quota", **made)


def top(
    emotion: str,
    head_scores: Tensor,
    neuron_scores: Tensor,
    n_heads: int,
    n_neurons: int,
    *,
    signed: bool = True,
    **made: Any,
) -> Circuit:
    """The n_heads and n_neurons units with the largest scores [L, width] anywhere (signed=False: by absolute value).

    Units without effect (score 0 or NaN) are never members. Raises InputError when more are asked for than exist.
    """
    picked: dict[str, Any] = {"emotion": emotion}
    for kind, scores, k in (("heads", head_scores, n_heads), ("neurons", neuron_scores, n_neurons)):
        if k > scores.numel():
            raise InputError(f"{k} {kind} were asked for, but the model has {scores.numel()}")
        flat = scores.nan_to_num(-torch.inf).flatten() if signed else scores.nan_to_num().abs().flatten()
        best = [i for i in flat.topk(k).indices.tolist() if scores.flatten()[i] != 0 and np.isfinite(float(flat[i]))]
        picked |= _members(kind, [divmod(i, scores.shape[1]) for i in best], scores)
    return Circuit(**picked, rule="top", **made)


def _members(kind: str, units: Sequence[Unit], scores: Tensor) -> dict[str, Any]:
    return {kind: tuple(units), f"{kind[:-1]}_scores": tuple(float(scores[u]) for u in units)}


def greedy(pool: Circuit, measure: Callable[[list[Circuit]], Sequence[float]], size: int, **made: Any) -> Circuit:
    """Grow a circuit from `pool`, each time by the member that raises `measure` (of many circuits at once) most.

    Stops at `size` members or when nothing raises it further; `measure` is a behaviour, higher is better.
    """
    everything = [("heads", u, s) for u, s in zip(pool.heads, pool.head_scores)]
    everything += [("neurons", u, s) for u, s in zip(pool.neurons, pool.neuron_scores)]
    chosen: list[tuple[str, Unit, float]] = []
    best = float(measure([_built(pool, [], made)])[0])
    while len(chosen) < size and len(chosen) < len(everything):
        rest = [m for m in everything if m not in chosen]
        values = np.asarray(measure([_built(pool, [*chosen, m], made) for m in rest]), dtype=float)
        if not values.max() > best:
            break
        best = float(values.max())
        chosen.append(rest[int(values.argmax())])
    return _built(pool, chosen, made)


def _built(pool: Circuit, members: Sequence[tuple[str, Unit, float]], made: Mapping[str, Any]) -> Circuit:
    parts: dict[str, Any] = {}
    for kind in KINDS:
        mine = [(u, s) for k, u, s in members if k == kind]
        parts[kind], parts[f"{kind[:-1]}_scores"] = tuple(u for u, _ in mine), tuple(s for _, s in mine)
    return replace(pool, rule="greedy", **parts, **made)


def random_like(
    circuit: Circuit,
    widths: Mapping[str, int],
    n_layers: int,
    *,
    layer_matched: bool = True,
    sizes: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Circuit:
    """A control with as many units of each kind that are no members: same counts per layer, or anywhere.

    sizes: kind -> [n_layers, width] activation sizes; then each member is replaced by one of the layer's units nearest
    to it in size. A layer that is short of non-members borrows from the nearest layer that is not; members come in
    only when no other unit is left. Scores are NaN.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {}
    for kind in KINDS:
        taken = circuit.mask(kind, n_layers, widths[kind]).numpy()
        units = _matched(circuit, kind, taken, rng, None if sizes is None else sizes[kind].numpy(), layer_matched)
        parts[kind], parts[f"{kind[:-1]}_scores"] = tuple(units), (float("nan"),) * len(units)
    name = "size-matched" if sizes is not None else "layer-matched" if layer_matched else "random"
    return replace(circuit, rule=f"{name} random", **parts)


def _matched(
    circuit: Circuit, kind: str, taken: np.ndarray, rng: np.random.Generator, sizes: np.ndarray | None, by_layer: bool
) -> list[Unit]:
    members = circuit.units(kind)
    if not by_layer:
        pool = np.argwhere(~taken)
        pool = pool if len(pool) >= len(members) else np.argwhere(taken | True)
        return [(int(a), int(b)) for a, b in rng.permutation(pool)[: len(members)]]
    free = {layer: rng.permutation(np.flatnonzero(~row)).tolist() for layer, row in enumerate(taken)}
    spare = {layer: rng.permutation(np.flatnonzero(row)).tolist() for layer, row in enumerate(taken)}
    out: list[Unit] = []
    for layer, unit in sorted(members):
        near = sorted(free, key=lambda other, at=layer: abs(other - at))
        at = next((other for other in near if free[other]), None)
        source, at = (free, at) if at is not None else (spare, layer)
        pick = 0
        if sizes is not None:
            pick = int(np.argmin([abs(sizes[at, other] - sizes[layer, unit]) for other in source[at]]))
        out.append((at, int(source[at].pop(pick))))
    return out


def overlap(a: Circuit, b: Circuit, kind: str, n_units: int) -> dict[str, float]:
    """Jaccard overlap of two circuits' members, what chance gives, and the excess over chance (1 would be identity).

    Published overlaps lack this: a quarter of all heads overlaps by 0.2 by chance, a thousandth of all neurons by 0.
    NaN when both are empty.
    """
    x, y = set(a.units(kind)), set(b.units(kind))
    if not x | y:
        return {"jaccard": float("nan"), "chance": float("nan"), "excess": float("nan")}
    found = len(x & y) / len(x | y)
    expected = len(x) * len(y) / n_units
    chance = expected / (len(x) + len(y) - expected)
    return {
        "jaccard": found,
        "chance": chance,
        "excess": (found - chance) / (1 - chance) if chance < 1 else float("nan"),
    }
