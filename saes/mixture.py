"""Directions mixed by weights that are fitted to each prompt (RISE, arXiv 2512.23988), to steer the text after it.

The weights of a row lower the entropy of the next token behind its prompt: k numbers, a few steps, one token through
the upper layers. Every row of a batch gets its own, whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emocircuits.activations.control import Control
from emocircuits.activations.sites import Key
from emocircuits.activations.upper import UpperLayers, check_stream
from emocircuits.errors import InputError
from emocircuits.models.anatomy import unwrap
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, Term

from .confidence import by_length, entropy
from .steering import unit


@dataclass(frozen=True)
class Fit:
    """How coefficients are fitted: Adam from zero on a cosine schedule, so each ends within about steps x lr / 2.

    chunk: so many tokens go through the model at once; it changes no result.
    """

    steps: int = 10
    lr: float = 0.02
    chunk: int = 32

    def __post_init__(self) -> None:
        if min(self.steps, self.chunk) < 1 or not self.lr > 0:
            raise InputError(
                f"steps and chunk must be at least 1 and lr positive: {self.steps}, {self.chunk}, {self.lr}"
            )


@dataclass(frozen=True)
class Mixture:
    """k directions [k, d_model] of the stream at `key`, such as `behaviours` or `Confidence.direction` give.

    norm: mean residual norm there (`Confidence.norm`); coefficients are in units of it, along unit vectors. Raises
    InputError for no directions and for a norm that is not positive.
    """

    vectors: Tensor
    key: Key
    norm: float

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or not len(self.vectors):
            raise InputError(f"a mixture needs one or more directions [k, d_model], not {list(self.vectors.shape)}")
        if not 0 < self.norm < math.inf:
            raise InputError(f"coefficients are in residual norms, so the norm must be positive, not {self.norm}")

    def fit(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, tokens: int = 1,
        settings: Fit | None = None,
    ) -> Tensor:  # fmt: skip
        """Coefficients [B, k] that lower the mean entropy after each of the last `tokens` tokens of a prompt.

        Prompts [B, T] may be padded on either side. Raises InputError before any forward pass for directions that do
        not fit the model, ids without a mask of their shape, and prompts of fewer tokens.
        """
        added = self.norm * unit(model, self.key, self.vectors)
        check_stream(model, self.key)
        prompts = _prompts(input_ids, attention_mask)
        shortest = min(map(len, prompts))
        if not 1 <= tokens <= shortest:
            raise InputError(f"tokens must be from 1 to {shortest}, the length of the shortest prompt, not {tokens}")
        at = [range(len(ids) - tokens, len(ids)) for ids in prompts]
        return fitted(UpperLayers.read(model, self.key, prompts, at), added, settings)

    def steerer(
        self, model: Any, coefficients: Tensor, *, control: Control | None = None, positions: str = "generated"
    ) -> Steerer:
        """Row i of a batch gets coefficients[i] x norm x directions; `control=step_ends(tokenizer)`: at step ends only.

        Raises InputError for coefficients that are not finite numbers [B, k], and as `unit` does.
        """
        units = unit(model, self.key, self.vectors)
        if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != len(units):
            raise InputError(
                f"coefficients must be [B, {len(units)}], one row per text, not {list(coefficients.shape)}"
            )
        if not torch.isfinite(coefficients).all():
            raise InputError("coefficients hold NaN or infinity; fit them again in float32")
        rows = self.norm * coefficients.detach().float().cpu() @ units
        term = Term(self.key[0], (self.key[1],), rows[:, None], 1.0, positions, control=control)
        about = {"site": self.key[0], "layer": self.key[1], "unit": "residual norm", "norm": self.norm}
        return Steerer((term,), "mixture", fingerprint(unwrap(model)), None, about)

    @contextmanager
    def attach(
        self, model: Any, coefficients: Tensor, *, control: Control | None = None, positions: str = "generated",
        strict: bool = True,
    ) -> Iterator[Steerer]:  # fmt: skip
        """`steerer` attached: ``with mixture.attach(model, coefficients): model.generate(...)``.

        strict: raise HookError after the block when it never applied, as where no generated token ended a step.
        """
        with self.steerer(model, coefficients, control=control, positions=positions).attach(model, strict=strict) as it:
            yield it


def fitted(upper: UpperLayers, added: Tensor, settings: Fit | None = None) -> Tensor:
    """Coefficients [texts, k] of vectors `added` [k, d_model]: each text's lower the mean entropy at its own tokens.

    Texts are numbered as `upper.text` does, without gaps. Raises InputError when an entropy is not finite.
    """
    settings = settings or Fit()
    text, added = upper.text, added.to(upper.residual.device)
    count = text.bincount().float()
    found = torch.zeros(len(count), len(added), device=added.device, requires_grad=True)
    adam = torch.optim.Adam([found], settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.steps)
    for _ in range(settings.steps):
        adam.zero_grad()
        for part in by_length(upper, torch.arange(len(upper), device=text.device), settings.chunk):
            owner = text[part]
            h = entropy(upper.logits(part, upper.residual[part].float() + found[owner] @ added))
            if not torch.isfinite(h).all():
                raise InputError("an entropy is not finite; load the model in float32 or lower lr")
            (gradient,) = torch.autograd.grad((h / count[owner]).sum(), found)  # not of the weights
            found.grad = gradient if found.grad is None else found.grad + gradient
        adam.step()
        schedule.step()
    return found.detach().cpu()


def _prompts(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The real tokens of each row; raises InputError for shapes that do not fit and for rows without a token."""
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.dim() != 2 or mask.shape != ids.shape or not len(ids):
        raise InputError(
            f"ids and mask must both be [B, T] with rows in them, not {list(ids.shape)}, {list(mask.shape)}"
        )
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask)]
    if not all(rows):
        raise InputError(f"row {rows.index([])} holds no token; its mask is all zero")
    return rows
