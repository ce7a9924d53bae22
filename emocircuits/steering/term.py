"""The parts of a steerer: one vector per layer that is added, or a component along it that is removed or bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations.control import Control
from ..activations.edits import HEAD_SITES, POSITIONS, Add, Edit, Project
from ..activations.sites import check_site
from ..errors import InputError, unknown

SIDE = {"remove": "both", "cap": "above", "floor": "below"}
MODES = ("add", *SIDE)


@dataclass(frozen=True)
class Term:
    """One part of a steerer: `vectors` [n_layers, d_model] (or per row [B, n_layers, d_model]) at strength 1.

    mode "add": vectors are absolute (a unit direction times the mean residual norm of its layer), so a strength of 0.1
    moves the residual by a tenth of its norm on every model. "remove" puts the component along each vector to its level
    (directional ablation, Arditi et al., arXiv 2406.11717), "cap" and "floor" only what is above or below it; strength
    is then the share of the way (1: all of it). Rows of a batch differ by their vectors (`Steerer.rows`).
    """

    site: str
    layers: tuple[int, ...]
    vectors: Tensor
    strength: float = 1.0
    positions: str = "all"
    heads: int | None = None
    """At q, k, v and z: into how many heads the width is cut."""
    mode: str = "add"
    levels: Tensor | None = None
    """[n_layers] or [B, n_layers]: component along the unit vector, in activation units; zeros when None."""
    control: Control | None = None
    shares: Tensor | None = None
    """[B] per row: how much of a removal each row gets, times strength; ones when None."""

    def __post_init__(self) -> None:
        check_site(self.site)
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if (self.site in HEAD_SITES) != (self.heads is not None):
            raise InputError(f"a steering term at {self.site!r} {'needs' if self.heads is None else 'has no'} heads")
        if self.mode != "add" and self.heads is not None:
            raise InputError(f"components are removed from or bounded in the residual stream, not at {self.site!r}")
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        if self.vectors.dim() not in (2, 3) or self.vectors.shape[-2] != len(self.layers):
            raise InputError(
                f"a steering term over {len(self.layers)} layers needs vectors [n_layers, d_model] or"
                f" [B, n_layers, d_model], got {list(self.vectors.shape)}"
            )
        if self.levels is not None and self.levels.shape != self.vectors.shape[:-1]:
            raise InputError(f"levels {list(self.levels.shape)} do not fit vectors {list(self.vectors.shape)}")

    def edits(self) -> list[Edit]:
        """One edit per layer; none at strength zero, so that "off" is bit-identical to no steerer."""
        if self.strength == 0:
            return []
        where: dict[str, Any] = {"site": self.site, "positions": self.positions, "control": self.control}
        if self.mode == "add":
            return [
                Add(layer=layer, vector=self._vector(i) * self.strength, **where) for i, layer in enumerate(self.layers)
            ]
        share = self.strength if self.shares is None else self.shares * self.strength
        levels = torch.zeros(self.vectors.shape[:-1]) if self.levels is None else self.levels
        return [
            Project(
                layer=layer, direction=self.vectors[..., i, :], target=levels[..., i], amount=share,
                side=SIDE[self.mode], **where,
            )
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def _vector(self, i: int) -> Tensor:
        flat = self.vectors[..., i, :]
        return flat if self.heads is None else flat.unflatten(-1, (self.heads, -1))

    def described(self) -> str:
        """Mode, site and layers in words."""
        return f"{self.mode} at {self.site} of layer{'s' * (len(self.layers) > 1)} {_ranges(self.layers)}"


def merged(terms: Sequence[Term]) -> list[Edit]:
    """The edits of several terms: adds of one place are summed, removals and bounds follow in their order."""
    sums: dict[tuple[Any, ...], Add] = {}
    rest: list[Edit] = []
    for term in terms:
        for e in term.edits():
            if not isinstance(e, Add):
                rest.append(e)
                continue
            key = (e.site, e.layer, e.positions, e.vector.dim(), e.control)
            sums[key] = replace(sums[key], vector=sums[key].vector + e.vector) if key in sums else e
    return [*sums.values(), *rest]


def by_row(rows: Sequence[Sequence[Term]]) -> tuple[Term, ...]:
    """Terms of a batch whose row i has the terms rows[i]; rows without a term get zero vectors (or share zero)."""
    adds: dict[tuple[Any, ...], Tensor] = {}
    bounds: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
    n = len(rows)
    for row, terms in enumerate(rows):
        for number, term in enumerate(terms):
            if term.vectors.dim() == 3:
                raise InputError("a steerer that is already per row cannot be a row of another")
            for i, layer in enumerate(term.layers):
                place = (term.site, layer, term.positions, term.heads, term.control)
                vector = term.vectors[i].float().cpu()
                if term.mode == "add":
                    adds.setdefault(place, torch.zeros(n, len(vector)))[row] += vector * term.strength
                    continue
                fresh = (torch.ones(n, len(vector)), torch.zeros(n), torch.zeros(n))
                directions, levels, shares = bounds.setdefault((*place, term.mode, number), fresh)
                directions[row], shares[row] = vector, term.strength
                levels[row] = 0.0 if term.levels is None else float(term.levels[i])
    in_order = sorted(bounds.items(), key=lambda item: item[0][-1])  # as each row has them
    return (*_per_row_adds(adds), *_per_row_bounds(in_order))


def _per_row_adds(adds: dict[tuple[Any, ...], Tensor]) -> Iterator[Term]:
    for (site, layer, positions, heads, control), v in adds.items():
        yield Term(site, (layer,), v[:, None], 1.0, positions, heads, control=control)


def _per_row_bounds(bounds: Iterable[tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]]) -> Iterator[Term]:
    for (site, layer, positions, _, control, mode, _), (directions, levels, shares) in bounds:
        yield Term(
            site, (layer,), directions[:, None], 1.0, positions, None, mode, levels[:, None], control, shares
        )  # fmt: skip


def conflicts(terms: Sequence[Term], limit: float = 0.5) -> list[str]:
    """Pairs of terms that work against each other at a layer, one sentence each.

    Adds whose vectors oppose (cosine below -limit), and adds along a component that another term removes or bounds
    (cosine beyond limit either way).
    """
    found = []
    terms = [t for t in terms if t.strength != 0]
    for i, a in enumerate(terms):
        for b in terms[i + 1 :]:
            shared = sorted(set(a.layers) & set(b.layers))
            if a.site != b.site or not shared or a.vectors.dim() != 2 or b.vectors.dim() != 2:
                continue
            x, y = (torch.stack([t.vectors[t.layers.index(n)].float() for n in shared]) for t in (a, b))
            cosines = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            cosine = float(cosines[cosines.abs().argmax()])  # of the layer where they have most to do with each other
            if (a.mode, b.mode) == ("add", "add"):
                cosine = cosine if a.strength * b.strength > 0 else -cosine
                if cosine < -limit:
                    found.append(f"{a.described()} and {b.described()} push against each other (cosine {cosine:.2f})")
            elif "add" in (a.mode, b.mode) and abs(cosine) > limit:
                found.append(f"{a.described()} meets {b.described()} on the same component (cosine {cosine:.2f})")
    return found


def _ranges(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
