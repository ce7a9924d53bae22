"""Steering modules: ``with steerer.attach(model): model.generate(...)``."""

from . import migrations  # noqa: F401  (registers how older files are read)
from .steerer import Steerer, Term

__all__ = ["Steerer", "Term"]
