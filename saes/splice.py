"""What a model loses when its activations go through an autoencoder: cross-entropy and KL recovered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emocircuits.activations import Ablate, Apply, Edit, capture, edit
from emocircuits.activations.edits import HEAD_SITES
from emocircuits.activations.sites import Key
from emocircuits.errors import InputError
from emocircuits.models.anatomy import resolve, unwrap
from emocircuits.models.fingerprint import check_fits
from emocircuits.reasoning.traces import Trace

from .metrics import Coder
from .tokens import Splitter, paragraphs, place_steps


def check_place(model: Any, sae: Coder, key: Key) -> None:
    """Raise InputError unless `key` of this model holds vectors of the size that the SAE reads.

    An SAE that was trained here on another model (other weights, too) raises ArtefactError.
    """
    anatomy = resolve(model)
    anatomy.point(*key)
    width = anatomy.n_units(key[0]) * (anatomy.head_dim if key[0] in HEAD_SITES else 1)
    if sae.W_dec.shape[1] != width:
        raise InputError(
            f"the SAE reads vectors of size {sae.W_dec.shape[1]}, and {key[0]} of this model has {width}; it was made"
            " for another model or another site"
        )
    about = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "emocircuits", None) or {}
    if made_for := about.get("source", {}).get("model"):
        check_fits(made_for, unwrap(model), strict=True)


def reconstruction(sae: Coder, key: Key, positions: Any = "all") -> Edit:
    """The edit that replaces activations by what the SAE makes of them; heads are put side by side for it."""

    def through(x: Tensor) -> Tensor:
        flat = x.flatten(2).float()
        return sae.decode(sae.encode(flat)).reshape(x.shape).to(x.dtype)

    return Apply(site=key[0], layer=key[1], function=through, positions=positions)


@contextmanager
def spliced(model: Any, sae: Coder, key: Key, positions: Any = "all") -> Iterator[None]:
    """Run the model with the SAE in place at `key`; positions as in `edit`. Raises InputError when they do not fit."""
    check_place(model, sae, key)
    with edit(model, reconstruction(sae, key, positions)):
        yield


@dataclass(frozen=True)
class Recovery:
    """Mean over scored tokens, in nats: next-token loss of the model as it is, with the SAE, and with zeros instead.

    kl, kl_zero: divergence of the changed from the clean predictions. n: tokens scored; spliced: tokens changed.
    """

    loss: float
    loss_sae: float
    loss_zero: float
    kl: float
    kl_zero: float
    n: int
    spliced: int

    @property
    def recovered(self) -> float:
        """(zero - sae) / (zero - clean): 1 when nothing is lost; NaN when zeros cost nothing (SAEBench's CE score)."""
        cost = self.loss_zero - self.loss
        return (self.loss_zero - self.loss_sae) / cost if cost > 0 else math.nan

    @property
    def kl_recovered(self) -> float:
        """(kl_zero - kl) / kl_zero; NaN when zeros change nothing."""
        return (self.kl_zero - self.kl) / self.kl_zero if self.kl_zero > 0 else math.nan


@torch.no_grad()
def recovery(
    model: Any,
    tokenizer: Any,
    traces: Iterable[Trace | str],
    sae: Coder,
    key: Key,
    *,
    at: str = "closing",
    split: Splitter = paragraphs,
    scored: int = 128,
) -> Recovery:
    """Splice an SAE into the model at the tokens it was made for and score the tokens after the first of them.

    at: "closing" (the ends of steps) or "all" tokens of the steps; prompt and begin token are left alone. scored: at
    most so many tokens of each trace, evenly spaced, so that logits stay small. Raises InputError as `check_place`
    does, and when no token follows a step.
    """
    check_place(model, sae, key)
    sums, n, changed = torch.zeros(5, dtype=torch.float64), 0, 0
    for item in place_steps(model, tokenizer, traces, at, split):
        first, last = item.read[0][0], len(item.ids) - 2  # the last token predicts nothing known
        if first > last:
            continue
        where = torch.linspace(first, last, min(scored, last - first + 1)).round().long().tolist()
        targets = torch.tensor(item.ids)[[t + 1 for t in where]]
        zero = Ablate(site=key[0], layer=key[1], positions=[item.read])
        clean = _log_probs(model, item.ids, key, where, [])
        for slot, edits in enumerate(([], [reconstruction(sae, key, [item.read])], [zero])):
            found = _log_probs(model, item.ids, key, where, edits) if edits else clean
            sums[slot] += float(cross_entropy(found, targets, reduction="sum"))
            if edits:
                sums[slot + 2] += float((clean.exp() * (clean - found)).sum())
        n, changed = n + len(where), changed + sum(b - a for a, b in item.read)
    if not n:
        raise InputError("no token follows a step in these traces, so there is nothing to score; give longer ones")
    return Recovery(*(sums / n).tolist(), n=n, spliced=changed)


def _log_probs(model: Any, ids: list[int], key: Key, where: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """Log probabilities [len(where), vocabulary] of the next token, on the CPU."""
    with edit(model, edits):
        found = capture(model, torch.tensor([ids]), key, positions="last", logits=list(where))
    assert found.logits is not None
    return found.logits[0].float().log_softmax(-1).cpu()
