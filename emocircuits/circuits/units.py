"""One pass over the texts, and everything a circuit needs is known: unit means per emotion and exact head effects.

Neuron scores are linear in the activations and head effects have a closed form, so running sums suffice (Wang et al.,
arXiv 2510.11328, sections 4 and 5 of their method, which costs one forward pass per head and prompt as published).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .. import artefact
from ..activations import capture
from ..directions import DirectionSet
from ..errors import HookError, InputError
from ..models.anatomy import resolve, unwrap
from ..models.fingerprint import fingerprint
from ..reading import Batch, Example, reading_batches
from .sublayers import Sublayer, attention_side, head_writes, mlp_side

KIND = "units"
TENSORS = ("count", "z", "mlp_post", "resid_mid", "head_effects", "neuron_sums", "neuron_size", "beta")
TENSORS += ("attn_scale", "mlp_scale")


@dataclass(frozen=True)
class Units:
    """Means over texts of each emotion and fold (a fold is a theme), for E emotions, F folds, L layers.

    count [E, F]; z [E, F, L, heads, head_dim]; mlp_post [E, F, L, d_mlp]; resid_mid [E, F, L, d_model] (zeros where
    attention and MLP are parallel); head_effects [E, F, L, heads, E]: what each
    head adds along each emotion's direction; neuron_sums [E, F, L, d_mlp]: activation times the norm's scale, so that
    `neuron_sums * beta` is what a neuron adds; neuron_size [L, d_mlp]: mean |activation|. Cells that were never seen
    hold zeros and count 0.
    """

    emotions: tuple[str, ...]
    folds: tuple[str, ...]
    count: Tensor
    z: Tensor
    mlp_post: Tensor
    resid_mid: Tensor
    head_effects: Tensor
    neuron_sums: Tensor
    neuron_size: Tensor
    beta: Tensor
    """[E, L, d_mlp]: along emotion e's unit direction, what each neuron writes per unit of activation."""
    attn_scale: Tensor
    mlp_scale: Tensor
    """[L, d_model] mean factor of the norm behind each sublayer (ones without one): what a push there is worth."""
    position: str = "last_prompt"
    norm: str = "pre"
    fingerprint: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, name: str, folds: Sequence[str] | None = None) -> Tensor:
        """A tensor of `TENSORS` averaged over folds (all of them, or those named), every text with the same weight."""
        keep = [i for i, f in enumerate(self.folds) if folds is None or f in folds]
        value, weight = getattr(self, name)[:, keep], self.count[:, keep]
        weight = weight / weight.sum(1, keepdim=True)
        return (value * weight.reshape(*weight.shape, *(1,) * (value.dim() - 2))).sum(1)

    def heads(self, contrast: bool = True, folds: Sequence[str] | None = None) -> Tensor:
        """[E, L, heads] what each head adds along its emotion's direction, in direction units.

        contrast: less its mean over texts of all emotions, so that always-on heads do not rank.
        """
        return _own(self.mean("head_effects", folds).movedim(-1, 1), contrast)

    def neurons(self, contrast: bool = True, folds: Sequence[str] | None = None) -> Tensor:
        """[E, L, d_mlp] beta * mean activation: what each neuron adds along its emotion's direction; see `heads`."""
        means = self.mean("neuron_sums", folds)
        means = means - means.mean(0, keepdim=True) if contrast else means
        return means * self.beta

    def deltas(self, site: str, folds: Sequence[str] | None = None) -> Tensor:
        """Emotion minus the mean of all emotions at "z" [E, L, heads, head_dim] or "mlp_post" [E, L, d_mlp]."""
        means = self.mean(site, folds)
        return means - means.mean(0, keepdim=True)

    def attention_directions(self, like: DirectionSet) -> DirectionSet:
        """Difference-of-means directions of the residual after attention, from the same pass as everything here.

        Raises HookError for a model whose attention and MLP read the same residual, which has no such place.
        """
        if not bool(self.resid_mid.any()):
            raise HookError("attention and MLP are parallel in this model: there is no residual between them")
        means = self.deltas("resid_mid")
        return replace(
            like, site="resid_mid", vectors=means, center=self.mean("resid_mid").mean(0), method="diff_means"
        )

    def baseline(self, site: str) -> Tensor:
        """[L, ...] mean over all emotions: what ablation by mean puts in."""
        return self.mean(site).mean(0)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with a JSON header; atomic."""
        header = {k: getattr(self, k) for k in ("position", "norm")} | {
            "emotions": list(self.emotions),
            "folds": list(self.folds),
            "fingerprint": dict(self.fingerprint) if self.fingerprint else None,
            "provenance": dict(self.provenance),
        }
        return artefact.save(path, KIND, {n: getattr(self, n).contiguous() for n in TENSORS}, header)

    @classmethod
    def load(cls, path: str | Path) -> Units:
        """Read saved units; raises ArtefactError for a damaged file or another kind of artefact."""
        tensors, h = artefact.load(path, KIND)
        fields: dict[str, Any] = {n: tensors[n] for n in TENSORS} | {"emotions": tuple(h["emotions"])}
        kept = {n: h[n] for n in ("position", "norm", "fingerprint", "provenance")}
        return cls(**fields, folds=tuple(h["folds"]), **kept)


def _own(effects: Tensor, contrast: bool) -> Tensor:
    """effects [E texts, E directions, ...] -> each emotion's texts along its own direction, less the other texts."""
    index = torch.arange(len(effects))
    own = effects[index, index]
    return own - effects.mean(0) if contrast else own


