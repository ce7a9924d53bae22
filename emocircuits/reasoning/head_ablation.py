"""Ablate chosen heads beside random ones: any measure of a model's behaviour, under every draw.

Heads are zeroed where heads are: in z, the input of o_proj. The published code (Thought Anchors, arXiv 2506.19143)
zeroes slices of attention's output, which mix all heads. Random heads are as many in each layer, in a second control
also of about the same norm, because heads that add much do more damage whatever they are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ..activations import capture
from ..activations.edit import edit
from ..activations.edits import Ablate, Edit
from ..artefact import write_json_atomic
from ..circuits.assemble import Circuit, random_like
from ..circuits.sublayers import attention_side
from ..errors import HookError, InputError, unknown
from ..models.anatomy import resolve, unwrap
from .receivers import Head

Measure = Callable[[], "float | Mapping[str, float]"]
JITTER = 0.1
"""Relative noise on norms when heads of nearest norm are drawn, so that draws differ."""


@contextmanager
def ablated(model: Any, heads: Sequence[Head]) -> Iterator[None]:
    """Zero the output of heads (layer, head) in every pass in the block, at all positions.

    Raises InputError for no heads, or for heads the model does not have, and HookError where z is not defined.
    """
    with edit(model, _edits(heads)):
        yield


def _edits(heads: Sequence[Head]) -> list[Edit]:
    if not heads:
        raise InputError("no head was given to ablate; name at least one as (layer, head)")
    layers: dict[int, list[int]] = {}
    for layer, head in dict.fromkeys(heads):
        layers.setdefault(layer, []).append(head)
    return [Ablate(site="z", layer=layer, units=units) for layer, units in sorted(layers.items())]


@torch.no_grad()
def head_norms(model: Any, texts: Sequence[Tensor]) -> Tensor:
    """[L, H] mean norm of what each head adds to the residual stream, over all tokens but the first of each text.

    texts: token ids, [T] each. With a norm after attention (Gemma, OLMo 2) a head's share of the normed output counts.
    NaN in layers without heads. Raises InputError for texts without a second token.
    """
    module, anatomy = unwrap(model), resolve(model)
    if not texts or any(len(text) < 2 for text in texts):
        raise InputError("head norms need texts of at least two tokens: the first is an attention sink and left out")
    layers = [layer for layer in range(anatomy.n_layers) if anatomy.has("z", layer)]
    if not layers:
        raise HookError(f"this {anatomy.family} model has no heads whose output can be read (site 'z')")
    total = torch.zeros(anatomy.n_layers, anatomy.n_heads)
    sides = {layer: attention_side(module, layer) for layer in layers}
    for text in texts:
        found = capture(module, text, "z", layers, positions="all")
        for layer, side in sides.items():
            z = found["z", layer][0, 1:].float()  # [T - 1, H, head_dim]
            weight = (side.weight * side.gain()[:, None]).float().unflatten(1, z.shape[1:])
            gram = torch.einsum("dhk,dhl->hkl", weight, weight)
            squared = torch.einsum("mhk,hkl,mhl->mh", z, gram, z).clamp_min(0)
            scale = side.scale(side.written(z.flatten(1))).float().abs()[:, None]
            total[layer] += (squared.sqrt() * scale).sum(0).cpu()
    mean = total / sum(len(text) - 1 for text in texts)
    mean[[layer for layer in range(anatomy.n_layers) if layer not in sides]] = torch.nan
    return mean


def random_heads(
    heads: Sequence[Head], shape: tuple[int, int], *, norms: Tensor | None = None, seed: int = 0
) -> list[Head]:
    """As many other heads in each layer of a model with `shape` (layers, heads per layer).

    norms: [L, H]; then each head is replaced by one of about the same norm. A layer that is short of other heads
    borrows from the nearest layer that is not.
    """
    n_layers, n_heads = shape
    members = Circuit("", tuple(dict.fromkeys(heads)), (), (math.nan,) * len(set(heads)), ())
    sizes = None
    if norms is not None:
        noise = torch.randn(norms.shape, generator=torch.Generator().manual_seed(seed))
        sizes = {"heads": norms.nan_to_num() * (1 + JITTER * noise), "neurons": torch.zeros(n_layers, 0)}
    widths = {"heads": n_heads, "neurons": 0}
    return list(random_like(members, widths, n_layers, sizes=sizes, seed=seed).heads)


@dataclass(frozen=True)
class HeadAblation:
    """Values of a measure: untouched, without the heads, and without every draw of control heads.

    controls: {"random": one {metric: value} per draw, "norm-matched": the same, if norms were given}; drawn: which
    heads. norm_ratio: {control: summed norm of its heads, averaged over draws, divided by that of the ablated heads}.
    """

    heads: tuple[Head, ...]
    base: Mapping[str, float]
    ablated: Mapping[str, float]
    controls: Mapping[str, tuple[Mapping[str, float], ...]]
    drawn: Mapping[str, tuple[tuple[Head, ...], ...]]
    norm_ratio: Mapping[str, float]

    def effect(self, metric: str = "value") -> float:
        """What the ablation changes."""
        return self._of(self.ablated, metric) - self.base[metric]

    def control_effects(self, control: str = "random", metric: str = "value") -> list[float]:
        """What each draw of control heads changes."""
        if control not in self.controls:
            raise unknown("control", control, self.controls)
        return [self._of(values, metric) - self.base[metric] for values in self.controls[control]]

    def excess(self, control: str = "random", metric: str = "value") -> float:
        """The effect beyond that of the average control."""
        effects = self.control_effects(control, metric)
        return self.effect(metric) - sum(effects) / len(effects)

    def p_value(self, control: str = "random", metric: str = "value") -> float:
        """Share of draws, the heads themselves among them, whose effect is at least as large in size.

        NaN when the effect is: there is nothing to compare.
        """
        own, effects = abs(self.effect(metric)), self.control_effects(control, metric)
        return math.nan if math.isnan(own) else (1 + sum(abs(e) >= own for e in effects)) / (1 + len(effects))

    def _of(self, values: Mapping[str, float], metric: str) -> float:
        if metric not in values:
            raise unknown("metric", metric, values)
        return values[metric]


def ablation(
    model: Any,
    heads: Sequence[Head],
    measure: Measure,
    *,
    draws: int = 10,
    norms: Tensor | None = None,
    seed: int = 0,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> HeadAblation:
    """Run `measure` on the model as it is, without `heads`, and without `draws` sets of random heads.

    measure: takes nothing, runs the model and returns a number or {metric: number}; accuracy, truncation, length and
    the cross-entropy of plain text belong together, for heads that break the model lower accuracy too. norms: [L, H]
    from `head_norms`; adds as many draws matched on them. save: a JSON file that gets every value at once, and from
    which an interrupted run goes on. Raises InputError for heads the model does not have or a file of another run.
    """
    if draws < 1:
        raise InputError(f"at least one draw of control heads is needed (10 or more is better), not {draws}")
    anatomy, own = resolve(model), tuple((int(a), int(b)) for a, b in dict.fromkeys(map(tuple, heads)))
    _edits(own)
    for layer, head in own:
        if not (0 <= layer < anatomy.n_layers and 0 <= head < anatomy.n_heads):
            raise InputError(
                f"head ({layer}, {head}) does not exist; this model has {anatomy.n_layers} layers of"
                f" {anatomy.n_heads} heads"
            )
        anatomy.point("z", layer)
    shape = (anatomy.n_layers, anatomy.n_heads)
    if norms is not None and tuple(norms.shape) != shape:
        raise InputError(f"norms must have shape {list(shape)} as from head_norms, not {list(norms.shape)}")
    kinds: dict[str, Tensor | None] = {"random": None} | ({} if norms is None else {"norm-matched": norms})
    drawn = {
        kind: tuple(tuple(random_heads(own, shape, norms=n, seed=seed * draws + i)) for i in range(draws))
        for kind, n in kinds.items()
    }
    jobs: dict[str, tuple[Head, ...]] = {"base": (), "ablated": own}
    jobs |= {f"{kind} {i}": chosen for kind, sets in drawn.items() for i, chosen in enumerate(sets)}
    values = _measured(model, jobs, measure, None if save is None else Path(save), progress)
    found = {kind: tuple(values[f"{kind} {i}"] for i in range(draws)) for kind in drawn}
    ratio = {} if norms is None else {kind: _ratio(norms, own, sets) for kind, sets in drawn.items()}
    return HeadAblation(own, values["base"], values["ablated"], found, drawn, ratio)


def _ratio(norms: Tensor, own: Sequence[Head], sets: Sequence[Sequence[Head]]) -> float:
    size = [sum(float(norms[head]) for head in chosen) for chosen in (own, *sets)]
    return sum(size[1:]) / len(sets) / size[0] if size[0] else math.nan


def _measured(
    model: Any, jobs: Mapping[str, Sequence[Head]], measure: Measure, save: Path | None, progress: Progress | None
) -> dict[str, dict[str, float]]:
    """{job: {metric: value}}; those that `save` already holds are not run again."""
    asked = {name: [list(head) for head in heads] for name, heads in jobs.items()}
    values: dict[str, dict[str, float]] = {}
    if save is not None and save.is_file():
        kept = _read(save)
        if kept.get("heads") != asked:
            raise InputError(f"{save} holds another ablation (other heads, draws or seed); give another file")
        values = kept["values"]
    task = progress.add_task("ablating heads", total=len(jobs), completed=len(values)) if progress else None
    for name, heads in jobs.items():
        if name in values:
            continue
        if heads:
            with ablated(model, heads):
                found = measure()
        else:
            found = measure()
        values[name] = (
            {k: float(v) for k, v in found.items()} if isinstance(found, Mapping) else {"value": float(found)}
        )
        if save is not None:
            write_json_atomic(save, {"heads": asked, "values": values})
        if progress is not None and task is not None:
            progress.advance(task)
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); give the file of an interrupted run, or a new one") from error
    return kept if isinstance(kept, dict) else {}
