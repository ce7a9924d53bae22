"""emocircuits: find, steer and understand emotion in language models.

Names are imported on first use, so that ``import emocircuits`` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import (
        Ablate,
        Activations,
        Add,
        Apply,
        Blend,
        Clamp,
        Edit,
        Moments,
        Patch,
        Project,
        Scale,
        capture,
        edit,
        record,
    )
    from .activations.store import ActivationStore
    from .directions import DirectionSet, fit
    from .generation import Decoding, generate
    from .models.anatomy import Anatomy, resolve
    from .models.load import Loaded, load
    from .reading import Example, Features, read
    from .steering import Steerer

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(
        ("Ablate", "Activations", "Add", "Apply", "Blend", "Clamp", "Edit", "Moments", "Patch", "Project", "Scale"),
        "activations",
    ),
    **dict.fromkeys(("capture", "edit", "record"), "activations"),
    "ActivationStore": "activations.store",
    **dict.fromkeys(("DirectionSet", "fit"), "directions"),
    **dict.fromkeys(("Decoding", "generate"), "generation"),
    **dict.fromkeys(("Anatomy", "resolve"), "models.anatomy"),
    **dict.fromkeys(("Loaded", "load"), "models.load"),
    **dict.fromkeys(("Example", "Features", "read"), "reading"),
    "Steerer": "steering",
}

__all__ = [
    "Ablate", "ActivationStore", "Activations", "Add", "Anatomy", "Apply", "Blend", "Clamp", "Decoding",
    "DirectionSet", "Edit", "Example", "Features", "Loaded", "Moments", "Patch", "Project", "Scale", "Steerer",
    "capture", "edit", "fit", "generate", "load", "read", "record", "resolve",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
