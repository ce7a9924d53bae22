"""Tensors out of other people's files, without ever running what is in them."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtefactError, InputError

AGAIN = "ask its author for safetensors, or save it again as torch.save({layer: tensor})"
REBUILDS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict")
MAX_PICKLE = 1 << 20
"""Bytes of the part of a .pt file that describes its tensors; the numbers themselves are stored beside it."""


def read_tensors(path: str | Path) -> Tensor | dict[Any, Tensor]:
    """The tensor or dict of tensors of a .pt, .npy, .npz or .safetensors file, on the CPU.

    Raises InputError for a missing file or another suffix, ArtefactError for a file that holds anything but tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    if path.suffix in (".pt", ".pth", ".bin"):
        found = _read_pt(path)
    elif path.suffix in (".npy", ".npz"):
        found = _read_numpy(path)
    elif path.suffix == ".safetensors":
        found = _read_safetensors(path)
    else:
        raise InputError(f"cannot tell what {path.name} is; it should end in .pt, .npy, .npz or .safetensors")
    values = dict(found) if isinstance(found, Mapping) else {0: found}
    if not values or not all(isinstance(value, Tensor) for value in values.values()):
        raise ArtefactError(f"{path} holds other things than tensors; {AGAIN}")
    return values if isinstance(found, Mapping) else found


def _read_pt(path: Path) -> Any:
    _require_only_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted reader raises many kinds, all of which mean the same here
        raise ArtefactError(f"{path} is damaged or holds more than tensors; {AGAIN}") from error


def _require_only_tensors(path: Path) -> None:
    """Look at the file's instructions, without following them: only those that rebuild tensors may be there."""
    if not zipfile.is_zipfile(path):
        raise ArtefactError(
            f"{path} is a plain pickle, which could run code, or no torch file; it is not opened; {AGAIN}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
            if len(inside) != 1 or inside[0].file_size > MAX_PICKLE:
                raise ArtefactError(f"{path} is not laid out as torch.save does; {AGAIN}")
            operations = list(pickletools.genops(archive.read(inside[0])))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ArtefactError(f"{path} is damaged; {AGAIN}") from error
    for operation, argument, _ in operations:
        named = str(argument) if operation.name == "GLOBAL" else operation.name
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4") or (
            operation.name == "GLOBAL" and not _rebuilds(named)
        ):
            what = named.replace(" ", ".")
            raise ArtefactError(f"{path} asks for {what}, which could run code, so it is not opened; {AGAIN}")


def _rebuilds(named: str) -> bool:
    return named in REBUILDS or (named.startswith("torch ") and named.endswith("Storage"))


def _read_numpy(path: Path) -> Any:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found)
        with found:
            return {key: torch.from_numpy(found[key]) for key in found.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ArtefactError(f"{path} is damaged or holds more than numbers; save plain arrays") from error


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is no readable safetensors file; make or download it again") from error
