"""Steering modules: ``with steerer.attach(model): model.generate(...)``."""

from .steerer import Steerer, Term

__all__ = ["Steerer", "Term"]
