"""Constant adds as biases: nothing runs at inference that the layer would not run anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.anatomy import Anatomy

if TYPE_CHECKING:
    from .edits import Edit


def constant_add(edit: Edit, model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether this edit is the same vector at every position of every row, right after a plain Linear."""
    from .edits import Add

    path = anatomy.linear_out.get((edit.site, edit.layer % anatomy.n_layers))
    if path is None or not isinstance(edit, Add) or edit.positions != "all":
        return False
    linear = model.get_submodule(path)
    plain = type(linear) is nn.Linear and not hasattr(linear, "_hf_hook") and linear.weight.is_floating_point()
    return plain and edit.rows is None and edit.units is None and edit.delta().dim() == 1


@contextmanager
def add_biases(model: nn.Module, anatomy: Anatomy, edits: Sequence[Edit]) -> Iterator[None]:
    """Add the edits' vectors to the biases of their Linears inside the block; the original objects come back after."""
    originals: dict[str, nn.Parameter | None] = {}
    try:
        for edit in edits:
            path = anatomy.linear_out[edit.site, edit.layer % anatomy.n_layers]
            linear = model.get_submodule(path)
            bias: Tensor | None = linear.bias  # type: ignore[assignment]
            originals.setdefault(path, bias)  # type: ignore[arg-type]
            delta = edit.delta().to(linear.weight.device, torch.float32)  # type: ignore[attr-defined, union-attr]
            total = delta if bias is None else bias.detach().float() + delta
            new = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)  # type: ignore[union-attr, arg-type]
            linear._parameters["bias"] = new
        yield
    finally:
        for path, bias in originals.items():
            model.get_submodule(path)._parameters["bias"] = bias
