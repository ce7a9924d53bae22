"""What each step needs of every earlier one: hide a step from attention and see what the later steps' tokens lose.

The causal matrix of Thought Anchors (arXiv 2506.19143), with the whole vocabulary in float32 and aligned with the
tokens that are scored. To hide a step in every layer and head is to go on from a KV cache without it: nobody reads its
rows, and the rows before it never saw it. So one clean pass serves all sources, and a source costs the tokens after it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .. import artefact
from ..activations import capture
from ..activations.attention import Call, Proceed, around_attention
from ..activations.knockout import hide
from ..activations.restart import logits_of
from ..activations.rows import attention_layers, in_blocks
from ..errors import HookError, InputError
from ..models.anatomy import resolve, text_config, unwrap
from .tokens import checked, far, shift_of, step_means

Item = TypeVar("Item")
KIND = "suppression"
FLOOR = 1e-9
"""Added to a KL before its logarithm, as published."""
PASS_TOKENS, KEPT, LOGITS, TILE = 1024, 2**26, 2**25, 2**19
"""Tokens of a pass, numbers of hidden states that wait for their logits, logits at once, and those in a cache."""


@dataclass(frozen=True)
class SuppressionMatrix:
    """[n, n] effects [target, source] of hiding a step on later ones; NaN elsewhere, and for steps without tokens.

    kl: mean over the target's tokens of D_KL(clean || hidden), nats. log_kl: mean of log(KL + 1e-9). noise: the KL of
    a last step from which nothing was hidden, computed in the same way: effects near it mean nothing.
    """

    kl: Tensor
    log_kl: Tensor
    noise: float
    bounds: tuple[int, ...]
    temperature: float = 0.6
    align: str = "predict"
    first_k: int | None = None
    layers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.kl)

    @cached_property
    def centred(self) -> Tensor:
        """log_kl less each target's mean over its sources, as published.

        Only the order of sources within a target has a meaning; a target with one source is 0 by construction.
        """
        return self.log_kl - self.log_kl.nanmean(1, keepdim=True)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        valid = ~self.kl.isnan()
        tensors = {"kl": self.kl.nan_to_num(), "log_kl": self.log_kl.nan_to_num(), "valid": valid}
        fields = ("noise", "bounds", "temperature", "align", "first_k", "layers")
        return artefact.save(path, KIND, tensors, {name: getattr(self, name) for name in fields})

    @classmethod
    def load(cls, path: str | Path) -> SuppressionMatrix:
        """Read a saved matrix; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, h = artefact.load(path, KIND)
        kl, log_kl = (tensors[name].masked_fill(~tensors["valid"], torch.nan) for name in ("kl", "log_kl"))
        layers = None if h["layers"] is None else tuple(h["layers"])
        return cls(kl, log_kl, h["noise"], tuple(h["bounds"]), h["temperature"], h["align"], h["first_k"], layers)


def outgoing(matrix: Tensor, min_distance: int = 4) -> Tensor:
    """[n] mean effect of each source on the targets at least `min_distance` later; NaN where there is none."""
    return matrix.masked_fill(~far(len(matrix), min_distance).to(matrix.device), torch.nan).nanmean(0)


@dataclass(frozen=True)
class _Source:
    """The keys start..stop-1 are hidden (none: a control), and rows from `first` on can differ from the clean pass."""

    step: int | None
    start: int
    stop: int
    first: int


@torch.no_grad()
def suppression_matrix(
    model: Any,
    ids: Tensor | Sequence[int],
    bounds: Sequence[int],
    *,
    batch: int | None = None,
    temperature: float = 0.6,
    align: str = "predict",
    first_k: int | None = None,
    layers: int | str | Iterable[int] | None = None,
    progress: Progress | None = None,
) -> SuppressionMatrix:
    """Hide each step's keys from every query and measure the KL of all later tokens, with the text teacher-forced.

    ids: [T] or [1, T]; bounds: n + 1 token positions (`Steps.token_bounds`); positions are not renumbered. batch:
    sources in one pass (default: as many as keep it near 1,024 tokens). align: "predict" scores the distributions that
    predict a step's tokens, at start-1..stop-2; "compat" those at start..stop-1, as published. first_k: score the first
    k tokens of a step only. layers: hide in these only (default: all). Edits on the model meanwhile must be at all
    positions, since several sources share a row. Raises InputError for bounds that do not fit, HookError for a model
    without an LM head, or with a layer without softmax attention.
    """
    tokens, bounds = checked(ids, bounds)
    shift = shift_of(align)
    _check(temperature, batch=batch, first_k=first_k)
    clean = _Clean(model, tokens[:, : bounds[-1]], layers)
    sources, length, width = _sources(bounds, shift, clean.everywhere), *clean.hidden.shape
    task = progress.add_task("hiding each step", total=len(sources)) if progress else None

    def one_pass(part: list[_Source]) -> bool:
        rows = sum(length - s.first for s in part)
        return rows <= clean.room and (len(part) <= batch if batch else rows <= PASS_TOKENS)

    rows = []
    for group in _split(sources, lambda part: sum(length - s.first for s in part) * width <= KEPT):
        states: list[Tensor] = []
        for part in _split(group, one_pass):
            states += clean.without(part)
            if progress is not None and task is not None:
                progress.advance(task, len(part))
        rows.append(token_kl(model, clean.hidden, states, temperature).cpu())
    kl, log_kl, noise = _by_step(torch.cat(rows), sources, bounds, shift, first_k)
    hidden_in = None if clean.everywhere else tuple(clean.layers)
    return SuppressionMatrix(kl, log_kl, noise, bounds, temperature, align, first_k, hidden_in)


