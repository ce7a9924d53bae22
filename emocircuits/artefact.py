"""The one file format of every artefact, and atomic writes for everything else.

An artefact is one `.safetensors` file. Its metadata holds a single key, `emocircuits`: a JSON object with `kind`,
`format_version`, `package_version`, `created`, `sha256` (of the tensors) and the fields of the artefact itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emocircuits.errors import ArtefactError, InputError

SUFFIX = ".safetensors"
METADATA_KEY = "emocircuits"
FORMAT_VERSION = 1

VERSIONS: dict[str, int] = {}
"""Format version of each kind whose content has changed since; FORMAT_VERSION for all others."""

Header = dict[str, Any]
Migration = Callable[[dict[str, Tensor], Header], tuple[dict[str, Tensor], Header]]

# (kind, version) -> the function that turns an artefact of that version into one of version + 1.
MIGRATIONS: dict[tuple[str, int], Migration] = {}


def save(path: str | Path, kind: str, tensors: Mapping[str, Tensor | np.ndarray], header: Mapping[str, Any]) -> Path:
    """Write an artefact atomically and return its path (`.safetensors` is added when missing).

    The fields this module writes itself (`kind`, `created`, ...) win over fields of the same name in `header`.
    Raises InputError when a tensor holds NaN or cannot be stored, the header is not JSON, or the disk is full.
    """
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    ready = _storable(tensors)
    own = {
        "kind": kind,
        "format_version": VERSIONS.get(kind, FORMAT_VERSION),
        "package_version": package_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sha256": _digest(ready),
    }
    text = _to_json({**own, **header, **own}, f"the header of {path.name}")
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave the file readable by its owner only
        save_file(ready, temporary, metadata={METADATA_KEY: text})
        temporary.chmod(mode)
    return path


def load(path: str | Path, kind: str, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], Header]:
    """Read an artefact of the given kind: its tensors on `device`, and its header.

    Raises InputError when there is no such file, and ArtefactError when it is truncated, damaged, of another kind,
    of a format this version cannot read, or holds NaN.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no artefact at {path}; check the path")
    tensors, header = _read(path)
    if header.get("kind") != kind:
        raise ArtefactError(f"{path} holds a {header.get('kind')!r}, not a {kind!r}; load it as what it is")
    if header.get("sha256") != _digest(tensors):
        raise ArtefactError(f"{path} is damaged: its tensors do not match their checksum; make or download it again")
    _refuse_nan(tensors, lambda name: ArtefactError(f"{path} is unusable: tensor {name!r} holds NaN; make it again"))
    tensors, header = _migrate(path, tensors, header)
    return {name: tensor.to(device) for name, tensor in tensors.items()}, header


def read_header(path: str | Path) -> Header:
    """The header of an artefact of any kind, without reading its tensors; raises as `load` does."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no artefact at {path}; check the path")
    return _read(path, with_tensors=False)[1]


def package_version() -> str:
    """The installed version of this package, or "unknown" in a plain checkout."""
    try:
        return metadata.version("emocircuits")
    except metadata.PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------- text, JSON and JSON lines


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write UTF-8 text so that the file is either the old one or the whole new one; raises InputError if it cannot."""
    path = Path(path).expanduser()
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    return path


def write_json_atomic(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically; NaN stays NaN, as Python's json reads it."""
    return write_text_atomic(path, _to_json(value, Path(path).name, indent=2) + "\n")


def write_jsonl_atomic(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line, atomically; raises InputError when a row is not JSON."""
    lines = (_to_json(dict(row), f"row {n} of {Path(path).name}") + "\n" for n, row in enumerate(rows, start=1))
    return write_text_atomic(path, "".join(lines))


def read_json(path: str | Path) -> dict[str, Any]:
    """A file that holds one JSON object; raises InputError for a missing or damaged one."""
    path = Path(path).expanduser()
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and make it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} should hold a JSON object; delete it and make it again")
    return found


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object per line, skipping blank lines; raises InputError that names the file and the line."""
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}; check the path") from error
    lines = enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    rows = [_parse_line(path, number, line) for number, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path} is empty; it should hold one JSON object per line")
    return rows


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not valid JSON ({error}); mend or remove that line") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}; mend that line")
    return row


def _to_json(value: Any, what: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be written as JSON: {error}; use plain Python values") from error


# ---------------------------------------------------------------- atomic writes


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Parent folders are created. Raises InputError, in one sentence, when the file system refuses (disk full, ...).
    """
    path = Path(path).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    with suppress(OSError):  # the folder itself may be missing; the first error says more than this one
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can open a folder (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync a folder; the file itself is already safe
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """What the file system said, in words a user can act on."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return "the disk is full; free some space or choose another folder"
    return (getattr(error, "strerror", None) or str(error)).lower()


# ---------------------------------------------------------------- tensors


def _storable(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors needs them."""
    ready: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        tensor = _as_tensor(name, value).detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in taken else tensor
        taken.add(storage)
    _refuse_nan(ready, lambda name: InputError(f"tensor {name!r} holds NaN; an artefact must not, so drop or mend it"))
    return ready


def _as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(np.shape(value)))
    except TypeError as error:
        raise InputError(f"tensor {name!r} has type {np.asarray(value).dtype}, which cannot be stored") from error


def _refuse_nan(tensors: Mapping[str, Tensor], error: Callable[[str], InputError]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and torch.isnan(tensor).any():
            raise error(name)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes: safetensors itself notices a missing byte but not a changed one."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:  # an empty tensor cannot be viewed as bytes
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(path: Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], Header]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in list(file.keys())} if with_tensors else {}
        header = json.loads(text) if text is not None else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{path} is not a readable artefact: it is truncated, damaged or no safetensors file; "
            "make or download it again"
        ) from error
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is a safetensors file but not an emocircuits artefact; check the path")
    return tensors, header


def _migrate(path: Path, tensors: dict[str, Tensor], header: Header) -> tuple[dict[str, Tensor], Header]:
    """Bring an older artefact to its kind's version, one step at a time."""
    version, newest = header.get("format_version"), VERSIONS.get(header["kind"], FORMAT_VERSION)
    if not isinstance(version, int) or version > newest:
        raise ArtefactError(
            f"{path} has format version {version}, and this package reads up to {newest}; upgrade emocircuits"
        )
    for step in range(version, newest):
        migration = MIGRATIONS.get((header["kind"], step))
        if migration is None:
            raise ArtefactError(
                f"{path} has format version {version}, which this package no longer reads; make it again"
            )
        tensors, header = migration(tensors, header)
        header = {**header, "format_version": step + 1}
    return tensors, header
