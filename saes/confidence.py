"""The confidence vector of RISE (arXiv 2512.23988): an offset in latent space that makes the model surer at step ends.

It minimises the mean entropy of the next token when h + S W_dec replaces the residual h at the ends of steps, through
the layers above, model and SAE frozen. Low entropy is not correctness: the offset may be no more than "be sure".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from emocircuits import artefact
from emocircuits.activations.sites import Key
from emocircuits.activations.upper import UpperLayers, check_stream
from emocircuits.errors import InputError
from emocircuits.evaluation.statistics import clustered_bootstrap
from emocircuits.models.anatomy import unwrap
from emocircuits.models.fingerprint import fingerprint
from emocircuits.reasoning.traces import Trace

from .metrics import Coder
from .splice import check_place
from .tokens import Splitter, paragraphs, place_steps
from .vectors import Scaling, Vectors

KIND = "confidence"


@dataclass(frozen=True)
class Settings:
    """How the offset is learned: Adam with a cosine schedule, `batch` steps an iteration; defaults are the paper's.

    lr and start (standard deviation of the first offset) are in the units that SAEs are trained in, where step vectors
    are centred and of mean norm sqrt(d); the paper names none. chunk: so many steps go through the model at once; it
    changes no result. held_out: share of the traces that is only measured on, drawn by `split_seed`. draws: random
    offsets of the same norm to compare with. top: latents that are kept for the "top" arm. seed: of the first offset
    and the order of the steps.
    """

    lr: float = 0.01
    iterations: int = 1000
    batch: int = 256
    chunk: int = 32
    start: float = 0.01
    held_out: float = 0.2
    draws: int = 5
    top: int = 10
    seed: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "chunk", "draws", "top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0 or not self.start >= 0:
            raise InputError(f"lr must be positive and start not negative, not {self.lr} and {self.start}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of the traces between 0 and 1, not {self.held_out}")


@dataclass(frozen=True)
class Effect:
    """Means over n steps, in nats: entropy of the next token, its change [low, high] (traces resampled), and KL.

    kl: of the changed from the unsteered distribution. Controls of several draws are averaged at each step.
    """

    entropy: float
    change: float
    low: float
    high: float
    kl: float
    n: int


@dataclass(frozen=True)
class Confidence:
    """The learned offset [d_sae] and what it does; `vector` [d_model] is what it adds to the residual stream.

    norm: mean residual norm at step ends, the unit of doses. dense [d_model]: mean of the low-entropy steps less that
    of the high-entropy ones, the direction that needs no SAE. history: mean entropy of each iteration's batch. effects:
    {"train", "held_out"}: {"none", "offset", "mirrored", "top", "random", "dense"}, all but none of the offset's norm;
    top: of its largest latents alone.
    cosines: with the mean step vector and with `dense`. held_out: names of the traces that nothing was learned from.
    """

    key: Key
    offset: Tensor
    vector: Tensor
    dense: Tensor
    norm: float
    effects: Mapping[str, Mapping[str, Effect]]
    cosines: Mapping[str, float]
    settings: Settings
    held_out: tuple[str, ...] = ()
    history: tuple[float, ...] = field(default=(), repr=False)
    sae: str = ""  # digest of the decoder that the offset belongs to
    fingerprint: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def length(self) -> float:
        """Norm of what is added, in residual norms."""
        return float(self.vector.norm()) / self.norm

    def top(self, sae: Coder, n: int = 10) -> list[tuple[int, float, float]]:
        """(latent, its offset, its share of the summed sizes |offset| x |decoder row|) of the n largest, falling."""
        size = self._sizes(sae)
        latents = size.topk(self._number(n)).indices.tolist()
        return [(i, float(self.offset[i]), float(size[i] / size.sum())) for i in latents]

    def direction(self, sae: Coder, n: int | None = None) -> Tensor:
        """Unit vector [d_model] of the n largest latents (None: all), towards lower entropy: for `saes.steering`.

        Raises InputError for an n that is none and for an SAE that the offset was not learned in.
        """
        size = self._sizes(sae)
        kept = size.topk(self._number(n)).indices
        return normalize(self.offset[kept] @ sae.W_dec.detach().float().cpu()[kept], dim=0)

    def _number(self, n: int | None) -> int:
        if n is not None and not 1 <= n <= len(self.offset):
            raise InputError(f"n is a number of latents from 1 to {len(self.offset)}, not {n}")
        return len(self.offset) if n is None else n

    def _sizes(self, sae: Coder) -> Tensor:
        if digest(sae) != self.sae:
            raise InputError("this confidence vector was learned in the latents of another SAE; load that one")
        return self.offset.abs() * sae.W_dec.detach().float().cpu().norm(dim=1)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        plain = asdict(self)
        tensors = {name: plain.pop(name) for name in ("offset", "vector", "dense")}
        return artefact.save(path, KIND, tensors, plain)

    @classmethod
    def load(cls, path: str | Path) -> Confidence:
        """Read a saved one; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, h = artefact.load(path, KIND)
        effects = {part: {name: Effect(**e) for name, e in found.items()} for part, found in h["effects"].items()}
        return cls(
            (h["key"][0], h["key"][1]), tensors["offset"], tensors["vector"], tensors["dense"], h["norm"], effects,
            h["cosines"], Settings(**h["settings"]), tuple(h["held_out"]), tuple(h["history"]), h["sae"],
            h["fingerprint"],
        )  # fmt: skip


