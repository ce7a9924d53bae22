"""Tensor shapes in docstrings are no links: `[row][column]` outside code would be read as one."""

from __future__ import annotations

from typing import Any

import griffe


class Shapes(griffe.Extension):
    """Escapes brackets that follow brackets."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Docstrings of every module, class, function and attribute, code in backticks left alone."""
        if obj.docstring:
            parts = obj.docstring.value.split("`")
            obj.docstring.value = "`".join(p if i % 2 else p.replace("][", "]\\[") for i, p in enumerate(parts))
