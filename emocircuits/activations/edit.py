"""Write activations: edits compiled to one hook per touched module, or to a bias where they are constant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError, unknown
from ..models.anatomy import Anatomy, resolve, unwrap
from . import forward as fw
from .control import Control, Paces, enter, factor_of, show
from .edits import HEAD_SITES, POSITIONS, SIDES, Ablate, Clamp, Edit, Project
from .ownership import holding
from .sites import check_site, expand_layers


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
        _check_values(edit)
        if isinstance(edit, Project) and edit.side not in SIDES:
            raise unknown("side", edit.side, SIDES)
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


def _check_values(edit: Edit) -> None:
    direction = getattr(edit, "direction", None)
    if isinstance(direction, Tensor) and bool((direction.norm(dim=-1) == 0).any()):
        raise InputError(f"{edit.described()}: `direction` is zero, so there is no component along it")
    if isinstance(edit, Clamp) and edit.low > edit.high:
        raise InputError(f"{edit.described()}: low {edit.low:g} is above high {edit.high:g}")


def _check_width(edit: Edit, anatomy: Anatomy) -> None:
    width = anatomy.head_dim if edit.site in HEAD_SITES else len(edit.units or ()) or anatomy.n_units(edit.site)
    for name in edit.tensors:
        value = getattr(edit, name)
        if not isinstance(value, Tensor) or name in ("coefficient", "target", "amount") or value.dim() == 0:
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

    def __init__(
        self, point_edits: list[tuple[Any, int, Edit]], tracker: fw.ForwardTracker, fired: set[int],
        paces: Paces,
    ) -> None:  # fmt: skip
        self.items, self.tracker, self.fired, self.paces = point_edits, tracker, fired, paces
        self._moved: dict[tuple[int, torch.device, torch.dtype], Edit] = {}
        # What enters the MLP's norm is also what the block adds the MLP to: replacing it would leave the stream behind.
        self.in_place = any(e.site == "resid_mid" for _, _, e in point_edits)
        self._units = {i: torch.as_tensor(e.units) for _, i, e in point_edits if e.units is not None}

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.tracker.elsewhere:
            return None
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
            new = self._paced(edit, view, edit.transform(view)).to(view.dtype)
            return new if mask is None else torch.where(_expand(mask, new), new, view)
        units = self._units[number].to(view.device)
        dim = 2
        old = view.index_select(dim, units)
        new = self._paced(edit, old, edit.transform(old))
        new = new if mask is None else torch.where(_expand(mask, new), new, old)
        return view.index_copy(dim, units, new.to(view.dtype))

    def _paced(self, edit: Edit, old: Tensor, new: Tensor) -> Tensor:
        """As far from old to new (in float32) as the edit's control says in this pass."""
        if edit.control is None:
            return new
        factor, old = factor_of(self.paces, edit.control, old.device).float(), old.float()
        return old + _expand(factor, old) * (new - old)

    def _on_device(self, number: int, edit: Edit, x: Tensor) -> Edit:
        """The edit with its tensors on x's device and dtype, kept for the next call.

        In float32 where differences of large numbers matter: components that are moved, and what a control scales.
        """
        key = (number, x.device, x.dtype)
        if key not in self._moved:
            fields = {n: getattr(edit, n) for n in edit.tensors}
            dtype = torch.float32 if isinstance(edit, Project) or edit.control is not None else x.dtype
            moved = {n: v.to(x.device, dtype) for n, v in fields.items() if isinstance(v, Tensor)}
            self._moved[key] = replace(edit, **moved) if moved else edit
        return self._moved[key]

    def _mask(self, edit: Edit, x: Tensor) -> Tensor | None | Literal[False]:
        """None: everywhere; False: nowhere in this pass; else [B, T] True where the edit applies."""
        if isinstance(edit.positions, str) and edit.positions == "all" and edit.rows is None:
            return None
        return _where(edit, x, self.tracker)


