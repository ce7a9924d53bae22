"""Attention reallocation on the trained model: every policy over its strengths, the choice, and a random control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from model import collate, label_probabilities
from numpy.typing import NDArray
from sets import EvaluationSet
from torch import Tensor

from emocircuits.activations import capture
from emocircuits.models.spans import ModalitySpans, placeholders
from emocircuits.steering.contrast import ContrastiveDecoding, noised
from emocircuits.steering.policies import Boost, Multiply, Policy, SetPoint, Sinks, Transfer
from emocircuits.steering.reallocation import Reallocation

Around = Callable[[dict[str, Tensor]], AbstractContextManager[Any]]
Sets = Mapping[str, EvaluationSet]

FEATURES = {"audio": "input_features", "image": "pixel_values"}
DRAWS = 5
"""Random spans that the control averages over."""
ALLOWED_LOSS = 0.02
"""How much accuracy on consistent validation clips a chosen strength may cost."""


@dataclass(frozen=True)
class Contrast:
    """Contrastive decoding against a clip whose `modality` is noise in this share of its variance (VCD)."""

    modality: str
    alpha: float
    share: float

    def probabilities(self, model: Any, items: Sequence[Any]) -> NDArray[np.float64]:
        """[n, 6], from two forward passes a prompt."""

        def processor(inputs: dict[str, Tensor]) -> ContrastiveDecoding:
            return ContrastiveDecoding(model, noised(inputs, [FEATURES[self.modality]], self.share), self.alpha)

        return label_probabilities(model, items, processor=processor)


@dataclass(frozen=True)
class Setting:
    """One policy at one strength; `way` names what is compared: the policy and its queries."""

    way: str
    strength: float
    made: Reallocation | Contrast


def settings(source: str, target: str, sink_size: float) -> Iterator[Setting]:
    """Every way and strength of moving attention from the trusted modality (source) to the other (target)."""
    families: dict[str, tuple[Sequence[float], Callable[[float], Policy]]] = {
        "multiply source": (
            (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0),
            lambda s: Multiply({source: s}),
        ),
        "multiply both": (
            (1.5, 3, 6, 12, 25, 50, 100, 200),
            lambda s: Multiply({source: 1 / s, target: s}),
        ),
        "transfer": ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), lambda s: Transfer(source, target, s)),
        "set point": ((2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1), lambda s: SetPoint(source, target, s)),
        "sinks": ((0.9, 0.75, 0.6, 0.4, 0.2, 0.0), lambda s: Sinks(target, s, sink_size, least=0.05)),
        "boost": ((0.1, 0.2, 0.4, 0.7, 1, 1.5, 2.5, 4), lambda s: Boost(target, s)),
    }
    for family, (strengths, policy) in families.items():
        for queries in ("last",) if family == "boost" else ("last", "after"):
            for strength in strengths:
                yield Setting(f"{family}, {queries}", strength, Reallocation(policy(strength), queries=queries))
    for share in (0.5, 1.0):
        for alpha in (0.25, 0.5, 1, 2, 4, 8):
            yield Setting(f"contrast, {share:.0%} noise", alpha, Contrast(target, alpha, share))


def gaps(p: NDArray[np.float64], clips: EvaluationSet) -> NDArray[np.float64]:
    """[n] P(emotion of the voice) - P(emotion of the face) of conflict clips."""
    rows = np.arange(len(p))
    return p[rows, clips.heard] - p[rows, clips.seen]


def right(p: NDArray[np.float64], clips: EvaluationSet) -> NDArray[np.float64]:
    """[n] 1 where the likeliest answer is the emotion shown."""
    return (p.argmax(1) == np.maximum(clips.heard, clips.seen)).astype(np.float64)


def probabilities(model: Any, clips: EvaluationSet, made: Reallocation | Contrast | None) -> NDArray[np.float64]:
    """[n, 6] with or without a reallocation."""
    if isinstance(made, Contrast):
        return made.probabilities(model, clips.items)
    with made.attach(model) if made is not None else nullcontext():
        return label_probabilities(model, clips.items)


def sweep(model: Any, sets: Sets, tried: Sequence[Setting], each: Callable[[], None]) -> list[dict[str, Any]]:
    """Gap and consistent accuracy of each setting on the validation sets; `each` is called after every one."""
    rows = []
    for setting in tried:
        gap, consistent = measured(model, sets, setting.made)
        rows.append({"way": setting.way, "strength": setting.strength, "gap": gap, "consistent": consistent})
        each()
    return rows


def measured(
    model: Any, sets: Mapping[str, EvaluationSet], made: Reallocation | Contrast | None = None
) -> tuple[float, float]:
    """Mean gap on the conflict set, and accuracy on the consistent one."""
    gap = gaps(probabilities(model, sets["conflict"], made), sets["conflict"])
    return float(gap.mean()), float(right(probabilities(model, sets["consistent"], made), sets["consistent"]).mean())


def choose(rows: Sequence[Mapping[str, Any]], tried: Sequence[Setting], consistent: float) -> list[Setting]:
    """Of each way the strength with the smallest absolute gap among those that keep the consistent accuracy."""
    best: dict[str, tuple[float, Setting]] = {}
    for row, setting in zip(rows, tried):
        kept = row["consistent"] >= consistent - ALLOWED_LOSS
        if kept and (setting.way not in best or abs(row["gap"]) < best[setting.way][0]):
            best[setting.way] = (abs(row["gap"]), setting)
    return [setting for _, setting in best.values()]


def random_spans(model: Any, made: Reallocation, seed: int) -> Around:
    """The same policy with audio and image labels dealt out at random: sizes, weights and gated queries stay."""
    generator, tokens = torch.Generator().manual_seed(seed), placeholders(model)

    def around(inputs: dict[str, Tensor]) -> AbstractContextManager[Any]:
        return made.attach(model, ModalitySpans.of_ids(inputs["input_ids"], tokens).dealt(generator))

    return around


def control(model: Any, clips: EvaluationSet, made: Reallocation | Contrast, seed: int) -> list[NDArray[np.float64]]:
    """DRAWS times [n, 6] under random spans; of a contrast, once with the noise in the other modality."""
    if isinstance(made, Contrast):
        other = next(name for name in FEATURES if name != made.modality)
        return [replace(made, modality=other).probabilities(model, clips.items)]
    return [label_probabilities(model, clips.items, around=random_spans(model, made, seed + k)) for k in range(DRAWS)]


@torch.no_grad()
def sink_size(model: Any, clips: EvaluationSet, share: float = 0.02) -> float:
    """Size above which a dimension of the normalised residual makes a token a sink: that of the top `share` of tokens.

    The published size, 20, belongs to models with massive activations; in width 96 none can exceed the root of 96.
    """
    sizes = []
    for item in clips.items[:64]:
        x = capture(model, collate([item]), "resid_pre", positions="all").stack("resid_pre").float()
        sizes.append((x.abs() * x.pow(2).mean(-1, keepdim=True).rsqrt()).amax(-1).flatten())
    return float(torch.cat(sizes).quantile(1 - share))


def attention_shares(model: Any, clips: EvaluationSet) -> dict[str, list[float]]:
    """{modality or "text": mean attention of the last query to its tokens, in each layer}."""
    sums: dict[str, list[Tensor]] = {}
    tokens = placeholders(model)
    for item in clips.items[:64]:
        inputs = collate([item])
        last = capture(model, inputs, "pattern").stack("pattern")[..., -1, :]  # [layers, 1, heads, keys]
        spans = ModalitySpans.of_ids(inputs["input_ids"], tokens)
        for name in ("audio", "image", "text"):
            sums.setdefault(name, []).append((last * spans.mask(name)[0]).sum(-1).mean((1, 2)))
    return {name: torch.stack(x).mean(0).tolist() for name, x in sums.items()}
