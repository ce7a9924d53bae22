"""What an effect is an effect on: numbers that are linear in one site at the last position of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..directions import DirectionSet
from ..errors import HookError, InputError
from ..models.anatomy import resolve, unwrap


@torch.no_grad()
def direct_logits(model: Any, directions: Tensor) -> Tensor:
    """[n, vocabulary] what each residual direction [n, d_model] adds to the logits by the direct path.

    Through the final norm as if the direction were all there is, and the unembedding, less what both say of nothing.
    Raises HookError for a model without an LM head, InputError for directions of another size.
    """
    module = unwrap(model)
    anatomy = resolve(module)
    if anatomy.lm_head is None:
        raise HookError("this model has no LM head, so directions have no logits")
    if directions.dim() != 2 or directions.shape[1] != anatomy.d_model:
        raise InputError(f"directions must be [n, {anatomy.d_model}] for this model, not {list(directions.shape)}")
    norm: nn.Module = module.get_submodule(anatomy.point("final_norm", 0).module)
    head: nn.Module = module.get_submodule(anatomy.lm_head)
    like = next(head.parameters())
    given = torch.cat([directions.detach(), directions.new_zeros(1, anatomy.d_model)]).to(like.device, like.dtype)
    logits = head(norm(given[None]))[0].float()
    return logits[:-1] - logits[-1]


@dataclass(frozen=True)
class Readout:
    """One number per emotion: `weights` [E, width] times the activation at `site`, `layer`, last position."""

    emotions: tuple[str, ...]
    site: str
    layer: int
    weights: Tensor
    what: str

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InputError(f"a readout needs the layer's number counted from 0, got {self.layer}")

    def __call__(self, activation: Tensor) -> Tensor:
        """[R, E] for activations [R, width]."""
        return activation.float() @ self.weights.to(activation.device).T

    @classmethod
    def of_directions(cls, directions: DirectionSet, layer: int) -> Readout:
        """Projection on each emotion's unit direction, in units of the residual norm (the published emotion score)."""
        slot = directions.slots(layer)[0]
        weights = directions.units[:, slot] / directions.norms[slot]
        return cls(directions.emotions, directions.site, layer, weights, f"projection at layer {layer}")

    @classmethod
    def of_words(cls, model: Any, tokenizer: Any, words: dict[str, Sequence[str]]) -> Readout:
        """Mean logit of each emotion's words less that of the other emotions' words, at the next token.

        A behaviour, not a projection the units were chosen for. Words stand for their first token (with a leading
        space); raises InputError when two emotions share one, HookError for a model without an LM head.
        """
        module = unwrap(model)
        anatomy = resolve(module)
        if anatomy.lm_head is None:
            raise HookError("this model has no LM head, so words have no logits")
        ids = {e: {tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in ws} for e, ws in words.items()}
        seen: dict[int, str] = {}
        for emotion, tokens in ids.items():
            for token in tokens:
                if seen.setdefault(token, emotion) != emotion:
                    raise InputError(f"{emotion!r} and {seen[token]!r} share a first token; choose other words")
        unembedding = module.get_submodule(anatomy.lm_head).weight.detach().float()  # type: ignore[union-attr]
        means = torch.stack([unembedding[sorted(t)].mean(0) for t in ids.values()])
        others = (means.sum(0) - means) / (len(means) - 1)
        return cls(tuple(words), "final_norm", 0, means - others, "word logits")
