"""One measured trace on disk: a JSON file, and beside it a safetensors file with what grows with the square of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import artefact
from ..errors import InputError

KIND = "anchors_trace"
WINDOW = 60
"""Steps drawn at once: a trace may have thousands."""


@dataclass(frozen=True, eq=False)
class Lower:
    """Effects [target][source] of `n` steps on later ones, row by row without what is on or above the diagonal."""

    values: NDArray[np.float32]
    n: int

    def __post_init__(self) -> None:
        if self.values.shape != (wanted := self.n * (self.n - 1) // 2,):
            raise InputError(f"{self.n} steps have {wanted} effects on later ones, not {self.values.size}")

    @classmethod
    def of(cls, matrix: Any) -> Lower:
        """From a square matrix, of numbers or (as older runs have it) with None for undefined ones."""
        rows = [np.asarray(row[:i], dtype=np.float32) for i, row in enumerate(matrix)]
        return cls(np.concatenate([np.empty(0, np.float32), *rows]), len(rows))

    def block(self, start: int = 0, stop: int | None = None) -> list[list[float]]:
        """The square of the steps start to stop (exclusive); NaN where nothing is defined."""
        stop = self.n if stop is None else min(stop, self.n)
        found = np.full((stop - start, stop - start), np.nan)
        for i in range(start, stop):
            begin = i * (i - 1) // 2
            found[i - start, : i - start] = self.values[begin + start : begin + i]
        return found.tolist()


def write(path: Path, part: Mapping[str, Any]) -> None:
    """Save a trace as `path` (JSON) and `matrices(path)`; its arrays must be those that `read` gives."""
    kl: Lower = part["suppression"]["kl"]
    tensors = _defined("kl", kl.values) | _defined("vertical", part["receivers"]["vertical"])
    artefact.save(matrices(path), KIND, tensors, {"id": part["id"], "steps": kl.n})
    rest = {name: {k: v for k, v in part[name].items() if k not in ("kl", "vertical")} for name in _WITH_ARRAYS}
    artefact.write_json_atomic(path, {**part, **rest})  # last: where it is, the matrices are


_WITH_ARRAYS = ("suppression", "receivers")


def read(path: Path) -> dict[str, Any]:
    """A measured trace, suppression.kl as `Lower` and receivers.vertical [L, H, n]; those of older runs, too.

    Raises InputError for a missing or damaged file.
    """
    part = artefact.read_json(path)
    if "kl" in part["suppression"]:  # an older run: all in the JSON
        kl, vertical = Lower.of(part["suppression"]["kl"]), np.array(part["receivers"]["vertical"], dtype=np.float32)
    else:
        tensors, _ = artefact.load(matrices(path), KIND)
        kl, vertical = Lower(_undefined("kl", tensors), len(part["steps"])), _undefined("vertical", tensors)
    part["suppression"]["kl"], part["receivers"]["vertical"] = kl, vertical
    return part


def matrices(path: Path) -> Path:
    """The file beside a trace's JSON that holds its matrices."""
    return path.with_suffix(artefact.SUFFIX)


def _defined(name: str, values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Tensors without NaN, and where there was one the mask of the others."""
    unknown = np.isnan(values)
    found = {name: np.where(unknown, np.float32(0), values).astype(np.float32)}
    return found | ({f"{name}_defined": ~unknown} if unknown.any() else {})


def _undefined(name: str, tensors: Mapping[str, torch.Tensor]) -> NDArray[np.float32]:
    defined, values = tensors.get(f"{name}_defined"), tensors[name].numpy()
    return values if defined is None else np.where(defined.numpy(), values, np.float32("nan"))


def window(n: int, chosen: int, size: int = WINDOW) -> tuple[int, int]:
    """First and last (exclusive) of at most `size` steps around the chosen one."""
    start = max(0, min(chosen - size // 2, n - size))
    return start, min(n, start + size)


def strongest(rows: Sequence[Mapping[str, Any]]) -> int:
    """The step of the greatest importance, 0 when none has one."""
    values = np.array([r["value"] for r in rows], dtype=float)
    return 0 if np.isnan(values).all() else int(np.nanargmax(values))
