"""Constant adds as biases: nothing runs at inference that the layer would not run anyway."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.anatomy import Anatomy, is_quantised

if TYPE_CHECKING:
    from .edits import Edit


BEFORE = ("z", "mlp_post")
"""Sites whose only reader is a Linear: a constant there is W times that constant behind it."""


def _linear(edit: Edit, anatomy: Anatomy) -> str | None:
    """Path of the Linear whose bias can hold this edit."""
    key = (edit.site, edit.layer % anatomy.n_layers)
    return anatomy.point(*key).module if edit.site in BEFORE else anatomy.linear_out.get(key)


def constant_add(edit: Edit, model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether this edit is the same vector at every position of every row, right before or after a plain Linear."""
    from .edits import Add

    path = _linear(edit, anatomy)
    if path is None or not isinstance(edit, Add) or edit.positions != "all" or edit.control is not None:
        return False
    linear = model.get_submodule(path)
    plain = type(linear) is nn.Linear and not hasattr(linear, "_hf_hook") and not is_quantised(linear.weight)
    if not plain or edit.rows is not None or edit.units is not None:
        return False
    delta = edit.delta()
    return delta.dim() == (2 if edit.site == "z" else 1) and not delta.requires_grad


def indistinguishable(numbered: Sequence[tuple[int, Edit]], model: nn.Module, anatomy: Anatomy) -> set[int]:
    """Numbers of the constant adds that are the same as a hook, whatever else is attached, before or after.

    Not those at resid_post: their bias also shows in mlp_out, where another edit may scale it away. Not those at z and
    mlp_post: reading these sites would no longer show them. Not those that would overtake an earlier edit of the
    same output.
    """
    found: set[int] = set()
    held = {key for key in anatomy.linear_out if model.get_submodule(anatomy.point(*key).module)._forward_hooks}
    for number, edit in numbered:
        key = (edit.site, edit.layer % anatomy.n_layers)
        if edit.site not in ("resid_post", *BEFORE) and key not in held and constant_add(edit, model, anatomy):
            found.add(number)
        else:
            held.add(key)
    return found


@dataclass
class _Biased:
    """A Linear's own bias object and the vectors added to it, in order."""

    original: nn.Parameter | None
    deltas: list[Tensor] = field(default_factory=list)

    def put(self, linear: nn.Linear) -> None:
        """Give the Linear its original bias plus all vectors, or the original object itself when there are none."""
        bias = self.original
        if self.deltas:
            base = [] if bias is None else [bias.detach().float()]
            total = torch.stack([*base, *self.deltas]).sum(0).to(linear.weight.dtype)
            bias = nn.Parameter(total, requires_grad=False)
        linear._parameters["bias"] = bias


_BIASED: weakref.WeakKeyDictionary[nn.Module, _Biased] = weakref.WeakKeyDictionary()


def is_biased(module: nn.Module) -> bool:
    """Whether an attached edit sits in this module's bias right now."""
    return module in _BIASED


@contextmanager
def add_biases(model: nn.Module, anatomy: Anatomy, edits: Sequence[Edit]) -> Iterator[None]:
    """Add the edits' vectors to the biases of their Linears inside the block.

    Blocks may end in any order; when the last one has, the original bias objects are back.
    """
    added: list[tuple[nn.Linear, Tensor]] = []
    try:
        for edit in edits:
            linear = model.get_submodule(_linear(edit, anatomy) or "")
            assert isinstance(linear, nn.Linear)
            delta = edit.delta().detach().to(linear.weight.device, torch.float32)  # type: ignore[attr-defined]
            delta = linear.weight.detach().float() @ delta.flatten() if edit.site in BEFORE else delta
            state = _BIASED.setdefault(linear, _Biased(linear._parameters["bias"]))  # type: ignore[arg-type]
            state.deltas.append(delta)
            added.append((linear, delta))
            state.put(linear)
        yield
    finally:
        for linear, delta in added:
            state = _BIASED[linear]
            state.deltas = [d for d in state.deltas if d is not delta]
            state.put(linear)
            if not state.deltas:
                del _BIASED[linear]