@torch.no_grad()
def collect(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    directions: DirectionSet,
    *,
    position: str = "last_prompt",
    norm: str = "pre",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Units:
    """Read z and mlp_post of all layers once; sums are kept on the model's device, so memory does not grow with texts.

    Only complete groups count (every emotion present), as for directions. norm: "pre" scores heads by what they add to
    the residual stream; "post" behind the MLP's input norm, as published. Raises InputError for incomplete data and
    HookError for a model without per-head z or down_proj modules, or without that norm.
    """
    kept = _complete(examples, directions.emotions)
    tally = _Tally(model, directions, sorted({e.theme for e in kept}), norm)
    for batch in reading_batches(
        model, tokenizer, kept, position=position, batch_size=batch_size, progress=progress, title="reading units"
    ):
        rows = [kept[i] for i in batch.index]
        tally.read([e.label for e in rows], [e.theme for e in rows], batch)
    made = {"n_texts": len(kept), "directions": directions.method, "read_at": directions.position}
    return tally.result(position, fingerprint(model), made)


def _complete(examples: Sequence[Example], emotions: Sequence[str]) -> list[Example]:
    if len(set(emotions)) < 2:
        raise InputError("circuits contrast emotions, so at least two are needed")
    have: dict[str, set[str]] = {}
    for e in examples:
        have.setdefault(e.group, set()).add(e.label)
    kept = [e for e in examples if set(emotions) <= have[e.group] and e.label in emotions]
    if not kept:
        raise InputError(f"no group of texts holds all of {', '.join(emotions)}; circuits need complete groups")
    return kept


class _Tally:
    """Running sums by (emotion, fold), taken in hooks, one layer at a time."""

    def __init__(self, model: Any, directions: DirectionSet, folds: list[str], norm: str) -> None:
        self.model, self.anatomy, self.norm = unwrap(model), resolve(model), norm
        if directions.layers != tuple(range(self.anatomy.n_layers)) or norm not in ("pre", "post"):
            raise InputError("circuits need directions at every layer, and norm 'pre' or 'post'")
        if norm == "post" and self.anatomy.structure not in ("pre-norm", "sandwich"):
            raise HookError(f"no norm stands between attention and MLP in this {self.anatomy.structure} model")
        self.directions, self.folds = directions, folds
        device = next(self.model.parameters()).device
        self.units = directions.units.to(device)
        layers = range(self.anatomy.n_layers)
        self.attention = [attention_side(self.model, layer) for layer in layers]
        self.mlps = [mlp_side(self.model, layer) for layer in layers]
        n_groups, width = len(directions.emotions) * len(folds), self.mlps[0].weight.shape[1]
        heads, head_dim = self.anatomy.n_heads, self.anatomy.head_dim
        shape = (n_groups, self.anatomy.n_layers)
        make = lambda *more: torch.zeros(*shape, *more, device=device)  # noqa: E731
        self.count = torch.zeros(n_groups, device=device)
        self.sums = {"z": make(heads, head_dim), "mlp_post": make(width), "neuron_sums": make(width)}
        self.sums["resid_mid"] = make(self.anatomy.d_model)
        self.sums["head_effects"] = make(heads, len(directions.emotions))
        self.size = torch.zeros(self.anatomy.n_layers, width, device=device)
        self.scale = {k: torch.zeros(self.anatomy.n_layers, device=device) for k in ("z", "mlp_post")}

    def read(self, labels: list[str], themes: list[str], batch: Batch) -> None:
        """Run one batch and add what its texts show."""
        n, device, weights = len(self.folds), self.count.device, batch.weights()
        rows = [self.directions.index(e) * n + self.folds.index(t) for e, t in zip(labels, themes)]
        group = torch.tensor(rows, device=device)
        self.count += torch.bincount(group, minlength=len(self.count))
        at = weights.nonzero(as_tuple=True)
        self.weight = weights[at].to(device)
        self.at = (at[0].to(device), at[1].to(device))
        self.token_group = group[self.at[0]]
        parallel = "resid_mid" in self.anatomy.missing
        last = {"resid_post": -1} if parallel else {"resid_mid": "all", "resid_post": -1}
        with ExitStack() as stack:
            for layer in range(self.anatomy.n_layers):
                for side, take in ((self.attention[layer], self._heads), (self.mlps[layer], self._neurons)):
                    # After the projection, so that what it wrote need not be computed again.
                    hook = side.project.register_forward_hook(partial(self._take, take, layer))
                    stack.callback(hook.remove)
            capture(self.model, batch.inputs, last, positions="all", into=self._residual)

    def _take(self, take: Callable[[int, Tensor, Tensor], None], layer: int, _: Any, args: Any, output: Tensor) -> None:
        """Hand the tokens that are read to `take`: [M, width] entering the projection, [M, d_model] leaving it."""
        take(layer, args[0][self.at].float(), output[self.at].float())

    def _heads(self, layer: int, x: Tensor, y: Tensor) -> None:
        side, z = self.attention[layer], x.unflatten(1, (self.anatomy.n_heads, -1))
        self._add("z", layer, z)
        self._written = (z, y)
        added = side.added(y)
        self.scale["z"][layer] += (side.scale(y, added) * self.weight).sum()
        if self.norm == "pre":
            self._add("head_effects", layer, head_effects(side, z, self.units[:, layer], y))

    def _residual(self, key: tuple[str, int], value: Tensor) -> None:
        site, layer = key
        if site != "resid_mid":
            return
        x = value[self.at].float()
        self._add("resid_mid", layer, x)
        if self.norm == "post":  # this layer's heads came just before
            reader = self.model.get_submodule(self.anatomy.point("resid_mid", layer).module)
            z, y = self._written
            effects = head_effects(self.attention[layer], z, self.units[:, layer], y, x, reader)
            self._add("head_effects", layer, effects)

    def _neurons(self, layer: int, x: Tensor, y: Tensor) -> None:
        side = self.mlps[layer]
        scale = side.scale(y)
        self._add("mlp_post", layer, x)
        self._add("neuron_sums", layer, x * scale[:, None])
        self.scale["mlp_post"][layer] += (scale * self.weight).sum()
        self.size[layer] += (x.abs() * self.weight[:, None]).sum(0)

    def _add(self, name: str, layer: int, x: Tensor) -> None:
        weight = self.weight.reshape(-1, *(1,) * (x.dim() - 1))
        self.sums[name][:, layer].index_add_(0, self.token_group, x * weight)

    def result(self, position: str, who: Mapping[str, Any], made: Mapping[str, Any]) -> Units:
        e, f = len(self.directions.emotions), len(self.folds)
        weight = self.count.clamp_min(1)
        means = {
            k: (v / weight.reshape(-1, *(1,) * (v.dim() - 1))).unflatten(0, (e, f)).cpu() for k, v in self.sums.items()
        }
        beta = torch.stack(
            [(self.units[:, i] * s.gain()) @ s.weight.float() for i, s in enumerate(self.mlps)], dim=1
        )  # fmt: skip
        total = self.count.sum()
        factors = {
            name: torch.stack([s.gain().float() * (self.scale[site][i] / total) for i, s in enumerate(sides)]).cpu()
            for name, site, sides in (("attn_scale", "z", self.attention), ("mlp_scale", "mlp_post", self.mlps))
        }
        return Units(
            emotions=self.directions.emotions, folds=tuple(self.folds), count=self.count.reshape(e, f).cpu(),
            **means, **factors, neuron_size=(self.size / total).cpu(), beta=beta.cpu(),
            position=position, norm=self.norm, fingerprint=who, provenance=made,
        )  # fmt: skip


@torch.no_grad()
def head_effects(
    side: Sublayer,
    z: Tensor,
    directions: Tensor,
    y: Tensor | None = None,
    resid: Tensor | None = None,
    reader: nn.Module | None = None,
) -> Tensor:
    """[M, heads, E] exact change of the projection on `directions` [E, d_model] when one head's z is set to zero.

    z [M, heads, head_dim]; y [M, d_model] what o_proj made of it (computed when None). Without `reader` the change of
    what attention adds to the residual stream; with it (a norm) the change of reader(resid), where resid [M, d_model]
    is the stream after attention.
    """
    directions = directions.to(z)
    if side.norm is None and reader is None:  # linear: no need to write anything out
        weight = (directions @ side.weight.to(z)).unflatten(1, z.shape[1:])
        return torch.einsum("mhk,ehk->mhe", z, weight)
    writes = head_writes(side, z)
    y = side.written(z.flatten(1)) if y is None else y
    lost = side.added(y)[:, None] - side.added(y[:, None] - writes) if side.norm is not None else writes
    if reader is not None and resid is not None:
        dtype = next(reader.parameters()).dtype
        with_head, without = (reader.forward(x.to(dtype)).float() for x in (resid[:, None], resid[:, None] - lost))
        lost = with_head - without
    return lost @ directions.to(lost).T
