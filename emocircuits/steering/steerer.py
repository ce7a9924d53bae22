"""Steerers: small objects that push a model's residual stream, plugged into anybody's inference code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artefact
from ..activations.edit import Installed, edit
from ..activations.edits import HEAD_SITES, POSITIONS, Add, Edit
from ..activations.sites import check_site, expand_layers
from ..errors import ArtefactError, HookError, InputError, unknown
from ..models.anatomy import resolve, unwrap
from ..models.fingerprint import check_fits

KIND = "steerer"


@dataclass(frozen=True)
class Term:
    """One addend of a steerer: `vectors` [n_layers, d_model] (or per row [B, n_layers, d_model]) at strength 1.

    Vectors are absolute (a unit direction times the mean residual norm of its layer), so a strength of 0.1 moves
    the residual by a tenth of its norm on every model. Rows of a batch differ by their vectors (`Steerer.rows`).
    """

    site: str
    layers: tuple[int, ...]
    vectors: Tensor
    strength: float = 1.0
    positions: str = "all"
    heads: int | None = None
    """At q, k, v and z: into how many heads the width is cut."""

    def __post_init__(self) -> None:
        check_site(self.site)
        if (self.site in HEAD_SITES) != (self.heads is not None):
            raise InputError(f"a steering term at {self.site!r} {'needs' if self.heads is None else 'has no'} heads")
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        if self.vectors.dim() not in (2, 3) or self.vectors.shape[-2] != len(self.layers):
            raise InputError(
                f"a steering term over {len(self.layers)} layers needs vectors [n_layers, d_model] or"
                f" [B, n_layers, d_model], got {list(self.vectors.shape)}"
            )

    def edits(self) -> list[Edit]:
        """One Add per layer; none at strength zero, so that "off" is bit-identical to no steerer."""
        if self.strength == 0:
            return []
        return [
            Add(site=self.site, layer=layer, vector=self._vector(i) * self.strength, positions=self.positions)
            for i, layer in enumerate(self.layers)
        ]

    def _vector(self, i: int) -> Tensor:
        flat = self.vectors[..., i, :]
        return flat if self.heads is None else flat.unflatten(-1, (self.heads, -1))


@dataclass
class Steerer:
    """What users attach: ``with steerer.attach(model): model.generate(...)``.

    Compose with ``a + 0.5 * b``; negate to suppress; `Steerer.rows` gives every row of a batch its own. `cost` is
    the cost card (what this strength gains and what it costs, measured), `fingerprint` the model it was made on.
    """

    terms: tuple[Term, ...]
    name: str = "steerer"
    fingerprint: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    _installed: Installed | None = field(default=None, repr=False, compare=False)

    @property
    def strength(self) -> float:
        """The common strength of all terms (NaN when they differ)."""
        values = {term.strength for term in self.terms}
        return values.pop() if len(values) == 1 else float("nan")

    def with_strength(self, strength: float) -> Steerer:
        """The same steerer at another strength (in units of the residual norm)."""
        if strength != strength or strength in (float("inf"), float("-inf")):
            raise InputError(f"strength must be a finite number, got {strength}")
        return replace(self, terms=tuple(replace(t, strength=float(strength)) for t in self.terms), _installed=None)

    def at(self, positions: str) -> Steerer:
        """The same steerer on "all", "prompt", "generated" or "last" positions."""
        return replace(self, terms=tuple(replace(t, positions=positions) for t in self.terms), _installed=None)

    def __mul__(self, factor: float) -> Steerer:
        scaled = tuple(replace(t, strength=t.strength * factor) for t in self.terms)
        return replace(self, terms=scaled, name=f"{factor:g}*{self.name}", cost=None, _installed=None)

    __rmul__ = __mul__

    def __neg__(self) -> Steerer:
        return self * -1.0

    def __add__(self, other: Steerer) -> Steerer:
        if self.fingerprint and other.fingerprint and not _same_model(self.fingerprint, other.fingerprint):
            raise InputError(f"{self.name!r} and {other.name!r} were made for different models and cannot be added")
        return Steerer(
            self.terms + other.terms, f"{self.name}+{other.name}", self.fingerprint or other.fingerprint, None
        )

    @staticmethod
    def rows(steerers: Sequence[Steerer | None]) -> Steerer:
        """One steerer for a whole batch: row i is steered by steerers[i] (None: not at all).

        Raises InputError for an empty list, or when one of them is already per row.
        """
        given = [s for s in steerers if s is not None]
        if not given:
            raise InputError("Steerer.rows needs at least one steerer that is not None")
        merged: dict[tuple[str, int, str, int | None], Tensor] = {}
        for row, steerer in enumerate(steerers):
            for term in steerer.terms if steerer else ():
                if term.vectors.dim() == 3:
                    raise InputError(f"{steerer.name!r} is already per row and cannot be a row of another")  # type: ignore[union-attr]
                for i, layer in enumerate(term.layers):
                    key = (term.site, layer, term.positions, term.heads)
                    stacked = merged.setdefault(key, torch.zeros(len(steerers), term.vectors.shape[-1]))
                    stacked[row] += term.vectors[i].float().cpu() * term.strength
        terms = tuple(Term(site, (layer,), v[:, None], 1.0, pos, n) for (site, layer, pos, n), v in merged.items())
        names = ",".join(s.name if s else "off" for s in steerers)
        return Steerer(terms, f"rows({names})", given[0].fingerprint)

    def edits(self) -> list[Edit]:
        """The edits this steerer consists of, one per site, layer and positions (sums are taken here, once)."""
        merged: dict[tuple[str, int, str, int], Tensor] = {}
        for term in self.terms:
            for e in term.edits():
                assert isinstance(e, Add)
                key = (e.site, e.layer, str(e.positions), e.vector.dim())
                merged[key] = merged[key] + e.vector if key in merged else e.vector
        return [Add(site=s, layer=layer, vector=v, positions=p) for (s, layer, p, _), v in merged.items()]

    @contextmanager
    def attach(self, model: Any, *, compile_to: str = "auto", strict: bool = True) -> Iterator[Steerer]:
        """Steer every forward pass inside the block; after it the model is bit-identical to before.

        Raises ArtefactError when the steerer was made for another model, HookError when it never fired.
        """
        self.check(model)
        edits = self.edits()
        if not edits:
            yield self
            return
        with edit(model, edits, compile_to=compile_to, strict=strict):
            yield self

    def install(self, model: Any, *, compile_to: str = "auto") -> Steerer:
        """Steer from now on, until `remove()`. Raises HookError when already installed."""
        if self._installed is not None:
            raise HookError(f"{self.name!r} is already installed; call remove() first")
        self.check(model)
        self._installed = Installed(model, unwrap(model), self.edits(), compile_to)
        return self

    def remove(self) -> None:
        """Undo `install`; safe to call when nothing is installed."""
        if self._installed is not None:
            self._installed.remove()
            self._installed = None

    def check(self, model: Any) -> str | None:
        """Raise ArtefactError when this steerer cannot fit the model; a warning text when only weights differ."""
        anatomy = resolve(model)
        for term in self.terms:
            expand_layers(term.layers, anatomy.n_layers)
            width = anatomy.n_units(term.site) * (anatomy.head_dim if term.heads else 1)
            if term.vectors.shape[-1] != width:
                raise ArtefactError(
                    f"steerer {self.name!r} has width {term.vectors.shape[-1]}, but this {anatomy.family} model has"
                    f" {width} at {term.site!r}; it was made for another model"
                )
        return check_fits(self.fingerprint, unwrap(model)) if self.fingerprint else None

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        tensors = {f"term{i}.vectors": t.vectors for i, t in enumerate(self.terms)}
        header = {
            "name": self.name,
            "terms": [
                {k: getattr(t, k) for k in ("site", "strength", "positions", "heads")} | {"layers": list(t.layers)}
                for t in self.terms
            ],
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
            "cost": dict(self.cost) if self.cost else None,
            "provenance": dict(self.provenance),
        }
        return artefact.save(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Steerer:
        """Read a saved steerer; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, header = artefact.load(path, KIND)
        terms = tuple(
            Term(
                t["site"],
                tuple(t["layers"]),
                tensors[f"term{i}.vectors"],
                t["strength"],
                t["positions"],
                t.get("heads"),
            )
            for i, t in enumerate(header["terms"])
        )
        return cls(terms, header["name"], header["fingerprint"], header["cost"], header["provenance"])

    def push_to_hub(self, repo_id: str | Path, **options: Any) -> str:
        """Upload with a model card, or write the same files into a local folder; see `hub.push` for the options."""
        from .hub import push

        return push(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, where: str | Path, **options: Any) -> Steerer:
        """Read from a hub repository or a local folder; see `hub.pull` for the options and errors."""
        from .hub import pull

        return cls.load(pull(where, **options))


def _same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.get("config_sha256") == b.get("config_sha256")
