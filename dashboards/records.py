"""The manifest of a run as rows of text, and its files against their checksums. No Streamlit in here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dashboards.words import num, plain
from emocircuits._figures import number
from emocircuits._report_html import facts

Row = dict[str, str]


def setting_rows(manifest: Mapping[str, Any]) -> list[Row]:
    """Everything that determines the run."""
    return [{"setting": plain(k), "value": plain(v)} for k, v in facts(manifest.get("settings") or {})]


def version_rows(manifest: Mapping[str, Any]) -> list[Row]:
    """The package, Python, and the packages that matter."""
    own = {"emocircuits": manifest.get("package_version"), "python": manifest.get("python")}
    return [{"what": k, "version": str(v)} for k, v in {**own, **(manifest.get("versions") or {})}.items()]


def stage_rows(manifest: Mapping[str, Any]) -> list[Row]:
    """Finished stages with their time and files."""
    return [
        {"stage": name, "seconds": num(s.get("seconds"), ".1f"), "files": ", ".join(map(str, s.get("files") or []))}
        for name, s in (manifest.get("stages") or {}).items()
    ]


def minutes(manifest: Mapping[str, Any]) -> float:
    """Time of all stages together."""
    return sum(number(s.get("seconds")) or 0.0 for s in (manifest.get("stages") or {}).values()) / 60


def files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksum of every file that a stage wrote; those without one are left out."""
    found: dict[str, str] = {}
    for stage in (manifest.get("stages") or {}).values():
        digests = stage.get("sha256")
        found |= {str(k): str(v) for k, v in digests.items()} if isinstance(digests, Mapping) else {}
    return found


def state(folder: Path, name: str, digest: str) -> str:
    """Whether a file is as it was written; files outside the folder are not looked at."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        return "outside the run"
    if not file.is_file():
        return "missing"
    found = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            found.update(block)
    return "as written" if found.hexdigest() == digest else "changed"
