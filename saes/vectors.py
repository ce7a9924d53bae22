"""What an autoencoder is trained on: rows of one place in one model, split by trace, centred and scaled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emocircuits.activations.sites import Key
from emocircuits.activations.store import ActivationArray, ActivationStore
from emocircuits.errors import InputError, unknown
from emocircuits.models.fingerprint import check_fits


@dataclass(frozen=True)
class Vectors:
    """N rows [N, d] of one (site, layer), the trace each row comes from, and what is known of the model.

    Rows without a trace each stand alone. Raises InputError when there is not one trace per row.
    """

    rows: Tensor | ActivationArray = field(repr=False)
    traces: Sequence[str] | None = field(default=None, repr=False)
    key: Key = ("resid_post", 0)
    source: Mapping[str, Any] = field(default_factory=dict)  # header of the store: model fingerprint, reduction, ...

    def __post_init__(self) -> None:
        if len(self.rows.shape) != 2 or not len(self.rows):
            raise InputError(f"vectors must be a matrix [N, d] with rows in it, not {list(self.rows.shape)}")
        if self.traces is not None and len(self.traces) != len(self.rows):
            raise InputError(f"there are {len(self.rows)} vectors but {len(self.traces)} traces; give one per vector")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def d(self) -> int:
        """Numbers per vector."""
        return self.rows.shape[1]

    def read(self) -> Tensor:
        """All rows [N, d] float32. Raises InputError for NaN, infinite or constant data."""
        x = self.rows[:].float()
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(f"vector {row} of {self.key[0]} at layer {self.key[1]} holds NaN or infinity; drop it")
        if torch.equal(x, x[:1].expand_as(x)):
            raise InputError(f"the vectors of {self.key[0]} at layer {self.key[1]} are all the same; nothing to learn")
        return x

    def split(self, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to train on and held-out ones: whole traces, drawn by `seed`, about a share `held_out` of them.

        Raises InputError when there are not two traces to part.
        """
        names = list(map(str, range(len(self)))) if self.traces is None else list(self.traces)
        traces = sorted(set(names))
        if len(traces) < 2:
            raise InputError("all vectors are from one trace, so none can be held out; collect from at least two")
        n = min(max(round(held_out * len(traces)), 1), len(traces) - 1)
        drawn = {traces[i] for i in np.random.default_rng(seed).permutation(len(traces))[:n]}
        out = np.array([name in drawn for name in names])
        return np.flatnonzero(~out), np.flatnonzero(out)


def is_sink(x: Tensor, ratio: float = 5.0) -> Tensor:
    """[N] True for rows [N, d] whose norm is more than `ratio` times the median norm."""
    norms = x.float().norm(dim=1)
    return norms > ratio * norms.median()


def without_sinks(vectors: Vectors, ratio: float = 5.0) -> Vectors:
    """The vectors but for sinks (see `is_sink`); `source` then says how many were left out.

    A few tokens of many models carry a norm ten times that of all others and say little. In squares they weigh a
    hundred times as much, so an SAE that has learned nothing but them explains most of the variance.
    """
    x = vectors.read()
    keep = (~is_sink(x, ratio)).nonzero()[:, 0]
    traces = None if vectors.traces is None else [vectors.traces[i] for i in keep.tolist()]
    note = {"sinks_left_out": len(x) - len(keep), "sink_ratio": ratio}
    return replace(vectors, rows=x[keep], traces=traces, source={**vectors.source, **note})


def stored(store: ActivationStore, keys: Sequence[Key] | None = None, model: nn.Module | None = None) -> list[Vectors]:
    """The vectors of each wanted key of a store, which stay on disk until they are read.

    With `model`, raises ArtefactError unless the store was collected from it; InputError for a key it does not hold.
    """
    for key in keys or store.keys:
        if key not in store.keys:
            raise unknown("place in this store", key, store.keys)
    if model is not None and store.header.get("model"):
        check_fits(store.header["model"], model, strict=True)
    traces = [str(record.get("trace", i)) for i, record in enumerate(store.meta)]
    return [Vectors(store[key], traces, key, store.header) for key in keys or store.keys]


@dataclass(frozen=True)
class Scaling:
    """x -> (x - centre) * factor: rows with mean zero and mean norm sqrt(d), the units SAE recipes are written in."""

    centre: Tensor  # [d]
    factor: float

    @classmethod
    def of(cls, x: Tensor) -> Scaling:
        """The scaling of rows x [N, d]. Raises InputError when they do not differ."""
        centre = x.double().mean(0)
        norm = float((x - centre).norm(dim=1).mean())
        if not norm > 0:
            raise InputError("the vectors are all the same; there is nothing to scale")
        return cls(centre.to(x.dtype), x.shape[1] ** 0.5 / norm)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.centre) * self.factor


def digest(x: Tensor) -> str:
    """A hash of rows [N, d], so that training resumes on the data it began with."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
