"""Choosing a token from one row's logits, from a random stream that no other row shares."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 1024
"""Tokens among which the nucleus is looked for first; sorting a whole vocabulary costs more than a small model."""


class Sampler:
    """Temperature and nucleus sampling of one row; temperature 0 takes the most likely token."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """One token of logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.float().cpu()
        chances = ((logits - logits.max()) / self.temperature).softmax(-1)
        if self.top_p >= 1:
            return int(torch.multinomial(chances, 1, generator=self._generator))
        kept, tokens = nucleus(chances, self.top_p)
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])


def nucleus(chances: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens that hold `top_p` of the mass: their chances [n] and ids [n]."""
    values, tokens = chances.topk(min(WIDE, len(chances)))
    if float(values.sum()) < top_p:
        values, tokens = chances.sort(descending=True)
    inside = values.cumsum(-1) - values < top_p  # the first token always
    return values[inside], tokens[inside]
