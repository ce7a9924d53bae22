"""Reading through nnsight, on this machine or, with ``remote=True``, on the servers of NDIF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import HookError, InputError, MissingPackageError
from ..models.anatomy import Anatomy, Point, resolve, unwrap
from . import forward as fw
from .capture import Activations, adapt_inputs
from .sites import SITES, Key

# nnsight hands out attention probabilities with the attention's output, so after `z`.
ORDER = [site for site in SITES if site != "pattern"]
ORDER.insert(ORDER.index("z") + 1, "pattern")


@dataclass(frozen=True)
class Read:
    """One visit to a module's input or output: the hidden state (0) or the attention probabilities (1) for `keys`."""

    module: str
    io: str
    index: int
    keys: tuple[Key, ...]


def capture_nnsight(
    model: Any,
    batch: dict[str, Any],
    keys: Sequence[Key],
    positions: fw.Positions,
    reduce: str | None,
    remote: bool | str = False,
) -> Activations:
    """The nnsight backend of `capture`: the same values, from an nnsight model, or a torch model that it wraps here.

    Only the wanted positions leave the trace, which stops after the last wanted site. `remote` is handed to nnsight
    (True: NDIF, with a model made from a hub id). Attention patterns need ``attn_implementation="eager"``. Raises
    MissingPackageError without nnsight, InputError for positions that a row does not have, and HookError for a
    site that the forward pass does not reach, or that holds NaN.
    """
    nnsight = _require_nnsight()
    module = unwrap(model)
    anatomy = resolve(module)
    if anatomy.hook_points:
        raise InputError("a TransformerLens model cannot be read through nnsight; use backend='torch'")
    batch = adapt_inputs(module, batch)
    plan = fw.plan(positions, reduce, _forward(batch), torch.device("cpu"))
    reads = execution_order(keys, anatomy)
    with _one_sentence(reads):
        values = _trace(nnsight, _traceable(nnsight, model, module, remote), batch, reads, plan, remote)
    tensors: dict[Key, Tensor] = {}
    for read, value in zip(reads, values):
        for key in read.keys:
            tensors[key] = value if read.index else anatomy.point(*key).read(value)
    _require_finite(tensors, plan.valid)
    return Activations({key: tensors[key] for key in keys}, plan.valid)


def execution_order(keys: Sequence[Key], anatomy: Anatomy) -> list[Read]:
    """The reads for `keys` as a forward pass reaches them, as nnsight requires; keys in one tensor share a read."""
    found: dict[tuple[str, str, int], list[Key]] = {}
    for site, layer in sorted(keys, key=lambda key: (key[0] == "final_norm", key[1], ORDER.index(key[0]))):
        index = int(site == "pattern")
        point = Point(anatomy.attention[layer]) if index else anatomy.point(site, layer)
        found.setdefault((point.module, point.io, index), []).append((site, layer))
    return [Read(*where, tuple(at)) for where, at in found.items()]


def _require_nnsight() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise MissingPackageError('backend="nnsight" needs nnsight; run: pip install "emocircuits[lens]"') from error
    return nnsight


def _traceable(nnsight: Any, model: Any, module: torch.nn.Module, remote: bool | str) -> Any:
    """The nnsight model behind `model` (itself, or inside a Loaded), else a new wrapper around the torch module."""
    for candidate in (model, getattr(model, "model", None)):
        if isinstance(candidate, nnsight.Envoy):
            return candidate
    if remote:
        raise InputError("remote=True needs an nnsight model made from a hub id, such as nnsight.LanguageModel(name)")
    return nnsight.NNsight(module)


def _forward(batch: dict[str, Any]) -> fw.Forward:
    """What `ForwardTracker` would see of this batch; known before the model runs, because there is no cache."""
    tokens = next((batch[name] for name in fw.TOKEN_NAMES if batch.get(name) is not None), None)
    if tokens is None:
        raise InputError("the inputs hold neither input_ids nor inputs_embeds, so positions are unknown")
    mask = batch.get("attention_mask")
    mask = mask.bool().cpu() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    return fw.Forward(tokens.shape[0], tokens.shape[1], 0, mask, tokens.shape[1])


def _trace(
    nnsight: Any, root: Any, batch: dict[str, Any], reads: list[Read], plan: fw.Plan, remote: bool | str
) -> list[Tensor]:
    """Values of `reads`. The block below is sent as source when remote, so it uses tensors and plain values only."""
    steps = [(_envoy(root, read.module), read.io, read.index) for read in reads]
    columns, weights, squeeze = plan.columns, plan.weights, plan.squeeze
    shape, select = plan.valid.shape[:1], fw.select
    batch = {"use_cache": False, **batch} if hasattr(unwrap(root), "generation_config") else batch
    where = {"remote": remote} if remote else {}
    if remote:
        nnsight.register(fw.__name__)  # `select` is not installed there
    with torch.no_grad(), root.trace(**batch, **where) as tracer:
        values = nnsight.save([])
        for envoy, io, index in steps:
            found = envoy.input if io == "input" else envoy.output
            found = found if isinstance(found, torch.Tensor) else found[index]
            if index == 0:
                if found.dim() == 2:  # a mixture of experts may flatten its tokens
                    found = found.unflatten(0, (shape[0], -1))
                found = select(found, columns, weights, squeeze)
            values.append(found)
        tracer.stop()
    return values


def _envoy(root: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        root = getattr(root, part)
    return root


@contextmanager
def _one_sentence(reads: list[Read]) -> Iterator[None]:
    """nnsight's error about order, as ours."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfOrderError":
            raise
        names = ", ".join(f"{site}.{layer}" for read in reads[:3] for site, layer in read.keys)
        raise HookError(
            f"nnsight did not reach the sites ({names}, ...) in the order of this model's forward pass;"
            " use backend='torch'"
        ) from error


def _require_finite(tensors: dict[Key, Tensor], valid: Tensor) -> None:
    for (site, layer), value in tensors.items():
        if value is None:
            raise HookError(
                "attention patterns through nnsight need attn_implementation='eager'; or use backend='torch'"
            )
        if not fw.is_finite(site, value, valid):
            raise HookError(
                f"activations of {site!r} at layer {layer} hold NaN or infinite values; check the model's dtype"
            )
