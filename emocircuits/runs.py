"""Run folders: one folder per experiment, a manifest that reproduces it, and stages that are not done twice."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import artefact
from .errors import InputError

T = TypeVar("T")
MANIFEST = "manifest.json"


class Run:
    """A run folder. `settings` is all that determines its results; another value means another run."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or create; raises InputError when the folder holds a run with other settings, or something else."""
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.stages: dict[str, dict[str, Any]] = {}
        self._inner = 0.0  # seconds of the stages that were made inside the one that is being made
        manifest = self.path / MANIFEST
        if manifest.exists():
            self._reopen(manifest)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(f"{self.path} exists but is not a run folder (no {MANIFEST}); choose another --out")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()

    def _reopen(self, manifest: Path) -> None:
        try:
            found = json.loads(manifest.read_text())
            old, self.stages = found["settings"], found["stages"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest} is damaged; delete the folder or choose another --out") from error
        if old != self.settings:
            different = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
            raise InputError(
                f"{self.path} holds a run with other settings ({', '.join(different)}); choose another --out"
            )

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run, whatever its settings; raises InputError when there is none."""
        manifest = Path(path) / MANIFEST
        if not manifest.exists():
            raise InputError(f"{path} is no run folder (no {MANIFEST}); make one with `emocircuits demo --out {path}`")
        return cls(path, json.loads(manifest.read_text()).get("settings", {}))

    def file(self, name: str) -> Path:
        """Path of a file inside the run."""
        return self.path / name

    def done(self, stage: str) -> bool:
        """Whether a stage finished and its files are all there with the sizes they had."""
        record = self.stages.get(stage)
        if record is None:
            return False
        return all(self.file(n).exists() and self.file(n).stat().st_size == size for n, size in record["files"].items())

    def stage(self, name: str, files: list[str], make: Callable[[], None], read: Callable[[], T]) -> T:
        """Run `make` unless the stage is done, then `read` its result from the files (the one way results flow).

        The seconds of a stage are its own: those of stages that it had to make first are theirs.
        """
        if not self.done(name):
            seconds = self._timed(make)
            missing = [f for f in files if not self.file(f).exists()]
            if missing:
                raise InputError(f"stage {name!r} did not write {', '.join(missing)}")
            self.stages[name] = {
                "files": {f: self.file(f).stat().st_size for f in files},
                "sha256": {f: _sha256(self.file(f)) for f in files},
                "seconds": round(seconds, 1),
            }
            self._write()
        return read()

    def _timed(self, make: Callable[[], None]) -> float:
        """Seconds that `make` took without the stages made inside it."""
        outer, self._inner, start = self._inner, 0.0, time.monotonic()
        try:
            make()
            return time.monotonic() - start - self._inner
        finally:
            self._inner = outer + time.monotonic() - start

    def json_stage(self, name: str, make: Callable[[], Any]) -> Any:
        """A stage whose result is one JSON file called `name`.json."""
        file = f"{name}.json"
        return self.stage(
            name,
            [file],
            lambda: artefact.write_json_atomic(self.file(file), make()) and None,
            lambda: json.loads(self.file(file).read_text()),
        )

    def _write(self) -> None:
        value = {
            "kind": "run",
            "package_version": artefact.package_version(),
            "python": platform.python_version(),
            "versions": _versions(),
            "settings": self.settings,
            "stages": self.stages,
        }
        artefact.write_json_atomic(self.path / MANIFEST, value)


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torch", "transformers", "numpy", "scikit-learn", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