def confidence_vector(
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace | str],
    sae: Coder,
    key: Key,
    settings: Settings | None = None,
    *,
    split: Splitter = paragraphs,
    progress: Progress | None = None,
) -> Confidence:
    """Learn the offset on the step ends of most traces and measure it on those of the others, beside its controls.

    A trace is read once; an iteration runs one token of each step through the layers above `key`. Raises InputError
    before any forward pass for an SAE or place that does not fit the model, and for fewer than two traces.
    """
    settings = settings or Settings()
    check_stream(model, key)
    check_place(model, sae, key)
    items = place_steps(model, tokenizer, traces, "closing", split)
    names = [item.trace for item in items for _ in item.read]
    train, test = Vectors(torch.empty(len(names), 1), names, key).split(settings.held_out, settings.split_seed)
    upper = UpperLayers.read(model, key, [i.ids for i in items], [[a for a, _ in i.read] for i in items])
    rows = sae.W_dec.detach().float().to(upper.residual.device)
    x = upper.residual.float()
    size = 1 / Scaling.of(x[train]).factor
    offset, history = learn(upper, torch.from_numpy(train), size * rows, settings, progress)
    offset *= size
    vector = offset @ rows
    (clean,), _ = by_step(upper, [None], settings.chunk)
    dense = _dense(x, clean, train)
    kept = (offset.abs() * rows.norm(dim=1)).topk(min(settings.top, len(rows))).indices
    arms = _arms(vector, offset[kept] @ rows[kept], dense, settings)
    cosines = {"mean step vector": x[train].mean(0), "low less high entropy": dense}
    return Confidence(
        key, offset.cpu(), vector.cpu(), dense.cpu(), float(x[train].norm(dim=1).mean()),
        _effects(upper, arms, clean, {"train": train, "held_out": test}, names, settings),
        {name: float(cosine_similarity(vector, other, dim=0)) for name, other in cosines.items()}, settings,
        tuple(dict.fromkeys(names[i] for i in test)), tuple(history), digest(sae), fingerprint(unwrap(model)),
    )  # fmt: skip


