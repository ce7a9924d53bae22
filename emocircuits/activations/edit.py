"""Write activations: edits are data, compiled to one hook per touched module, or to a bias where they are constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError, unknown
from ..models.anatomy import Anatomy, resolve, unwrap
from . import forward as fw
from .sites import check_site, expand_layers

POSITIONS = ("all", "prompt", "generated", "last")
HEAD_SITES = ("q", "k", "v", "z")


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One write: where (`site`, `layer`, `units`), when (`positions`), for which `rows`, and what (the subclass).

    units: heads at q/k/v/z, else dimensions or neurons; None means all. positions: "all", "prompt", "generated",
    "last" (the last token of each forward pass), or (start, stop) spans per row. rows: batch rows to edit, None
    means all. Tensors with a leading batch dimension hold one value per row; under beam search rows repeat.
    """

    site: str = "resid_post"
    layer: int = 0
    units: Sequence[int] | None = None
    positions: str | Sequence[Any] = "all"
    rows: Sequence[int] | None = None

    def transform(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """New values of x [B, T, width] (head sites: [B, T, heads, head_dim]); `units` are already selected."""
        raise TypeError("use a subclass of Edit, such as Add or Ablate")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the fields that hold tensors (moved to the model's device when compiled)."""
        return ()

    def described(self) -> str:
        return f"{type(self).__name__} at {self.site!r}, layer {self.layer}"


def _rowwise(value: Tensor | float, x: Tensor, per_row_dim: int) -> Tensor | float:
    """Broadcast `value` over x [B, T, ...]: a leading batch dimension becomes [B, 1, ...] (repeated for beams)."""
    if not isinstance(value, Tensor) or value.dim() < per_row_dim:
        return value
    if value.shape[0] != x.shape[0]:
        if x.shape[0] % value.shape[0]:
            raise InputError(f"the edit holds values for {value.shape[0]} rows, but the batch has {x.shape[0]}")
        value = value.repeat_interleave(x.shape[0] // value.shape[0], dim=0)
    return value[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Edit):
    """x + coefficient * vector.

    vector: [width] or per row [B, width] (heads: [units, head_dim]); coefficient: number or [B].
    """

    vector: Tensor
    coefficient: float | Tensor = 1.0

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("vector", "coefficient")

    def delta(self) -> Tensor:
        """coefficient * vector, with a leading batch dimension when either has one."""
        if not isinstance(self.coefficient, Tensor) or self.coefficient.dim() == 0:
            return self.vector * self.coefficient
        shape = (-1,) + (1,) * (2 if self.site in HEAD_SITES else 1)
        per_row = self.coefficient.reshape(shape)
        return per_row * (self.vector if self.vector.dim() == len(shape) else self.vector[None])

    def transform(self, x: Tensor) -> Tensor:
        return x + _rowwise(self.delta(), x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """x * factor; factor: number, [width], or per row [B, width]."""

    factor: float | Tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("factor",)

    def transform(self, x: Tensor) -> Tensor:
        return x * _rowwise(self.factor, x, x.dim() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Project(Edit):
    """Move the component along `direction` [width] or [B, width] to `target` (0 removes it), by share `amount`."""

    direction: Tensor
    target: float | Tensor = 0.0
    amount: float = 1.0

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("direction", "target")

    def transform(self, x: Tensor) -> Tensor:
        unit = nn.functional.normalize(self.direction, dim=-1)
        unit = _rowwise(unit, x, x.dim() - 1)
        target = self.target if not isinstance(self.target, Tensor) else self.target.reshape(-1, 1)
        component = (x * unit).sum(-1, keepdim=True)
        return x + self.amount * (_rowwise(target, x, 2) - component) * unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Edit):
    """Keep the component along `direction` (or, without one, each unit's value) within [low, high]."""

    low: float = -torch.inf
    high: float = torch.inf
    direction: Tensor | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("direction",)

    def transform(self, x: Tensor) -> Tensor:
        if self.direction is None:
            return x.clamp(self.low, self.high)
        unit = _rowwise(nn.functional.normalize(self.direction, dim=-1), x, x.dim() - 1)
        component = (x * unit).sum(-1, keepdim=True)
        return x + (component.clamp(self.low, self.high) - component) * unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablate(Edit):
    """Replace by zero, by a `mean` value, or by rows drawn from a pool of other activations (`resample`, seeded).

    mode "zero"; "mean": value [width] (heads: [units, head_dim]); "resample": value [N, width], one draw per row.
    """

    mode: str = "zero"
    value: Tensor | None = None
    seed: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("value",)

    def transform(self, x: Tensor) -> Tensor:
        if self.mode == "zero":
            return torch.zeros_like(x)
        assert self.value is not None
        if self.mode == "mean":
            return self.value.expand_as(x)
        generator = torch.Generator().manual_seed(self.seed)
        pick = torch.randint(len(self.value), (x.shape[0],), generator=generator).to(x.device)
        return self.value[pick][:, None].expand_as(x)


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(Edit):
    """Put in activations from elsewhere: value broadcastable to [B, T, width], such as another run's capture."""

    value: Tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("value",)

    def transform(self, x: Tensor) -> Tensor:
        try:
            return self.value.expand_as(x)
        except RuntimeError as error:
            raise InputError(
                f"the patch has shape {list(self.value.shape)}, but the site holds {list(x.shape)}"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Apply(Edit):
    """Any function of x [B, T, width] that returns the same shape, such as an SAE edit."""

    function: Callable[[Tensor], Tensor]

    def transform(self, x: Tensor) -> Tensor:
        return self.function(x)


def on_layers(edit: Edit, layers: int | str | Sequence[int] | None, n_layers: int) -> list[Edit]:
    """The same edit at several layers ("all", numbers, negatives from the end)."""
    return [replace(edit, layer=layer) for layer in expand_layers(layers, n_layers)]


def check(edits: Sequence[Edit], anatomy: Anatomy) -> None:
    """Raise one clear error for any edit this model cannot take, before anything is installed."""
    for edit in edits:
        check_site(edit.site)
        if edit.site == "pattern":
            raise InputError("attention patterns are read-only; edit 'q', 'k' or 'z', or reallocate attention")
        expand_layers(edit.layer, anatomy.n_layers)
        anatomy.point(edit.site, edit.layer)
        if isinstance(edit.positions, str) and edit.positions not in POSITIONS:
            raise unknown("positions", edit.positions, (*POSITIONS, "(start, stop) spans per row"))
        if isinstance(edit, Ablate):
            if edit.mode not in ("zero", "mean", "resample"):
                raise unknown("ablation mode", edit.mode, ("zero", "mean", "resample"))
            if edit.mode != "zero" and edit.value is None:
                raise InputError(f"ablation by {edit.mode} needs `value`, the activations to put in")
        n_units = anatomy.n_units(edit.site)
        for unit in edit.units or ():
            if not 0 <= unit < n_units:
                kind = "head" if edit.site in HEAD_SITES else "unit"
                raise InputError(f"{kind} {unit} does not exist at {edit.site!r}; choose from 0 to {n_units - 1}")
        _check_width(edit, anatomy)


def _check_width(edit: Edit, anatomy: Anatomy) -> None:
    width = anatomy.head_dim if edit.site in HEAD_SITES else len(edit.units or ()) or anatomy.n_units(edit.site)
    for name in edit.tensors:
        value = getattr(edit, name)
        if not isinstance(value, Tensor) or name in ("coefficient", "target") or value.dim() == 0:
            continue
        if value.shape[-1] not in (width, 1):
            raise InputError(
                f"{edit.described()}: `{name}` has width {value.shape[-1]}, but the site has {width}; was it made for"
                " another model?"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{edit.described()}: `{name}` holds NaN or infinite values")


class _Compiled:
    """The edits of one module tensor, in order, as one hook function."""

    def __init__(self, point_edits: list[tuple[Any, int, Edit]], tracker: fw.ForwardTracker, fired: set[int]) -> None:
        self.items, self.tracker, self.fired = point_edits, tracker, fired
        self._moved: dict[tuple[int, torch.device, torch.dtype], Edit] = {}
        # What enters the MLP's norm is also what the block adds the MLP to: replacing it would leave the stream behind.
        self.in_place = any(e.site == "resid_mid" for _, _, e in point_edits)
        self._units = {i: torch.as_tensor(e.units) for _, i, e in point_edits if e.units is not None}

    def __call__(self, x: Tensor) -> Tensor | None:
        changed, stream = False, x
        x = x.clone() if self.in_place else x
        for point, number, edit in self.items:
            view = point.read(x)
            mask = self._mask(edit, view)
            if isinstance(mask, bool):  # nowhere in this pass
                continue
            new = self._edited(number, edit, view, mask)
            x = new if point.part is None and point.interleaved is None and point.heads is None else point.write(x, new)
            self.fired.add(number)
            changed = True
        if changed and self.in_place:
            stream.copy_(x)
        return x if changed and not self.in_place else None

    def _edited(self, number: int, edit: Edit, view: Tensor, mask: Tensor | None) -> Tensor:
        edit = self._on_device(number, edit, view)
        if edit.units is None:
            new = edit.transform(view)
            return new if mask is None else torch.where(_expand(mask, new), new, view)
        units = self._units[number].to(view.device)
        dim = 2
        old = view.index_select(dim, units)
        new = edit.transform(old)
        new = new if mask is None else torch.where(_expand(mask, new), new, old)
        return view.index_copy(dim, units, new.to(view.dtype))

    def _on_device(self, number: int, edit: Edit, x: Tensor) -> Edit:
        """The edit with its tensors on x's device and dtype, kept for the next call."""
        key = (number, x.device, x.dtype)
        if key not in self._moved:
            fields = {n: getattr(edit, n) for n in edit.tensors}
            moved = {n: v.to(x.device, x.dtype) for n, v in fields.items() if isinstance(v, Tensor)}
            self._moved[key] = replace(edit, **moved) if moved else edit
        return self._moved[key]

    def _mask(self, edit: Edit, x: Tensor) -> Tensor | None | Literal[False]:
        """None: everywhere; False: nowhere in this pass; else [B, T] True where the edit applies."""
        if isinstance(edit.positions, str) and edit.positions == "all" and edit.rows is None:
            return None
        mask = _position_mask(edit, x, self.tracker.current)
        if isinstance(mask, bool) or edit.rows is None:
            return mask
        rows = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        rows[_beam_rows(edit.rows, x.shape[0], edit)] = True
        return rows[:, None] if mask is None else mask & rows[:, None]


def _beam_rows(rows: Sequence[int], batch: int, edit: Edit) -> list[int]:
    if max(rows) >= batch or min(rows) < 0:
        raise InputError(f"{edit.described()} names row {max(rows)}, but the batch has {batch} rows")
    return list(rows)


def _position_mask(edit: Edit, x: Tensor, current: fw.Forward | None) -> Tensor | None | Literal[False]:
    policy = edit.positions
    if policy == "all":
        return None
    if current is None:
        raise HookError(f"{edit.described()}: positions {policy!r} need the decoder to run before this site")
    if policy == "last":
        return nn.functional.one_hot(current.last(x.device), current.length).bool()
    if policy in ("prompt", "generated"):
        return _phase_mask(policy == "prompt", x, current)
    spans: list[Any] = [[s] if isinstance(s, tuple) else list(s) for s in policy]
    if x.shape[0] % len(spans):
        raise InputError(f"{edit.described()}: spans are given for {len(spans)} rows, the batch has {x.shape[0]}")
    spans = [s for s in spans for _ in range(x.shape[0] // len(spans))]
    index, mask = current.index(x.device), torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for row, row_spans in enumerate(spans):
        for start, stop in row_spans:
            mask[row] |= (index[row] >= start) & (index[row] < stop)
    mask &= current.real(x.device)
    return mask if bool(mask.any()) else False


def _phase_mask(prompt: bool, x: Tensor, current: fw.Forward) -> Tensor | None | Literal[False]:
    """Columns of the prompt or of the generated part; the common cases need no mask at all."""
    end = current.past + current.length
    if end <= current.prompt_length:
        return None if prompt else False
    if current.past >= current.prompt_length:
        return False if prompt else None
    columns = current.columns(x.device) < current.prompt_length
    return (columns if prompt else ~columns).expand(x.shape[0], -1)


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (like.dim() - 2))


@contextmanager
def edit(model: Any, edits: Edit | Sequence[Edit], *, compile_to: str = "auto", strict: bool = True) -> Iterator[None]:
    """Apply edits to every forward pass inside the block; afterwards the model is bit-identical to before.

    compile_to: "auto" turns constant adds into biases where the architecture allows it, "hook" never does, "bias"
    insists (HookError otherwise). strict: raise HookError after the block for an edit that no forward pass reached.
    Works under generate() with KV cache and beams, autocast, torch.compile, device_map, and with gradients.
    """
    module, edits = unwrap(model), [edits] if isinstance(edits, Edit) else list(edits)
    installed = Installed(model, module, edits, compile_to)
    try:
        yield
    except BaseException:
        installed.remove()
        raise
    installed.remove()
    if strict:
        installed.check_fired()


class Installed:
    """Edits in place on a model until `remove()`; the mechanism behind `edit` and `Steerer.install`."""

    def __init__(self, model: Any, module: nn.Module, edits: list[Edit], compile_to: str = "auto") -> None:
        if compile_to not in ("auto", "hook", "bias"):
            raise unknown("compile_to", compile_to, ("auto", "hook", "bias"))
        anatomy = resolve(module)
        check(edits, anatomy)
        self.edits, self.fired = edits, set[int]()
        self.tracker = fw.ForwardTracker(module, anatomy)
        self._stack = ExitStack()
        try:
            self._install(model, module, anatomy, compile_to)
        except BaseException:
            self._stack.close()
            raise

    def _install(self, model: Any, module: nn.Module, anatomy: Anatomy, compile_to: str) -> None:
        from .bias import add_biases, constant_add
        from .compiled import hooks_under_compile

        numbered = list(enumerate(self.edits))
        biases = [] if compile_to == "hook" else [(i, e) for i, e in numbered if constant_add(e, module, anatomy)]
        as_bias = {i for i, _ in biases}
        if compile_to == "bias" and len(biases) < len(numbered):
            bad = next(e for i, e in numbered if i not in as_bias)
            raise HookError(
                f"{bad.described()} cannot be a bias of this {anatomy.structure} model; use compile_to='hook'"
            )
        hooked: dict[tuple[str, str], list[tuple[Any, int, Edit]]] = {}
        for i, e in numbered:
            if i not in as_bias:
                point = anatomy.point(e.site, e.layer % anatomy.n_layers)
                hooked.setdefault((point.module, point.io), []).append((point, i, e))
        if hooked:
            self._stack.enter_context(hooks_under_compile(model))
            for handle in self.tracker.install():
                self._stack.callback(handle.remove)
        self._stack.enter_context(add_biases(module, anatomy, [e for _, e in biases]))
        self.fired |= as_bias
        for (path, io), items in hooked.items():
            handle = fw.hook_point(module.get_submodule(path), io, _Compiled(items, self.tracker, self.fired))
            self._stack.callback(handle.remove)

    def remove(self) -> None:
        """Take everything off the model again; safe to call twice."""
        self._stack.close()

    def check_fired(self) -> None:
        """Raise HookError naming the first edit that no forward pass reached (nothing ran: that is said instead)."""
        silent = [e for i, e in enumerate(self.edits) if i not in self.fired]
        if silent and self.tracker.count:
            where = silent[0].described()
            raise HookError(
                f"{where} never fired in {self.tracker.count} forward pass(es) (positions: {silent[0].positions!r})"
            )
        if silent:
            raise HookError(f"{silent[0].described()} never fired: no forward pass of this model ran inside the block")
