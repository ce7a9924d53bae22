"""Loading models, describing their anatomy, and telling them apart; each name is imported on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emocircuits.models.anatomy import Anatomy, register_structure, resolve
    from emocircuits.models.demo_model import demo_path
    from emocircuits.models.fingerprint import check_fits, fingerprint
    from emocircuits.models.load import Loaded, load

__all__ = ["Anatomy", "Loaded", "check_fits", "demo_path", "fingerprint", "load", "register_structure", "resolve"]

_HOMES = {
    "Anatomy": "anatomy",
    "Loaded": "load",
    "check_fits": "fingerprint",
    "demo_path": "demo_model",
    "fingerprint": "fingerprint",
    "load": "load",
    "register_structure": "anatomy",
    "resolve": "anatomy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Keeps `models.load` the function: importing a submodule would bind its name to the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
