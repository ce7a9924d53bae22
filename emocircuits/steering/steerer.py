"""Steerers: small objects that push a model's residual stream, plugged into anybody's inference code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import artefact
from ..activations.control import Control
from ..activations.edit import Installed, edit
from ..activations.edits import Edit
from ..activations.sites import expand_layers
from ..errors import ArtefactError, HookError, InputError
from ..models.anatomy import resolve, unwrap
from ..models.fingerprint import check_fits
from .controls import Window, combined, from_data, to_data
from .term import Term, by_row, conflicts, merged

KIND = "steerer"
TENSORS = ("vectors", "levels", "shares")


@dataclass
class Steerer:
    """What users attach: ``with steerer.attach(model): model.generate(...)``.

    Compose with ``a + 0.5 * b``; negate to suppress; `when` gives it a schedule, a gate or a closed loop;
    `Steerer.rows` gives every row of a batch its own, `Steerer.sequence` every stretch of a text.
    ``@steerer.attach(model)`` decorates a function. `cost` is the cost card (what this strength gains and what it
    costs, measured), `fingerprint` the model it was made on.
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
        return self._with(tuple(replace(t, strength=float(strength)) for t in self.terms))

    def at(self, positions: str) -> Steerer:
        """The same steerer on "all", "prompt", "generated" or "last" positions."""
        return self._with(tuple(replace(t, positions=positions) for t in self.terms))

    def steady(self) -> Steerer:
        """What it does when it is fully on: at all positions, without schedules and gates."""
        terms = (replace(t, control=None if t.control and t.control.timed else t.control) for t in self.terms)
        return self._with(tuple(replace(t, positions="all") for t in terms))

    def _with(self, terms: tuple[Term, ...]) -> Steerer:
        """The same steerer with other terms, so without the cost card, which is about these."""
        return replace(self, terms=terms, cost=None, _installed=None)

    def when(self, control: Control) -> Steerer:
        """The same steerer, its strength times a control (see `steering.controls`), on top of any it has."""
        made: dict[Control | None, Control] = {c: combined(c, control) for c in {t.control for t in self.terms}}
        return self._with(tuple(replace(t, control=made[t.control]) for t in self.terms))

    def randomised(self, seed: int = 0) -> Steerer:
        """The control: random directions of the same norms at the same places, when the steerer itself is on.

        Raises InputError for a steerer that removes or bounds components: what level a random one has is not known.
        """
        if any(t.mode != "add" for t in self.terms):
            raise InputError(f"{self.name!r} removes or bounds a component, so it has no random control of its norm")
        generator = torch.Generator().manual_seed(seed)
        terms = tuple(replace(t, vectors=_random_like(t.vectors, generator)) for t in self.terms)
        return replace(self._with(terms), name=f"random ({self.name})")

    @staticmethod
    def sequence(parts: Sequence[tuple[Steerer | None, int | None]]) -> Steerer:
        """Steerers that take turns: each for its number of generated tokens (None: to the end), None not steering."""
        start, made = 0, []
        for number, (steerer, tokens) in enumerate(parts):
            if tokens is None and number + 1 < len(parts) or tokens is not None and tokens < 1:
                raise InputError("a sequence gives every part a number of tokens; only the last may go on to the end")
            stop = None if tokens is None else start + tokens
            made += [] if steerer is None else [steerer.when(Window(start, stop))]
            start = start if stop is None else stop
        if not made:
            raise InputError("a sequence needs at least one steerer that is not None")
        terms = tuple(term for part in made for term in part.terms)
        return Steerer(terms, ">".join(s.name if s else "off" for s, _ in parts), _common(made))

    def conflicts(self) -> list[str]:
        """Terms that work against each other at the same layers, one sentence each; `+` warns of them."""
        return conflicts(self.terms)

    def __mul__(self, factor: float) -> Steerer:
        scaled = tuple(replace(t, strength=t.strength * factor) for t in self.terms)
        return replace(self._with(scaled), name=f"{factor:g}*{self.name}")

    __rmul__ = __mul__

    def __neg__(self) -> Steerer:
        return self * -1.0

    def __add__(self, other: Steerer) -> Steerer:
        made = Steerer(self.terms + other.terms, f"{self.name}+{other.name}", _common([self, other]))
        known = {*self.conflicts(), *other.conflicts()}
        if new := [c for c in made.conflicts() if c not in known]:
            warnings.warn(f"{made.name}: {'; '.join(new)}", UserWarning, stacklevel=2)
        return made

    @staticmethod
    def rows(steerers: Sequence[Steerer | None]) -> Steerer:
        """One steerer for a whole batch: row i is steered by steerers[i] (None: not at all).

        Raises InputError for an empty list, or when one of them is already per row.
        """
        given = [s for s in steerers if s is not None]
        if not given:
            raise InputError("Steerer.rows needs at least one steerer that is not None")
        fingerprint = _common(given)
        terms = by_row([s.terms if s else () for s in steerers])
        names = ",".join(s.name if s else "off" for s in steerers)
        return Steerer(terms, f"rows({names})", fingerprint)

    def edits(self) -> list[Edit]:
        """The edits this steerer consists of, one per site, layer and positions (sums are taken here, once)."""
        return merged(self.terms)

    @contextmanager
    def attach(
        self, model: Any, *, compile_to: str = "auto", strict: bool = True, this_thread: bool = False
    ) -> Iterator[Steerer]:
        """Steer every forward pass inside the block; after it the model is bit-identical to before.

        this_thread: only the passes that the calling thread runs, so that threads can steer one model differently.
        Raises ArtefactError when the steerer was made for another model (warns when only the weights differ), HookError
        when it never fired or while another thread steers the model.
        """
        self._check_and_warn(model)
        edits = self.edits()
        if not edits:
            yield self
            return
        with edit(model, edits, compile_to=compile_to, strict=strict, this_thread=this_thread):
            yield self

    def install(self, model: Any, *, compile_to: str = "auto") -> Steerer:
        """Steer from now on, until `remove()`. Raises HookError when already installed."""
        if self._installed is not None:
            raise HookError(f"{self.name!r} is already installed; call remove() first")
        self._check_and_warn(model)
        self._installed = Installed(model, unwrap(model), self.edits(), compile_to)
        return self

    def remove(self) -> None:
        """Undo `install`; safe to call when nothing is installed."""
        if self._installed is not None:
            self._installed.remove()
            self._installed = None

    def _check_and_warn(self, model: Any) -> None:
        if warning := self.check(model):
            warnings.warn(f"steerer {self.name!r} was {warning}", UserWarning, stacklevel=4)

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
        tensors: dict[str, Tensor] = {}
        controls = list(dict.fromkeys(t.control for t in self.terms if t.control is not None))
        header = {
            "name": self.name,
            "controls": [to_data(c, tensors, f"control{i}") for i, c in enumerate(controls)],
            "terms": [_term_data(t, i, controls, tensors) for i, t in enumerate(self.terms)],
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
            "cost": dict(self.cost) if self.cost else None,
            "provenance": dict(self.provenance),
        }
        return artefact.save(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Steerer:
        """Read a saved steerer; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, header = artefact.load(path, KIND)
        controls = [from_data(c, tensors, f"control{i}") for i, c in enumerate(header["controls"])]
        terms = tuple(_term(t, i, controls, tensors) for i, t in enumerate(header["terms"]))
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


def _random_like(vectors: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(vectors.shape, generator=generator)
    return torch.nn.functional.normalize(noise, dim=-1) * vectors.norm(dim=-1, keepdim=True)


def _term_data(term: Term, i: int, controls: list[Control], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A term as plain JSON; its tensors go into `tensors`."""
    tensors |= {f"term{i}.{n}": v for n in TENSORS if (v := getattr(term, n)) is not None}
    data = {k: getattr(term, k) for k in ("site", "strength", "positions", "heads", "mode")}
    return data | {
        "layers": list(term.layers),
        "control": None if term.control is None else controls.index(term.control),
    }


def _term(data: Mapping[str, Any], i: int, controls: list[Control], tensors: Mapping[str, Tensor]) -> Term:
    """What `_term_data` wrote."""
    control = data["control"]
    return Term(
        data["site"], tuple(data["layers"]), tensors[f"term{i}.vectors"], data["strength"], data["positions"],
        data["heads"], data["mode"], tensors.get(f"term{i}.levels"),
        None if control is None else controls[control], tensors.get(f"term{i}.shares"),
    )  # fmt: skip


def _common(steerers: Sequence[Steerer]) -> Mapping[str, Any] | None:
    """The fingerprint of the model that all these were made for; raises InputError when they are for different ones."""
    known = [s for s in steerers if s.fingerprint]
    for other in known[1:]:
        if (other.fingerprint or {}).get("config_sha256") != (known[0].fingerprint or {}).get("config_sha256"):
            raise InputError(
                f"{known[0].name!r} and {other.name!r} were made for different models and cannot be combined"
            )
    return known[0].fingerprint if known else None
