"""Emotion directions and how well they hold on scenarios and themes they were not fitted on.

Difference of means with group centring as in Wang et al. (arXiv 2510.11328, section 2 of their method), read at any
site and position, plus LDA and logistic probes with the same interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from . import artefact
from .data.emotions import EKMAN6
from .errors import HookError, InputError, unknown
from .models.fingerprint import fingerprint
from .reading import Example, Features, read, residual_norms
from .steering import SkipFirst, Steerer, Term

KIND = "directions"
METHODS = ("diff_means", "lda", "logistic")


@dataclass(frozen=True)
class DirectionSet:
    """One direction per emotion and layer: `vectors` [E, n_layers, width], in activation units.

    `norms` [n_layers] is the mean residual norm at each layer (the unit of strength), `center` [n_layers, width] the
    mean activation of the training readings, `quality` what was measured on held-out data.
    """

    emotions: tuple[str, ...]
    site: str
    layers: tuple[int, ...]
    vectors: Tensor
    norms: Tensor
    center: Tensor
    method: str = "diff_means"
    position: str = "response_mean"
    fingerprint: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def index(self, emotion: str) -> int:
        """Row of an emotion; raises InputError listing the choices."""
        if emotion not in self.emotions:
            raise unknown("emotion", emotion, self.emotions)
        return self.emotions.index(emotion)

    def slots(self, layers: int | Sequence[int] | None) -> list[int]:
        """Rows of `layers` in the tensors; raises InputError for a layer that was not read."""
        wanted = self.layers if layers is None else [layers] if isinstance(layers, int) else layers
        for layer in wanted:
            if layer not in self.layers:
                raise unknown("layer of these directions", layer, self.layers)
        return [self.layers.index(layer) for layer in wanted]

    @property
    def units(self) -> Tensor:
        """Unit directions [E, n_layers, width]."""
        return torch.nn.functional.normalize(self.vectors, dim=-1)

    def cosines(self, layer: int) -> Tensor:
        """Cosines [E, E] between the emotions' directions at one layer."""
        units = self.units[:, self.slots(layer)[0]]
        return units @ units.T

    def scores(self, features: Features, centred: bool = True) -> Tensor:
        """Projections [N, n_layers, E] of readings on the unit directions, in units of the residual norm.

        centred: subtract each group's mean (all emotions of one scenario); else the training centre, as for a text
        that stands alone. Raises InputError when the readings come from other sites or layers.
        """
        if (features.site, features.layers) != (self.site, self.layers):
            raise InputError(
                f"these directions are for {self.site!r} at layers {list(self.layers)}, the readings for"
                f" {features.site!r} at {list(features.layers)}"
            )
        x = centre(features) if centred else features.x - self.center
        return torch.einsum("nld,eld->nle", x, self.units) / self.norms[None, :, None]

    def select(self, layers: Sequence[int]) -> DirectionSet:
        """The same directions at fewer layers."""
        slots = self.slots(list(layers))
        return replace(
            self,
            layers=tuple(layers),
            vectors=self.vectors[:, slots],
            norms=self.norms[slots],
            center=self.center[slots],
        )

    def without(self, basis: Tensor, layers: Sequence[int] | None = None) -> DirectionSet:
        """Directions with the span of `basis` [k, width] projected out (say, of unembeddings of emotion nouns)."""
        q, _ = torch.linalg.qr(basis.float().T)
        vectors = self.vectors.clone()
        slots = self.slots(list(layers) if layers is not None else None)
        vectors[:, slots] -= vectors[:, slots] @ q @ q.T
        return replace(self, vectors=vectors, provenance={**self.provenance, "projected_out": len(basis)})

    def steerer(
        self,
        emotion: str,
        strength: float = 0.1,
        layers: int | Sequence[int] | None = None,
        positions: str = "all",
    ) -> Steerer:
        """A steerer that adds `strength` x residual norm along the emotion at each layer (default: all read layers)."""
        row, slots = self.index(emotion), self.slots(layers)
        vectors = self.units[row, slots] * self.norms[slots, None]
        used = tuple(self.layers[s] for s in slots)
        term = Term(self.site, used, vectors, float(strength), positions)
        made = {"method": self.method, "position": self.position, **self.provenance}
        return Steerer((term,), emotion, self.fingerprint, None, made)

    def limiter(
        self,
        emotion: str,
        mode: str = "remove",
        level: float = 0.0,
        layers: int | Sequence[int] | None = None,
        *,
        strength: float = 1.0,
        positions: str = "all",
    ) -> Steerer:
        """A steerer that puts the component along the emotion to `level` ("remove"), or bounds it ("cap", "floor").

        level: in residual norms from the mean over all emotions, so that "remove" at 0 takes out what the emotion adds
        and leaves what all texts share. strength: share of the way there. Layers default to all read layers. The first
        token of every row is left alone, see `SkipFirst`.
        """
        row, slots = self.index(emotion), self.slots(layers)
        vectors = self.units[row, slots]
        levels = (self.center[slots] * vectors).sum(-1) + level * self.norms[slots]
        used = tuple(self.layers[s] for s in slots)
        term = Term(self.site, used, vectors, float(strength), positions, mode=mode, levels=levels, control=SkipFirst())
        made = {"method": self.method, "position": self.position, "level": level, **self.provenance}
        return Steerer((term,), f"{mode} {emotion}", self.fingerprint, None, made)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        header = {
            "emotions": list(self.emotions),
            "site": self.site,
            "layers": list(self.layers),
            "method": self.method,
            "position": self.position,
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
            "quality": dict(self.quality),
            "provenance": dict(self.provenance),
        }
        return artefact.save(path, KIND, {n: getattr(self, n) for n in ("vectors", "norms", "center")}, header)

    @classmethod
    def load(cls, path: str | Path) -> DirectionSet:
        """Read saved directions; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, h = artefact.load(path, KIND)
        return cls(
            tuple(h["emotions"]),
            h["site"],
            tuple(h["layers"]),
            tensors["vectors"],
            tensors["norms"],
            tensors["center"],
            h["method"],
            h["position"],
            h["fingerprint"],
            h["quality"],
            h["provenance"],
        )


def agreement(a: DirectionSet, b: DirectionSet) -> Tensor:
    """Cosine [E, n_layers] of two sets' directions; raises InputError for sets of other emotions, layers or widths."""
    if (a.emotions, a.layers, a.vectors.shape) != (b.emotions, b.layers, b.vectors.shape):
        raise InputError("these directions are for other emotions, layers or widths, so they have no cosines")
    return (a.units * b.units).sum(-1)