def learn(
    upper: UpperLayers, train: Tensor, rows: Tensor, settings: Settings, progress: Progress | None = None
) -> tuple[Tensor, list[float]]:
    """The offset [d_sae] that minimises entropy at the tokens `train` of `upper`, and each batch's mean entropy.

    rows: [d_sae, d_model] what latents add. Raises InputError when the entropy is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    offset = (settings.start * torch.randn(len(rows), generator=generator)).to(rows)
    adam = torch.optim.Adam([offset], settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.iterations)
    task = progress.add_task("confidence vector", total=settings.iterations) if progress else None
    history, waiting = [], torch.empty(0, dtype=torch.long)
    size = min(settings.batch, len(train))
    for _ in range(settings.iterations):
        if len(waiting) < size:
            waiting = train[torch.randperm(len(train), generator=generator)]
        batch, waiting = waiting[:size], waiting[size:]
        entropy, gradient = slope(upper, batch, offset @ rows, settings.chunk)
        if not math.isfinite(entropy):
            raise InputError("the entropy is not finite; load the model in float32 or lower lr")
        offset.grad = rows @ gradient
        adam.step()
        schedule.step()
        history.append(entropy)
        if progress is not None and task is not None:
            progress.advance(task)
    return offset, history


def slope(upper: UpperLayers, which: Tensor, vector: Tensor, chunk: int = 32) -> tuple[float, Tensor]:
    """Mean entropy at tokens `which` when vector [d_model] is added there, and its gradient [d_model]."""
    added = vector.detach().clone().requires_grad_()
    total, gradient = 0.0, torch.zeros_like(added)
    for part in by_length(upper, which, chunk):
        h = entropy(upper.logits(part, upper.residual[part].float() + added)).sum()
        gradient += torch.autograd.grad(h, added)[0]
        total += float(h.detach())
    return total / len(which), gradient / len(which)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits [..., vocabulary]) in nats [...]."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def by_step(upper: UpperLayers, added: Sequence[Tensor | None], chunk: int = 32) -> tuple[Tensor, Tensor]:
    """Entropy [A, N] at every token with each of A vectors there, and KL [A, N] from the clean model's prediction.

    A vector is [d_model], [N, d_model] (one for each token) or None for nothing.
    """
    h, kl = torch.zeros(2, len(added), len(upper))
    for part in by_length(upper, torch.arange(len(upper)), chunk):
        x = upper.residual[part]
        clean = upper.logits(part, x).float().log_softmax(-1)
        for i, vector in enumerate(added):
            moved = clean
            if vector is not None:
                now = vector if vector.dim() == 1 else vector[part]
                moved = upper.logits(part, x.float() + now).float().log_softmax(-1)
            h[i, part] = -(moved.exp() * moved).sum(-1).cpu()
            kl[i, part] = (clean.exp() * (clean - moved)).sum(-1).cpu()
    return h, kl


def agreement(found: Sequence[Confidence]) -> Tensor:
    """Cosines [m, m] of the vectors of several seeds (or data sets). Raises InputError when their sizes differ."""
    if len({len(c.vector) for c in found}) != 1:
        raise InputError("confidence vectors of different models have no cosines; give one or more of the same model")
    units = normalize(torch.stack([c.vector for c in found]), dim=-1)
    return units @ units.T


def digest(sae: Coder) -> str:
    """A hash of an SAE's decoder."""
    return hashlib.sha256(sae.W_dec.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def by_length(upper: UpperLayers, which: Tensor, chunk: int) -> list[Tensor]:
    """Tokens in chunks of like position, so that short texts are not padded to long ones."""
    order = upper.position[which].cpu().argsort(stable=True)
    return list(which[order].split(chunk))


def _dense(x: Tensor, clean: Tensor, train: np.ndarray) -> Tensor:
    """Mean of the training steps whose entropy is below the median, less that of the others [d_model]."""
    low = clean[train] < clean[train].median()
    if not low.any():
        raise InputError("every training step has the same entropy, so there is nothing to tell apart")
    rows = x[train]
    return rows[low.to(x.device)].mean(0) - rows[~low.to(x.device)].mean(0)


def _arms(vector: Tensor, top: Tensor, dense: Tensor, settings: Settings) -> dict[str, list[Tensor | None]]:
    """What is added at step ends: the vector, and others at its norm."""
    noise = torch.randn(settings.draws, len(vector), generator=torch.Generator().manual_seed(settings.seed)).to(vector)
    size = vector.norm()
    others = {"top": top[None], "random": noise, "dense": dense[None]}
    return {
        "none": [None], "offset": [vector], "mirrored": [-vector],
        **{name: list(size * normalize(rows, dim=-1)) for name, rows in others.items()},
    }  # fmt: skip


def _effects(
    upper: UpperLayers, arms: Mapping[str, Sequence[Tensor | None]], clean: Tensor, parts: Mapping[str, np.ndarray],
    names: Sequence[str], settings: Settings,
) -> dict[str, dict[str, Effect]]:  # fmt: skip
    """Every arm on each part's steps; controls of several draws are averaged at each step."""
    h, kl = by_step(upper, [a for group in arms.values() for a in group], settings.chunk)
    sizes = [len(group) for group in arms.values()]
    means = {name: (a.mean(0), b.mean(0)) for name, a, b in zip(arms, h.split(sizes), kl.split(sizes))}

    def effect(after: Tensor, moved: Tensor, index: np.ndarray) -> Effect:
        difference = (after - clean)[index].double().numpy()
        change = clustered_bootstrap(difference, [names[i] for i in index], seed=settings.seed)
        return Effect(
            float(after[index].mean()), change.estimate, change.low, change.high, float(moved[index].mean()), len(index)
        )

    return {part: {name: effect(*m, index) for name, m in means.items()} for part, index in parts.items()}
