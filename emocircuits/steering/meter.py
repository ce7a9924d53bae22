"""How much of each emotion the text being written carries, read off the residual stream while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, unknown

if TYPE_CHECKING:
    from ..reading import Features


@dataclass(frozen=True, eq=False)
class Meter:
    """Probabilities of emotions from an activation at `site` and `layer`: softmax(weights [E, width] x + bias [E])."""

    emotions: tuple[str, ...]
    site: str
    layer: int
    weights: Tensor
    bias: Tensor

    def index(self, emotion: str) -> int:
        """Row of an emotion; raises InputError listing the choices."""
        if emotion not in self.emotions:
            raise unknown("emotion", emotion, self.emotions)
        return self.emotions.index(emotion)

    def to(self, device: torch.device) -> Meter:
        """The same meter on another device."""
        return replace(self, weights=self.weights.to(device), bias=self.bias.to(device))

    def probabilities(self, x: Tensor) -> Tensor:
        """[..., E] for activations [..., width]."""
        return (x.float() @ self.weights.to(x.device).T + self.bias.to(x.device)).softmax(-1)

    @classmethod
    def fit(cls, features: Features, layer: int, *, directions: Any = None, seed: int = 0) -> Meter:
        """Multinomial logistic regression on readings of whole texts at one layer.

        On the projections on `directions` (a DirectionSet of the same site) when given, else on the whole activation
        with a ridge penalty. Texts are taken as they are, without group centring, as a text being written has no group.
        Raises InputError for a layer that was not read or fewer than two emotions.
        """
        from sklearn.linear_model import LogisticRegression

        if layer not in features.layers:
            raise unknown("layer of these readings", layer, features.layers)
        emotions = tuple(dict.fromkeys(features.labels))
        if len(emotions) < 2:
            raise InputError("a meter tells emotions apart, so at least two are needed")
        x = features.x[:, features.layers.index(layer)].double()
        basis = torch.eye(x.shape[1], dtype=torch.double)
        if directions is not None:
            basis = directions.units[:, directions.slots(layer)[0]].double()
        center = x.mean(0)
        seen = (x - center) @ basis.T
        scale = seen.std(0).clamp_min(1e-12)
        y = [emotions.index(label) for label in features.labels]
        model = LogisticRegression(max_iter=2000, random_state=seed).fit((seen / scale).numpy(), y)
        coef, intercept = torch.as_tensor(model.coef_), torch.as_tensor(model.intercept_)
        if len(emotions) == 2:  # scikit-learn then keeps one row
            coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
        weights = (coef / scale) @ basis
        return cls(emotions, features.site, layer, weights.float(), (intercept - weights @ center).float())

    def to_data(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        """Plain JSON; weights and bias go into `tensors`."""
        tensors |= {f"{prefix}.weights": self.weights, f"{prefix}.bias": self.bias}
        return {"emotions": list(self.emotions), "site": self.site, "layer": self.layer}

    @classmethod
    def from_data(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Meter:
        """What `to_data` wrote."""
        weights, bias = tensors[f"{prefix}.weights"], tensors[f"{prefix}.bias"]
        return cls(tuple(data["emotions"]), data["site"], data["layer"], weights, bias)
