"""Read activations: as few hooks as the request needs, reduced on the device, and no work that nobody reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError, unknown
from ..models.anatomy import Anatomy, Point, resolve, unwrap
from ..models.lens import hooked_inputs, is_hooked
from . import forward as fw
from .sites import Key, SiteRequest, expand_sites


class _StopForward(BaseException):
    """Leaves the forward pass once everything wanted has been read; never seen by users."""


class Activations(Mapping[Key, Tensor]):
    """Captured tensors by (site, layer), with `valid` [B, P] marking real tokens and optional `logits`."""

    def __init__(self, tensors: dict[Key, Tensor], valid: Tensor | None = None, logits: Tensor | None = None) -> None:
        self._tensors, self.valid, self.logits = tensors, valid, logits

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self._tensors:
            raise unknown("captured key", key, self._tensors)
        return self._tensors[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stack(self, site: str) -> Tensor:
        """[n_layers captured, B, ...] of one site, layers in ascending order."""
        layers = sorted(layer for name, layer in self._tensors if name == site)
        if not layers:
            raise unknown("captured site", site, sorted({name for name, _ in self._tensors}))
        return torch.stack([self._tensors[site, layer] for layer in layers])

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Activations:
        """The same activations on another device or in another dtype."""
        moved = {key: value.to(device=device, dtype=dtype) for key, value in self._tensors.items()}
        return Activations(moved, self.valid, self.logits)


class _Reader:
    """Hooks for one request; one instance serves one batch (capture) or many forwards (record)."""

    def __init__(
        self,
        model: nn.Module,
        keys: list[Key],
        positions: fw.Positions,
        reduce: str | None,
        stop: bool,
        into: Callable[[Key, Tensor], None] | None = None,
    ) -> None:
        self.anatomy = resolve(model)
        self.patterns = [key[1] for key in keys if key[0] == "pattern" and key not in self.anatomy.points]
        watched = {("pattern", layer) for layer in self.patterns}
        self.points = {key: self.anatomy.point(*key) for key in keys if key not in watched}
        self.model, self.keys, self.positions = model, keys, positions
        self.reduce, self.stop, self.into = reduce, stop, into
        self.tracker = fw.ForwardTracker(model, self.anatomy)
        self.values: dict[Key, Tensor] = {}
        self.valid: Tensor | None = None
        self._planned: tuple[int, fw.Plan] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self.tracker.install():
                stack.callback(handle.remove)
            by_module: dict[tuple[str, str], list[tuple[Key, Point]]] = {}
            for key, point in self.points.items():
                by_module.setdefault((point.module, point.io), []).append((key, point))
            for (path, io), wanted in by_module.items():
                hook = fw.hook_point(self.model.get_submodule(path), io, self._hook(wanted))
                stack.callback(hook.remove)
            if self.patterns:
                from .pattern import watch_patterns

                stack.enter_context(watch_patterns(self.model, self.anatomy, self.patterns, self._keep_pattern))
            yield

    def _hook(self, wanted: list[tuple[Key, Point]]) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            for key, point in wanted:
                if key[0] == "pattern":
                    self._keep(key, x)
                    continue
                kept = self._plan(x.device).select(_batched(point.read(x), self.tracker.current))
                # An edit of resid_mid writes in place, also after we have read.
                self._keep(key, kept.clone() if key[0] == "resid_mid" and kept.shape == x.shape else kept)

        return read

    def _keep(self, key: Key, value: Tensor) -> None:
        value = value if torch.is_grad_enabled() else value.detach()
        if self.into is not None:
            self.into(key, value)
            # Not a view of the value, which would keep the whole tensor alive.
            self.values[key] = fw.is_finite(key[0], value, self.valid)
        else:
            self.values[key] = value
        if self.stop and len(self.values) == len(self.keys):
            raise _StopForward

    def _keep_pattern(self, layer: int, probabilities: Tensor) -> None:
        self._keep(("pattern", layer), probabilities)

    def _plan(self, device: torch.device) -> fw.Plan:
        """How to read this forward's positions, computed once per forward."""
        if self.tracker.current is None:
            raise HookError("the decoder did not run before the block that was read; is the model wrapped?")
        if self._planned is None or self._planned[0] != self.tracker.count:
            self._planned = (self.tracker.count, fw.plan(self.positions, self.reduce, self.tracker.current, device))
            self.valid = self._planned[1].valid
        return self._planned[1]

    def check(self) -> None:
        """Raise HookError when a site never fired, or when a value is NaN or infinite."""
        silent = [key for key in self.keys if key not in self.values]
        if silent:
            site, layer = silent[0]
            raise HookError(
                f"site {site!r} at layer {layer} never fired during the forward pass; nothing was read there"
            )
        for (site, layer), value in self.values.items():
            if not (value if self.into is not None else fw.is_finite(site, value, self.valid)):
                raise HookError(
                    f"activations of {site!r} at layer {layer} hold NaN or infinite values; check the model's dtype"
                )