@fw.outside_compiled
def _where(edit: Edit, x: Tensor, tracker: fw.ForwardTracker) -> Tensor | None | Literal[False]:
    """`_Compiled._mask` for edits of some positions or rows."""
    current = tracker.current
    mask = _position_mask(edit, x, current)
    if isinstance(mask, bool) or edit.rows is None:
        return mask
    repeats = current.repeats if current is not None else 1
    rows = _row_mask(edit, x.shape[0] // repeats).to(x.device).repeat_interleave(repeats)[:, None]
    return rows if mask is None else mask & rows


def _row_mask(edit: Edit, batch: int) -> Tensor:
    """[batch] True on the rows of the edit."""
    mask = torch.zeros(batch, dtype=torch.bool)
    for row in edit.rows or ():
        if not 0 <= row < batch:
            raise InputError(f"{edit.described()} names row {row}, but the batch has {batch} rows")
        mask[row] = True
    return mask


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
def edit(
    model: Any,
    edits: Edit | Sequence[Edit],
    *,
    compile_to: str = "auto",
    strict: bool = True,
    this_thread: bool = False,
) -> Iterator[None]:
    """Apply edits to every forward pass inside the block; afterwards the model is bit-identical to before.

    compile_to: "auto" turns constant adds to a sublayer's output into biases where nothing can tell the difference,
    "hook" never does, "bias" insists, also at resid_post, where mlp_out then holds the vector too (HookError where
    the architecture has no such bias). strict: raise HookError after the block for an edit that never applied.
    this_thread: only passes that the calling thread runs are edited, so that several threads can edit one model at
    once; without it a second thread is refused with a HookError.
    Works under generate() with KV cache and beams, autocast, torch.compile, device_map, and with gradients.
    """
    module, edits = unwrap(model), [edits] if isinstance(edits, Edit) else list(edits)
    installed = Installed(model, module, edits, compile_to, get_ident() if this_thread else None, lasting=False)
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

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        edits: list[Edit],
        compile_to: str = "auto",
        thread: int | None = None,
        lasting: bool = True,
    ) -> None:
        if compile_to not in ("auto", "hook", "bias"):
            raise unknown("compile_to", compile_to, ("auto", "hook", "bias"))
        anatomy = resolve(module)
        check(edits, anatomy)
        self.edits, self.fired = edits, set[int]()
        self.tracker = fw.ForwardTracker(module, anatomy, thread)
        self.paces = Paces(list(dict.fromkeys(e.control for e in edits if e.control is not None)))
        self._stack = ExitStack()
        try:
            self._stack.enter_context(holding(module, thread is not None, lasting))
            self._install(model, module, anatomy, compile_to)
        except BaseException:
            self._stack.close()
            raise

    def _install(self, model: Any, module: nn.Module, anatomy: Anatomy, compile_to: str) -> None:
        from .bias import add_biases, constant_add, indistinguishable
        from .compiled import hooks_under_compile

        numbered = list(enumerate(self.edits))
        as_bias: set[int] = set()
        if self.tracker.thread is not None and compile_to == "bias":
            raise HookError("a bias changes the model for every thread; use compile_to='hook' with this_thread=True")
        if compile_to == "auto" and self.tracker.thread is None:
            as_bias = indistinguishable(numbered, module, anatomy)
        elif compile_to == "bias":
            as_bias = {i for i, e in numbered if constant_add(e, module, anatomy)}
        if compile_to == "bias" and len(as_bias) < len(numbered):
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
            self._stack.enter_context(hooks_under_compile(model, module))
            for handle in self.tracker.install():
                self._stack.callback(handle.remove)
            self._follow()
        self._stack.enter_context(add_biases(module, anatomy, [e for i, e in numbered if i in as_bias]))
        self.fired |= as_bias
        for (path, io), items in hooked.items():
            compiled = _Compiled(items, self.tracker, self.fired, self.paces)
            self._stack.callback(fw.hook_point(module.get_submodule(path), io, compiled).remove)
        for control in self.paces.of:  # after the edits, so that they read what the next layer reads
            self._watch(module, anatomy, control)

    def _follow(self) -> None:
        """Tell the controls of every pass, also of those in which nothing is edited."""
        if not self.paces.of:
            return

        def entered(_: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
            given = [v for v in (*args, *(kwargs or {}).values()) if isinstance(v, Tensor)]
            if given and not self.tracker.elsewhere:
                enter(self.paces, self.tracker, given[0].device)

        handle = self.tracker.decoder.register_forward_pre_hook(entered, with_kwargs=True)
        self._stack.callback(handle.remove)

    def _watch(self, module: nn.Module, anatomy: Anatomy, control: Control) -> None:
        """Show a control the activation it steers by."""
        if control.watch is None:
            return
        point = anatomy.point(*control.watch)

        def observe(x: Tensor) -> None:
            if not self.tracker.elsewhere:
                show(self.paces, control, point.read(x))

        self._stack.callback(fw.hook_point(module.get_submodule(point.module), point.io, observe).remove)

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
