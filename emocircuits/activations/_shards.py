"""The files of an activation store and the checks on what goes into them; `store` is the public side."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emocircuits.activations.sites import Key
from emocircuits.artefact import replacing
from emocircuits.errors import ArtefactError, HookError, InputError, unknown

FORMAT, VERSION = "emocircuits.activations", 1
INDEX = "index.json"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# ------------------------------------------------------------------------------------------------ the files


def count(index: dict[str, Any]) -> int:
    """Rows in all shards of an index."""
    return sum(shard["rows"] for shard in index["shards"])


def read_index(folder: Path) -> dict[str, Any]:
    """The index, after checking that every shard it names is there and whole."""
    file = folder / INDEX
    if not file.is_file():
        raise ArtefactError(f"{folder} holds no activation store (no {INDEX}); check the path")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        kind = index["format"], index["version"]
        shards = [(shard["name"], shard["rows"], shard["bytes"]) for shard in index["shards"]]
        complete = index["dtype"] in DTYPES and all(map(parse_name, index["keys"])) and "header" in index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{file} is damaged ({error!r}); make the store again") from error
    if kind != (FORMAT, VERSION) or not complete:
        raise ArtefactError(f"{file} is not an index of {FORMAT} version {VERSION}; use the matching release")
    for name, _, size in shards:
        shard = folder / f"{name}.safetensors"
        if not shard.is_file() or shard.stat().st_size != size:
            raise ArtefactError(f"{shard} is missing or cut short; copy or make the store again")
    return index


def new_folder(folder: Path) -> Path:
    """Make an empty folder. Raises InputError when it is in use."""
    if (folder / INDEX).exists():
        raise InputError(f"{folder} holds a store already; pass resume=True to go on, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(not file.name.endswith(".tmp") for file in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot make the folder {folder} ({error.strerror}); choose another") from error
    if taken:
        raise InputError(f"{folder} holds other files; choose an empty folder")
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Put contiguous CPU tensors into one safetensors file, atomically; returns its size in bytes.

    Laid out by hand, because the library's writer holds a second copy of every tensor.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        dtype = DTYPES[dtype_name(tensor.dtype)]
        entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().data)
        return file.tell()


# ----------------------------------------------------------------------------------------- names and checks


def name_of(key: Key) -> str:
    """The tensor name of a key, "site.layer"."""
    return f"{key[0]}.{key[1]}"


def names_of(keys: Iterable[Key]) -> str:
    """The tensor names of keys, for messages."""
    return ", ".join(map(name_of, keys))


def parse_name(name: str) -> Key:
    """The key of a tensor name. Raises ValueError for another kind of name."""
    site, _, layer = name.rpartition(".")
    return site, int(layer)


def widths_of(sites: Mapping[Key, int] | Iterable[Key]) -> dict[str, int | None]:
    """Widths by tensor name, None where not given. Raises InputError for other than (site, layer) keys."""
    widths: dict[Key, int | None] = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    for key, width in widths.items():
        if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int)):
            raise InputError(f"sites must be (site, layer) pairs such as ('resid_post', 3), got {key!r}")
        if width is not None and width < 1:
            raise InputError(f"the width of {name_of(key)} must be at least 1, got {width}")
    if not widths:
        raise InputError("sites is empty; name at least one (site, layer) pair to store")
    return {name_of(key): width for key, width in widths.items()}


def dtype_name(dtype: str | torch.dtype) -> str:
    """The plain name of a storable dtype. Raises InputError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name


def check_agreement(
    folder: Path, index: dict[str, Any], widths: dict[str, int | None] | None, dtype: str | None, header: Any
) -> None:
    """Refuse to go on with settings other than the store's own; adopt widths that it did not know yet."""
    stored = index["keys"]
    if widths is not None and set(widths) != set(stored):
        raise InputError(f"{folder} stores the keys {', '.join(stored)}, not {', '.join(widths)}")
    for key, width in (widths or {}).items():
        if None not in (width, stored[key]) and width != stored[key]:
            raise InputError(f"{folder} stores {key} with width {stored[key]}, not {width}")
        stored[key] = stored[key] or width
    if dtype not in (None, index["dtype"]):
        raise InputError(f"{folder} stores {index['dtype']}, not {dtype}; resume with dtype={index['dtype']!r}")
    if header is not None and header != index["header"]:
        raise InputError(f"{folder} was made with another header, {index['header']}; choose another folder")


def checked_finite(key: Key, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows as they will be stored. Raises HookError unless every number is finite there."""
    stored = tensor.to(device="cpu", dtype=dtype)
    finite = torch.isfinite(stored)
    if finite.all():
        return stored
    where = f"activations at {key[0]} layer {key[1]}"
    if torch.isfinite(tensor).all():
        raise HookError(f"{where} overflow {dtype_name(dtype)}; store them as bfloat16 or float32")
    rows = int((~finite).any(dim=1).sum())
    raise HookError(f"{where} are NaN or infinite in {rows} of {len(tensor)} rows; run the model in float32")


def checked_records(meta: Sequence[Mapping[str, Any]] | None, n: int) -> list[str]:
    """Every row's record as one line of JSON. Raises InputError unless there is one dict per row."""
    if meta is None:
        return ["{}"] * n
    if len(meta) != n or not all(isinstance(record, Mapping) for record in meta):
        raise InputError(f"meta must be one dict for each of the {n} rows, got {len(meta)}")
    return [to_json("meta", record) for record in meta]


def to_json(what: str, value: Mapping[str, Any]) -> str:
    """Encode a dict. Raises InputError for values that JSON does not have."""
    try:
        return json.dumps(dict(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must hold plain JSON values only ({error})") from error
