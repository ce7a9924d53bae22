"""What a run folder holds, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emocircuits.artefact import read_json, read_jsonl
from emocircuits.data.emotions import EKMAN6
from emocircuits.errors import InputError

Data = Mapping[str, Any]
_NAMES = {"demo": "gemma-3-270m (demo)"}
_CIRCUITS = ("circuits", "curves", "rank_curves", "graphs", "stability", "evaluation", "skipped")
_STAGES = ("quality", "embedding", "tuning", "evaluation", "dose")


@dataclass(frozen=True)
class RunData:
    """The files of a run folder as plain data; a stage that has not run is None."""

    path: Path
    manifest: Data
    quality: Data | None
    embedding: Data | None
    tuning: Data | None
    evaluation: Data | None
    dose: Data | None
    texts: list[dict[str, Any]] | None
    circuits: Data | None = None
    """What the `circuits/` folder holds, by stage; None when it is not there."""

    @property
    def model(self) -> str:
        """The model's name as the settings hold it."""
        settings = self.manifest.get("settings") or {}
        found = (settings.get("demo") or settings).get("model")
        name = found.get("id") or found.get("name") if isinstance(found, Mapping) else found
        return _NAMES.get(str(name), str(name)) if name else "this model"

    @property
    def emotions(self) -> list[str]:
        """The run's emotions, from whichever stage has run."""
        if self.quality:
            return list(self.quality["emotions"])
        if found := (self.circuits or {}).get("circuits"):
            return list(found["emotions"])
        for scores in ((self.evaluation or {}).get("methods") or {}).values():
            if scores.get("by_emotion"):
                return list(scores["by_emotion"])
        found = dict.fromkeys(row["emotion"] for row in self.texts or [] if row.get("emotion"))
        return list(found) or list(EKMAN6)

    @property
    def methods(self) -> Data:
        """evaluation.json's methods, empty before that stage."""
        return (self.evaluation or {}).get("methods") or {}


def read_run(run_path: str | Path) -> RunData:
    """Read what a run folder holds. Raises InputError for a folder that is no run, or a damaged file."""
    path = Path(run_path).expanduser()
    manifest = _read_json(path / "manifest.json")
    if manifest is None:
        raise InputError(f"{path} is not a run folder (no manifest.json); check the path")
    alone = (path / "circuits.json").is_file()  # the circuits folder of a run, opened by itself
    stages = {name: None if alone else _read_json(path / f"{name}.json") for name in _STAGES}
    texts = path / "texts.jsonl"
    folder = path if alone else path / "circuits"
    inside = {name: _read_json(folder / f"{name}.json") for name in _CIRCUITS}
    circuits = inside if any(inside.values()) else None
    return RunData(path, manifest, **stages, texts=read_jsonl(texts) if texts.is_file() else None, circuits=circuits)


def _read_json(path: Path) -> Data | None:
    return read_json(path) if path.is_file() else None