def _batched(x: Tensor, current: fw.Forward | None) -> Tensor:
    """Give [B * T, ...] tensors (modules that flatten tokens, such as some MoE blocks) their batch dimension."""
    if current is not None and x.dim() == 2 and x.shape[0] == current.batch * current.length:
        return x.unflatten(0, (current.batch, current.length))
    return x


def capture(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    sites: SiteRequest = "resid_post",
    layers: int | str | Iterable[int] | None = None,
    *,
    positions: fw.Positions = "last",
    reduce: str | None = None,
    logits: fw.Positions | None = None,
    into: Callable[[Key, Tensor], None] | None = None,
    grad: bool = False,
    backend: str = "torch",
    remote: bool = False,
) -> Activations:
    """Run the model on one batch and keep the wanted activations, on the model's device.

    The forward pass stops after the last wanted site, so the LM head never runs unless `logits` asks for
    positions. Values are [B, ...] for one position, [B, P, ...] for several; see `sites.SITES` for the rest.
    positions: "last" (last real token of each row), "all", an int or list (among each row's real tokens, negative
    from the end), a tensor [B, P], or spans (start, stop) per row with ``reduce="mean"``. `into(key, tensor)`
    receives each tensor instead of keeping it (see `moments.Moments`). `backend="nnsight"` reads through nnsight,
    with ``remote=True`` on NDIF. Raises InputError for bad requests and HookError for sites that cannot be read.
    """
    batch = as_inputs(inputs)
    module = unwrap(model)
    anatomy = resolve(module)
    keys = expand_sites(sites, layers, anatomy)
    _check_padding(module, batch)
    if backend == "nnsight":
        from .remote import capture_nnsight

        if logits is not None or grad or into is not None:
            raise InputError("backend='nnsight' reads activations only; drop `logits`, `grad` and `into`")
        return capture_nnsight(model, batch, keys, positions, reduce, remote=remote)
    if backend != "torch" or remote:
        raise unknown("backend for remote execution" if remote else "backend", backend, ("torch", "nnsight")[remote:])
    _check_weights(module)
    batch = adapt_inputs(module, batch)
    reader = _Reader(module, keys, positions, reduce, stop=logits is None, into=into)
    batch = moved(module, batch)
    wanted: Tensor | None = None
    with torch.set_grad_enabled(grad), reader.installed(), ExitStack() as stack:
        if logits is not None:
            stack.enter_context(_logits_at(module, anatomy, reader.tracker, logits))
        try:
            output = module(**batch, **_quiet(module, batch))
            wanted = (output if isinstance(output, Tensor) else output.logits) if logits is not None else None
        except _StopForward:
            pass
    reader.check()
    return Activations({} if into is not None else reader.values, reader.valid, wanted)


@contextmanager
def record(
    model: Any,
    sites: SiteRequest = "resid_post",
    layers: int | str | Iterable[int] | None = None,
    *,
    positions: fw.Positions = "last",
    reduce: str | None = None,
) -> Iterator[list[Activations]]:
    """Record every forward pass of your own code inside the block, for example ``model.generate(...)``.

    Yields a list that grows by one Activations per forward pass (the prompt, then each generated token). Hooks are
    gone after the block, also on exceptions. Raises HookError at the end when a site never fired.
    """
    module = unwrap(model)
    keys = expand_sites(sites, layers, resolve(module))
    reader = _Reader(module, keys, positions, reduce, stop=False)
    steps: list[Activations] = []

    def close(*_: Any) -> None:
        reader.check()
        steps.append(Activations(dict(reader.values), reader.valid))
        reader.values.clear()

    with _compiled_hooks(model), reader.installed():
        handle = module.get_submodule(reader.anatomy.last).register_forward_hook(close)
        try:
            yield steps
        finally:
            handle.remove()
    if not steps:
        raise HookError(f"site {keys[0][0]!r} never fired: no forward pass of this model ran inside the block")