def _check(temperature: float, **counts: int | None) -> None:
    if not temperature > 0:
        raise InputError(f"the temperature must be above 0, not {temperature:g}: at 0 there is no distribution")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def _sources(bounds: Sequence[int], shift: int, everywhere: bool) -> list[_Source]:
    """Every step with tokens and a later one, in order, then the control, which hides nothing from the last step."""
    full = [i for i, (start, stop) in enumerate(zip(bounds, bounds[1:])) if start < stop]
    if len(full) < 2:
        raise InputError(f"{len(full)} step(s) have tokens of their own; one can affect another only if 2 have")
    spans = ((i, bounds[i], bounds[i + 1]) for i in full)
    made = [_Source(i, a, b, b - shift if everywhere else a) for i, a, b in spans]
    last = made.pop().start
    return [*made, _Source(None, last, last, last - shift)]


def _split(items: Sequence[Item], fits: Callable[[list[Item]], bool]) -> Iterator[list[Item]]:
    """Runs of items, each as long as it fits (or one item)."""
    part: list[Item] = []
    for item in items:
        if part and not fits([*part, item]):
            yield part
            part = []
        part.append(item)
    yield part


class _Kept(NamedTuple):
    """What the attention of one layer was given."""

    key: Tensor
    value: Tensor
    mask: Tensor | None


class _Clean:
    """One pass over the text [1, T] as it is: final hidden states [T, d], and keys, values and mask of every layer."""

    def __init__(self, model: Any, ids: Tensor, layers: int | str | Iterable[int] | None) -> None:
        self.module, self.anatomy, self.ids = unwrap(model), resolve(model), ids
        everything = attention_layers(self.module, range(self.anatomy.n_layers))
        self.layers = attention_layers(self.module, layers)
        self.everywhere = len(self.layers) == len(everything)
        if self.anatomy.lm_head is None:
            raise HookError("this model has no LM head, so it gives no distribution over tokens to compare")
        self.takes_positions = "position_ids" in inspect.signature(type(self.module).forward).parameters
        config = text_config(getattr(self.module, "config", None))
        context = getattr(config, "max_position_embeddings", None) or math.inf
        self.room = context if self.takes_positions else 0  # in one row; 0: for one source at a time
        self.kept: dict[int, _Kept] = {}
        self.hidden = self._run(self._keep, ids)[0]

    def _keep(self, call: Call, proceed: Proceed) -> Any:
        self.kept[call.layer] = _Kept(call.key, call.value, call.mask)
        return proceed(call)

    def _run(self, handler: Callable[[Call, Proceed], Any], ids: Tensor, **more: Tensor) -> Tensor:
        """Final hidden states [B, T, d] with the handler around every attention; the LM head does not run."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
        with around_attention(self.module, self.anatomy, dict.fromkeys(range(self.anatomy.n_layers), handler)):
            return capture(self.module, inputs, "final_norm", positions="all")["final_norm", 0]

    def without(self, sources: Sequence[_Source]) -> list[Tensor]:
        """[T - first, d] final hidden states of each source, from one pass over the tokens that each can change.

        They stand one after the other in one row: all a model does but attention is done token by token, and attention
        is called for each source alone, with the clean keys and values before its first token.
        """
        length = self.ids.shape[1]
        columns = torch.arange(length)
        starts = [s.first if self.takes_positions else 0 for s in sources]
        hidden = [(columns >= s.start) & (columns < s.stop) for s in sources]
        masks: dict[Any, Tensor | None] = {}  # layers of a kind share one

        def handler(call: Call, proceed: Proceed) -> Any:
            sizes, clean = [length - start for start in starts], self.kept[call.layer]
            outputs = []
            for i, own in enumerate(zip(*(x.split(sizes, dim=2) for x in (call.query, call.key, call.value)))):
                part = _continued(replace(call, query=own[0], key=own[1], value=own[2]), clean, starts[i])
                name = (i, id(clean.mask), call.layer in self.layers, part.key.device)
                if name not in masks:
                    masks[name] = hide(part, (hidden[i] & name[2]).to(part.key.device)).mask
                outputs.append(in_blocks(replace(part, mask=masks[name]), proceed)[0])
            return torch.cat(outputs, dim=1), None

        positions = torch.cat([columns[start:] for start in starts])[None]
        states = self._run(
            handler,
            self.ids[:, positions[0]],
            **({"position_ids": positions} if self.takes_positions else {}),
        )
        parts = states[0].split([length - start for start in starts])
        return [x[s.first - start :] for x, s, start in zip(parts, sources, starts)]


def _continued(call: Call, clean: _Kept, start: int) -> Call:
    """The call of the tokens from `start` on, with the clean pass's keys, values and mask for what is before them."""
    key, value = (
        torch.cat([old[:, :, :start], new], dim=2) for old, new in ((clean.key, call.key), (clean.value, call.value))
    )
    mask = None if clean.mask is None else clean.mask[..., start:, : key.shape[2]]
    return replace(call, key=key, value=value, mask=mask)


