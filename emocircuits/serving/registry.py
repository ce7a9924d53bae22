"""The steerers of a server: a closed list that the operator loads at start-up; clients only ever name them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown
from ..steering.steerer import Steerer

Wish = tuple[tuple[str, float], ...]
"""What a request asks for: names with multiples of the artefacts' own strengths, sorted, without zeros."""


class Registry:
    """Steerers by name. `max_strength` bounds how far a client may multiply one."""

    def __init__(self, steerers: Mapping[str, Steerer] | None = None, max_strength: float = 4.0) -> None:
        for name in steerers or {}:
            if not re.fullmatch(r"[\w.-]+", name):
                raise InputError(f"steerer name {name!r} may hold letters, digits, '_', '-' and '.' only")
        self.steerers, self.max_strength = dict(steerers or {}), max_strength
        self.combined = lru_cache(maxsize=256)(self._combined)

    @classmethod
    def load(cls, given: Sequence[str], max_strength: float = 4.0) -> Registry:
        """From "name=file.safetensors" arguments; raises InputError or ArtefactError for a wrong one."""
        steerers: dict[str, Steerer] = {}
        for argument in given:
            name, separator, path = argument.partition("=")
            if not separator or not path:
                raise InputError(f"cannot read --steerer {argument!r}; write it like fear=fear.safetensors")
            if name in steerers:
                raise InputError(f"steerer {name!r} is given twice; choose another name for one of them")
            if not Path(path).is_file():
                raise InputError(f"steerer file {path} does not exist; check the path")
            steerers[name] = Steerer.load(path)
        return cls(steerers, max_strength)

    def check(self, model: Any) -> None:
        """Raise ArtefactError when a steerer does not fit the model, InputError when it cannot be served.

        Those are steerers with a schedule, gate or closed loop: requests of all ages share a pass.
        """
        for name, steerer in self.steerers.items():
            steerer.check(model)
            if any(t.control is not None and t.control.timed for t in steerer.terms):
                raise InputError(
                    f"steerer {name!r} changes its strength while a text is written, which a server's shared passes"
                    " cannot do; serve it without that control"
                )

    def wish(self, asked: Mapping[str, float]) -> Wish:
        """A checked request; raises InputError for a name that is not here and a strength out of bounds."""
        for name, strength in asked.items():
            if name not in self.steerers:
                raise unknown("steerer", name, sorted(self.steerers) or ["(this server has none)"])
            if not math.isfinite(strength):
                raise InputError(f"the strength of {name!r} must be a finite number, got {strength}")
            if abs(strength) > self.max_strength:
                raise InputError(
                    f"strength {strength:g} of {name!r} is beyond this server's limit of {self.max_strength:g} times"
                    " the steerer's own"
                )
        return tuple(sorted((name, float(s)) for name, s in asked.items() if s != 0))

    def _combined(self, wish: Wish) -> Steerer | None:
        """The sum of what was asked for; None when that is nothing."""
        if not wish:
            return None
        parts = [replace(self.steerers[name] * strength, fingerprint=None) for name, strength in wish]
        return Steerer(tuple(term for part in parts for term in part.terms), "+".join(p.name for p in parts))

    def cards(self) -> list[dict[str, Any]]:
        """What a client may know of each steerer, its cost card included, as plain JSON values."""
        return [
            {
                "id": name,
                "object": "steerer",
                "strength": _plain(steerer.strength),
                "max_multiple": self.max_strength,
                "positions": sorted({t.positions for t in steerer.terms}),
                "layers": sorted({layer for t in steerer.terms for layer in t.layers}),
                "cost": _plain(steerer.cost),
            }
            for name, steerer in sorted(self.steerers.items())
        ]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, no infinities, no tuples."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