def centre(features: Features) -> Tensor:
    """Readings minus the mean of their group, [N, n_layers, width]; every label weighs the same within a group."""
    _, index = np.unique(np.asarray(features.groups), return_inverse=True)
    group = torch.as_tensor(index)
    cells = [f"{g}\0{lab}" for g, lab in zip(features.groups, features.labels)]
    _, cell_of, counts = np.unique(cells, return_inverse=True, return_counts=True)
    weight = 1.0 / torch.as_tensor(counts)[torch.as_tensor(cell_of)].float()
    total = torch.zeros(int(group.max()) + 1).index_add_(0, group, weight)
    sums = torch.zeros(len(total), *features.x.shape[1:]).index_add_(0, group, features.x * weight[:, None, None])
    return features.x - (sums / total[:, None, None])[group]


def fit(
    features: Features,
    emotions: Sequence[str] = EKMAN6,
    *,
    norms: Tensor | None = None,
    method: str = "diff_means",
    fingerprint: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> DirectionSet:
    """Fit one direction per emotion and layer on complete groups (every emotion present).

    method: "diff_means"; "lda" (whitened by the shrunk within-emotion covariance); "logistic" (multinomial probe).
    norms: mean residual norms [n_layers] (default: norms of the readings). Raises InputError for fewer than two
    emotions or texts per emotion, HookError naming the layer when readings hold NaN.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if len(set(emotions)) < 2:
        raise InputError("directions contrast emotions, so at least two are needed")
    for slot, layer in enumerate(features.layers):
        if not torch.isfinite(features.x[:, slot]).all():
            raise HookError(f"readings at layer {layer} hold NaN or infinite values")
    kept = features.complete(emotions)
    if min(kept.labels.count(e) for e in emotions) < 2:
        raise InputError("only one text per emotion was given; at least two are needed to fit directions")
    x, labels = centre(kept), np.asarray([list(emotions).index(lab) for lab in kept.labels])
    means = torch.stack([x[torch.as_tensor(labels == e)].mean(0) for e in range(len(emotions))])
    means = means - means.mean(0)
    vectors = means if method == "diff_means" else _discriminant(x, labels, means, method, seed)
    return DirectionSet(
        emotions=tuple(emotions),
        site=kept.site,
        layers=kept.layers,
        vectors=vectors,
        norms=kept.x.norm(dim=-1).mean(0) if norms is None else norms,
        center=kept.x.mean(0),
        method=method,
        position=kept.position,
        fingerprint=fingerprint,
        provenance={"seed": seed, "n_groups": len(set(kept.groups)), "n_readings": len(kept)},
    )


def fit_examples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    emotions: Sequence[str] = EKMAN6,
    *,
    site: str = "resid_post",
    method: str = "diff_means",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[DirectionSet, Features]:
    """Read examples over their responses and `fit` them, with norms of the model's own tokens; the readings, too."""
    features = read(model, tokenizer, examples, site=site, progress=progress)
    norms = residual_norms(model, tokenizer, [e.prompt + e.response for e in examples[:64]], site)
    made = fit(features, emotions, norms=norms, method=method, fingerprint=fingerprint(model), seed=seed)
    return made, features


def _discriminant(x: Tensor, labels: np.ndarray, means: Tensor, method: str, seed: int) -> Tensor:
    """[E, n_layers, width] directions that separate the emotions given how readings vary within one."""
    from sklearn.covariance import LedoitWolf
    from sklearn.linear_model import LogisticRegression

    out = torch.zeros_like(means)
    for slot in range(x.shape[1]):
        rows = x[:, slot].numpy().astype(np.float64)
        if method == "lda":
            scale = rows.std() or 1.0
            within = (rows - means[labels, slot].numpy()) / scale
            covariance = LedoitWolf(assume_centered=True).fit(within).covariance_
            solved = np.linalg.solve(covariance, means[:, slot].numpy().T.astype(np.float64) / scale).T
        else:
            spread = rows.std(0) + 1e-9
            probe = LogisticRegression(C=0.01, max_iter=200, tol=1e-3, random_state=seed).fit(rows / spread, labels)
            solved = (
                probe.coef_ / spread if len(probe.coef_) > 1 else np.concatenate([-probe.coef_, probe.coef_]) / spread
            )
        out[:, slot] = torch.as_tensor(solved, dtype=torch.float32)
    return out - out.mean(0)


def token_basis(model: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Unembedding rows [k, d_model] of the first tokens of `words` (with and without a leading space)."""
    ids = {tokenizer(p + w, add_special_tokens=False)["input_ids"][0] for w in words for p in ("", " ")}
    return model.get_output_embeddings().weight.detach()[sorted(ids)].float().cpu()
