"""Read (`capture`, `record`) and write (`edit`) the activations of any supported model."""

from .capture import Activations, batches, capture, record
from .edit import edit, on_layers
from .edits import Ablate, Add, Apply, Blend, Clamp, Edit, Patch, Project, Scale
from .moments import Moments
from .sites import SITES, Key, expand_layers, expand_sites

__all__ = [
    "SITES", "Ablate", "Activations", "Add", "Apply", "Blend", "Clamp", "Edit", "Key", "Moments", "Patch", "Project",
    "Scale", "batches", "capture", "edit", "expand_layers", "expand_sites", "on_layers", "record",
]  # fmt: skip