def token_kl(model: nn.Module, clean: Tensor, moved: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """[len(moved), T] D_KL(clean || moved) in nats of the next-token distributions; NaN before a row's first token.

    clean: final hidden states [T, d]; moved: those of the last tokens under some change, [up to T, d] each. The clean
    distributions are computed once for all rows, a few positions at a time.
    """
    length = len(clean)
    out = torch.full((len(moved), length), torch.nan, device=clean.device)
    size = max(1, LOGITS // resolve(model).vocab_size)
    for start in range(min(length - len(x) for x in moved), length, size):
        stop = min(start + size, length)
        log_p = _log_softmax(logits_of(model, clean[start:stop]).float(), temperature).clamp_min_(-80)
        p = log_p.exp()
        reached = [(row, max(start, length - len(x))) for row, x in enumerate(moved) if length - len(x) < stop]
        for part in _split(reached, lambda rows, stop=stop: sum(stop - begin for _, begin in rows) <= size):
            hidden = torch.cat([moved[row][begin - length : stop - length or None] for row, begin in part])
            logits = logits_of(model, hidden).float()  # of several rows at once: a head's weights are slow to read
            for (row, begin), own in zip(part, logits.split([stop - begin for _, begin in part])):
                out[row, begin:stop] = _kl(p[begin - start :], log_p[begin - start :], own, temperature)
    return out


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Finite also for tokens that a model rules out; overwrites the logits."""
    return logits.div_(temperature).log_softmax(-1).clamp_min_(-1e4)


def _kl(p: Tensor, log_p: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """[N] sum of p (e^d - 1 - d), d = log q - log p, which is the KL since p and q both sum to 1.

    No term is negative, so nothing cancels: effects far below float32's 1e-7 are still numbers, not noise. p is at
    least e^-80, which no sum notices, so that e^d is finite. On a CPU a few rows at a time, which its cache holds.
    """
    rows = max(1, TILE // p.shape[1]) if p.device.type == "cpu" else len(p)
    found = []
    for own, log_own, other in zip(p.split(rows), log_p.split(rows), logits.split(rows)):
        d = _log_softmax(other, temperature).sub_(log_own)
        found.append(d.expm1().sub_(d).mul_(own).sum(-1))
    return torch.cat(found)


def _by_step(
    values: Tensor, sources: Sequence[_Source], bounds: Sequence[int], shift: int, first_k: int | None
) -> tuple[Tensor, Tensor, float]:
    """([n, n] mean KL, [n, n] mean log KL, the control's mean KL) from KLs [sources, T] of tokens."""
    n, values = len(bounds) - 1, values.double()
    ends = [stop if first_k is None else min(stop, start + first_k) for start, stop in zip(bounds, bounds[1:])]
    spans = [(start - shift, end - shift) for start, end in zip(bounds, ends)]
    weights = step_means(spans, values.shape[1]).double()
    filled = [i for i in range(n) if bounds[i] < bounds[i + 1]]
    kl, log_kl = (torch.full((n, n), torch.nan) for _ in range(2))
    means = [(v.nan_to_num() @ weights).float() for v in (values, (values + FLOOR).log())]
    for row, source in enumerate(sources[:-1]):
        targets = [i for i in filled if source.step is not None and i > source.step]
        kl[targets, source.step], log_kl[targets, source.step] = (m[row, targets] for m in means)
    return kl, log_kl, float(means[0][-1, filled[-1]])
