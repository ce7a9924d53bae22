"""How to train: one recipe for five architectures, in units of scaled vectors, and SAELens's config made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import NormalDist
from typing import Any

from emocircuits.errors import InputError, unknown

from .lens import TrainingSAE, get_sae_training_class
from .topk import SparseTopKTrainingSAE

ARCHITECTURES = {
    "standard": "standard",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "matryoshka": "matryoshka_batchtopk",
}


@dataclass(frozen=True)
class Recipe:
    """Settings for tens of thousands of vectors; `options` go to SAELens's config as they are.

    architecture: one of `ARCHITECTURES`. width: number of latents. k: active latents per vector (exactly, on average,
    or as JumpReLU's target). l1: the penalty of a standard SAE, in units of sqrt(d). epochs: passes over the training
    vectors at most; it stops early after `patience` of them without a better held-out loss. lr: Adam's, warmed up over
    the first share `warm_up` of all steps, then falling along a cosine. held_out: share of the traces that is never
    trained on, drawn by `split_seed`. seed: of the first weights and the order of the data; SAEs of several seeds learn
    from the same vectors.
    """

    architecture: str = "topk"
    width: int = 2048
    k: int = 32
    l1: float = 0.2
    epochs: int = 100
    patience: int = 10
    batch_size: int = 1024
    lr: float = 1e-3
    warm_up: float = 0.1
    held_out: float = 0.1
    seed: int = 0
    split_seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise unknown("architecture", self.architecture, ARCHITECTURES)
        for name in ("width", "k", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.k > self.width:
            raise InputError(f"k = {self.k} latents cannot be active in a dictionary of width {self.width}; lower k")
        for name in ("warm_up", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is a share between 0 and 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"lr must be positive, not {self.lr}")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as JSON would give it back. Raises InputError for options that JSON cannot hold."""
        try:
            return json.loads(json.dumps(asdict(self) | {"options": dict(self.options)}))
        except (TypeError, ValueError) as error:
            raise InputError(f"the options of a recipe must be plain values ({error})") from error

    def check(self, n: int, d: int) -> None:
        """Raise InputError when n vectors of size d cannot train a dictionary of this width."""
        if n < self.width:
            raise InputError(
                f"{n:,} training vectors are too few for a dictionary of width {self.width:,}: collect at least as many"
                " as it has latents (ten times as many is better), or lower the width"
            )
        if self.k >= d and self.architecture != "standard":
            raise InputError(f"k = {self.k} active latents span all {d} dimensions, so nothing is sparse; lower k")

    def sae(self, d: int, warm_up_steps: int, metadata: Any) -> TrainingSAE[Any]:
        """A fresh SAE for vectors of size d, from torch's random state. Raises InputError for unknown options."""
        make, config = get_sae_training_class(ARCHITECTURES[self.architecture])
        given = (
            {"d_in": d, "d_sae": self.width, "metadata": metadata} | self._own(d, warm_up_steps) | dict(self.options)
        )
        known = {f.name for f in fields(config)}
        for name in given:
            if name not in known:
                raise unknown(f"option of a {self.architecture} SAE", name, sorted(known))
        cfg: Any = config(**given)
        return (SparseTopKTrainingSAE if self.architecture == "topk" else make)(cfg)

    def _own(self, d: int, warm_up_steps: int) -> dict[str, Any]:
        """What each architecture needs beyond its sizes."""
        unit = {"decoder_init_norm": 1.0}
        if self.architecture == "standard":
            return unit | {"l1_coefficient": self.l1 * d**0.5, "l1_warm_up_steps": warm_up_steps}
        if self.architecture == "jumprelu":
            # A threshold moves by lr a step at most, so it starts where a random direction passes k vectors in `width`.
            share = min(self.k / self.width, 0.5)
            start = {"jumprelu_init_threshold": max(NormalDist().inv_cdf(1 - share), 0.01), "jumprelu_bandwidth": 0.5}
            quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": self.k}
            return unit | start | quadratic | {"l0_warm_up_steps": warm_up_steps}
        if self.architecture == "matryoshka":
            nested = sorted({max(self.width // part, 1) for part in (8, 4, 2, 1)})
            return unit | {"k": self.k, "matryoshka_widths": nested}
        return unit | {"k": self.k}