def as_inputs(inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Model keyword arguments from a mapping or a tensor of token ids [B, T]."""
    if isinstance(inputs, Tensor):
        return {"input_ids": inputs if inputs.dim() == 2 else inputs[None]}
    if not isinstance(inputs, Mapping):
        raise InputError("inputs must be a mapping such as tokenizer(texts, return_tensors='pt'), or a tensor of ids")
    return dict(inputs)


def adapt_inputs(module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as this model's forward takes it: other argument names, or positions counted from the padding on.

    Raises InputError for inputs that the model cannot take.
    """
    if is_hooked(module):
        return hooked_inputs(batch)
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    left_padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())
    if ids is None or not left_padded or "position_ids" in batch or not _learns_positions(module):
        return batch
    assert isinstance(mask, Tensor)
    return {**batch, "position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)}


def _learns_positions(module: nn.Module) -> bool:
    """Whether absolute positions matter: the model takes position ids and has no rotary embedding."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    takes = "position_ids" in inspect.signature(type(module).forward).parameters
    return takes and getattr(text, "rope_parameters", None) is None


def _check_weights(module: nn.Module) -> None:
    offloaded = any(hasattr(m, "_hf_hook") for m in module.modules())  # accelerate brings the weights when needed
    if not offloaded and all(p.is_meta for p in module.parameters()):
        raise InputError(
            "the model holds no weights yet; load it first (nnsight: dispatch=True), or use backend='nnsight'"
        )


def moved(module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch on the device of the first weights; untouched when those are offloaded, for accelerate moves it."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return batch
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}


def _quiet(module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """No KV cache when the caller does not bring one: nothing would read it."""
    return {} if "use_cache" in batch or not hasattr(module, "generation_config") else {"use_cache": False}


def _check_padding(model: nn.Module, batch: dict[str, Any]) -> None:
    """Padded ids without a mask are the field's commonest silent error; refuse them."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    config = getattr(model, "config", None)
    pad = getattr(config, "pad_token_id", None)
    limit = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    if isinstance(ids, Tensor) and limit and ids.shape[-1] > limit:
        raise InputError(f"the input has {ids.shape[-1]} tokens, more than this model's context of {limit}; shorten it")
    if mask is None and isinstance(ids, Tensor) and ids.shape[-1] > 1 and pad is not None:
        edge = ids[:, [0, -1]] == pad
        twice = (ids[:, :2] == pad).all(1) | (ids[:, -2:] == pad).all(1)  # one alone may be a begin or end token
        if twice.any() or (edge.any() and not edge.all(0).any()):
            raise InputError("the batch is padded but has no attention_mask; pass the tokenizer's whole output")
    if isinstance(mask, Tensor) and mask.dim() == 2 and (mask.sum(-1) == 0).any():
        row = int((mask.sum(-1) == 0).nonzero()[0])
        raise InputError(f"row {row} of the batch is empty (its attention_mask is all zero)")


@contextmanager
def _logits_at(
    model: nn.Module, anatomy: Anatomy, tracker: fw.ForwardTracker, positions: fw.Positions
) -> Iterator[None]:
    """Let the LM head see only the wanted positions, as one contiguous tensor."""
    if anatomy.lm_head is None:
        raise HookError("this model has no LM head, so there are no logits to read")

    def trim(x: Tensor) -> Tensor:
        assert tracker.current is not None
        columns, _, _ = fw.position_weights(positions, tracker.current, x.device)
        return x[torch.arange(x.shape[0], device=x.device)[:, None], columns]

    handle = fw.hook_point(model.get_submodule(anatomy.lm_head), "input", trim)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _compiled_hooks(model: Any) -> Iterator[None]:
    from .compiled import hooks_under_compile

    with hooks_under_compile(model, unwrap(model)):
        yield


def batches(n: int, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of n texts in batches of similar length (longest first), so that little is padded."""
    order = sorted(range(n), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]
