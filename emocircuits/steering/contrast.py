"""Contrastive decoding against a distorted clip (VCD, arXiv 2311.16922), to compare reallocation with.

It needs a second pass for every token; reallocation needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import InputError, unknown


def noised(inputs: Mapping[str, Any], features: Sequence[str], share: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """The inputs with Gaussian noise as `share` of the variance of each named feature tensor, as diffusion adds it.

    Raises InputError for a feature that is not there, or a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of noise lies between 0 and 1, got {share}")
    generator, made = torch.Generator().manual_seed(seed), dict(inputs)
    for name in features:
        if name not in inputs:
            raise unknown("feature", name, inputs)
        x = inputs[name]
        noise = torch.randn(x.shape, generator=generator).to(x) * x.float().std().to(x)
        made[name] = math.sqrt(1 - share) * (x - x.mean()) + math.sqrt(share) * noise + x.mean()
    return made


class ContrastiveDecoding(LogitsProcessor):
    """(1 + alpha) logits - alpha logits of the distorted prompt, on tokens within log(beta) of the best.

    distorted: the prompt's inputs with other features (see `noised`) or without a modality, same ids. Rows of beams are
    followed by repeating the prompt's. Every step runs the distorted text anew, so this costs a pass per token.
    `generate(**inputs, logits_processor=[ContrastiveDecoding(model, distorted)])`. Raises InputError for a negative
    alpha, beta outside (0, 1], or rows that do not fit.
    """

    def __init__(self, model: Any, distorted: Mapping[str, Any], alpha: float = 1.0, beta: float = 0.1) -> None:
        if alpha < 0 or not 0 < beta <= 1:
            raise InputError("contrastive decoding needs alpha of 0 or more, and beta in (0, 1]")
        self.model, self.distorted, self.alpha, self.beta = model, dict(distorted), alpha, beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prompt = self.distorted["input_ids"]
        if len(input_ids) % len(prompt):
            raise InputError(f"the distorted prompt has {len(prompt)} rows, but {len(input_ids)} are generated")
        repeats = len(input_ids) // len(prompt)
        new = input_ids[:, prompt.shape[1] :]
        inputs = {k: _repeated(v, len(prompt), repeats) for k, v in self.distorted.items()}
        for name, value in inputs.items():  # what has a column for each token grows with the text
            if isinstance(value, Tensor) and value.shape[:2] == (len(input_ids), prompt.shape[1]) and value.dim() == 2:
                more = new if name == "input_ids" else torch.full_like(new, int(name == "attention_mask"))
                inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)
        with torch.no_grad():
            other = self.model(**inputs, use_cache=False).logits[:, -1].to(scores)
        allowed = scores >= scores.amax(-1, keepdim=True) + math.log(self.beta)
        possible = scores > -torch.inf  # beams compare rows, so both sides share one normalisation over these
        other = other.masked_fill(~possible, -torch.inf).log_softmax(-1)
        contrasted = scores + self.alpha * (scores.log_softmax(-1) - other)
        return contrasted.masked_fill(~allowed, -torch.inf)


def _repeated(value: Any, rows: int, repeats: int) -> Any:
    """Each row's share of a tensor, as often as there are beams; features of all rows may lie one after another."""
    if repeats == 1 or not isinstance(value, Tensor) or not value.shape or len(value) % rows:
        return value
    return value.unflatten(0, (rows, -1)).repeat_interleave(repeats, dim=0).flatten(0, 1)
