"""Steering modules: ``with steerer.attach(model): model.generate(...)``."""

from . import migrations  # noqa: F401  (registers how older files are read)
from .controls import Both, Hold, Ramp, SkipFirst, StepEnds, Tags, Until, Window, step_ends, tags
from .meter import Meter
from .steerer import Steerer
from .term import Term

__all__ = [
    "Both", "Hold", "Meter", "Ramp", "SkipFirst", "Steerer", "StepEnds", "Tags", "Term", "Until", "Window", "step_ends",
    "tags",
]  # fmt: skip
