"""Errors a user can cause, each one sentence that says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class EmocircuitsError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it and exits with code 2."""


class InputError(EmocircuitsError, ValueError):
    """Bad input: a file, a name, a shape or a value that cannot be used."""


class MissingPackageError(EmocircuitsError, ImportError):
    """An optional package is not installed; the message holds the pip command."""


class ArtefactError(InputError):
    """An artefact is corrupted, of the wrong kind, or made for another model."""


class HookError(EmocircuitsError, RuntimeError):
    """A capture or an edit could not do what was asked (never fired, undefined at this architecture, NaN)."""


def unknown(kind: str, value: object, choices: Iterable[object]) -> InputError:
    """The one wording for an unknown name: says which kind, and lists the choices."""
    return InputError(f"unknown {kind} {value!r}; choose from {', '.join(map(str, choices))}")
