"""Activations on disk: streamed in, resumable after a crash, and read back without loading them.

A store is a folder: `index.json`, and for every committed shard one `.safetensors` file (a tensor
[rows, width] per site and layer, named "site.layer") beside one `.jsonl` file with a record per row. A shard
counts only once the index names it, and the index is replaced only after the shard is safely on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emocircuits.activations._shards import (
    FORMAT,
    INDEX,
    VERSION,
    check_agreement,
    checked_finite,
    checked_records,
    count,
    dtype_name,
    name_of,
    names_of,
    new_folder,
    parse_name,
    read_index,
    to_json,
    widths_of,
    write_safetensors,
)
from emocircuits.activations.sites import Key
from emocircuits.artefact import read_jsonl, write_json_atomic, write_text_atomic
from emocircuits.errors import ArtefactError, InputError, unknown

_OPEN_SHARDS = 64  # memory maps kept open at once


@dataclass
class _Buffer:
    """Rows accepted but not committed: the first of them is row `start` of the store."""

    start: int
    tensors: dict[Key, Tensor]
    records: list[str] = field(default_factory=list)


class ActivationStore:
    """Rows of activations for a fixed set of (site, layer) keys, in a folder on disk.

    `create` writes, `open` reads. While writing, only committed rows are visible: `len(store)`, `store.meta`
    and `len(store[key])` always agree. At most one shard (`shard_rows` rows of every key) is held in memory.
    """

    def __init__(self, path: Path, index: dict[str, Any], shard_rows: int, writable: bool) -> None:
        """For `create` and `open` only."""
        self.path = path
        self._index = index
        self._shard_rows = shard_rows
        self._writable = writable
        self._buffer = _Buffer(len(self), {})
        self._meta: list[dict[str, Any]] = []
        self._maps: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------ opening, closing

    @classmethod
    def create(
        cls,
        path: str | Path,
        sites: Mapping[Key, int] | Iterable[Key] | None = None,
        dtype: str | torch.dtype | None = None,
        shard_rows: int = 4096,
        header: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> ActivationStore:
        """Open a folder for writing; use it as a context manager, so that the last rows are flushed.

        `sites` gives the keys, with their widths or without (then the first append decides); `dtype` is
        float32 (default), float16 or bfloat16; `header` is a JSON dict that says where the rows come from.
        With `resume` an existing store is continued (skip the first `n_committed` rows): settings left out
        are the store's own, settings given must agree. If a write fails later, rows not yet committed are
        lost. Raises InputError for a folder already in use or settings that disagree.
        """
        folder = Path(path).expanduser()
        if shard_rows < 1:
            raise InputError(f"shard_rows must be at least 1, got {shard_rows}")
        widths = None if sites is None else widths_of(sites)
        wanted_dtype = None if dtype is None else dtype_name(dtype)
        header_json = None if header is None else json.loads(to_json("the header", header))
        if resume and (folder / INDEX).exists():
            index = read_index(folder)
            check_agreement(folder, index, widths, wanted_dtype, header_json)
            store = cls(folder, index, shard_rows, writable=True)
            store._remove_leftovers()
            return store
        if widths is None:
            raise InputError(f"{folder} holds no store yet, so create needs the sites to store")
        index = {"format": FORMAT, "version": VERSION, "dtype": wanted_dtype or "float32"}
        index |= {"keys": widths, "header": header_json or {}, "shards": []}
        store = cls(new_folder(folder), index, shard_rows, writable=True)
        with store._writing():
            write_json_atomic(store.path / INDEX, index)
        return store

    @classmethod
    def open(cls, path: str | Path) -> ActivationStore:
        """Open a store for reading. Raises ArtefactError when the index or a shard is missing or damaged."""
        folder = Path(path).expanduser()
        return cls(folder, read_index(folder), 0, writable=False)

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        # Rows in the buffer are checked and whole whatever went wrong after them, so they are kept.
        self.close()

    def close(self) -> None:
        """Flush buffered rows as a short last shard and release the files; closing twice is harmless."""
        try:
            if self._writable:
                self._commit()
        finally:
            self._writable = False
            self._buffer = _Buffer(len(self), {})
            self._maps = {}

    # --------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return count(self._index)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, rows={len(self)}, keys=[{names_of(self.keys)}])"

    @property
    def n_committed(self) -> int:
        """Rows safely on disk: how many a resumed run may skip."""
        return len(self)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The (site, layer) keys, in the order they were declared."""
        return tuple(parse_name(name) for name in self._index["keys"])

    @property
    def dtype(self) -> torch.dtype:
        """The type that rows are stored in."""
        return getattr(torch, self._index["dtype"])

    @property
    def header(self) -> dict[str, Any]:
        """What the maker of the store wrote about it."""
        return dict(self._index["header"])

    @property
    def meta(self) -> list[dict[str, Any]]:
        """One record per committed row, in order."""
        if len(self._meta) != len(self):
            self._meta = [record for shard in self._index["shards"] for record in self._read_records(shard)]
        return self._meta

    def width(self, key: Key) -> int:
        """Numbers per row of a key. Raises InputError for a key that is not stored or not yet known."""
        if key not in self.keys:
            raise unknown("activation key", key, self.keys)
        width = self._index["keys"][name_of(key)]
        if width is None:
            raise InputError(f"the width of {name_of(key)} is not known before its first rows are committed")
        return width

    def __getitem__(self, key: Key) -> ActivationArray:
        """A lazy [rows, width] view of one key. Raises InputError for a key that is not stored."""
        return ActivationArray(self, key, self.width(key))

    def iter_batches(self, key: Key, batch_size: int, shuffle: bool = False, seed: int = 0) -> Iterator[Tensor]:
        """Batches [batch_size, width] of every committed row once (the last may be short).

        `shuffle` draws one order of all rows from `seed`; pass another seed for another epoch. Raises
        InputError for an unknown key or a batch size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        array = self[key]
        order = np.random.default_rng(seed).permutation(len(array)) if shuffle else None

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(array), batch_size):
                rows = slice(start, start + batch_size)
                yield array[rows] if order is None else array[order[rows]]

        return batches()

    def _read_rows(self, key: Key, rows: np.ndarray) -> Tensor:
        """Rows [m, width] in the order asked for, opening only the shards that hold them."""
        out = torch.empty(len(rows), self.width(key), dtype=self.dtype)
        ends = np.cumsum([shard["rows"] for shard in self._index["shards"]])
        owner = np.searchsorted(ends, rows, side="right")
        for number in np.unique(owner):
            shard = self._index["shards"][number]
            where = np.flatnonzero(owner == number)
            local = rows[where] - (ends[number] - shard["rows"])
            low, high = int(local.min()), int(local.max()) + 1
            # The slice is a view of the memory map: indexing it reads only the pages it needs.
            block = self._map(shard).get_slice(name_of(key))[low:high]
            out[torch.from_numpy(where)] = block[torch.from_numpy(local - low)]
        return out

    def _map(self, shard: dict[str, Any]) -> Any:
        name = shard["name"]
        if name not in self._maps:
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            try:
                self._maps[name] = safe_open(self.path / f"{name}.safetensors", framework="pt")
            except (OSError, SafetensorError) as error:
                raise ArtefactError(f"cannot read shard {name} of {self.path} ({error}); make it again") from error
        return self._maps[name]

    def _read_records(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        file = self.path / f"{shard['name']}.jsonl"
        records = read_jsonl(file)
        if len(records) != shard["rows"]:
            raise ArtefactError(f"{file} holds {len(records)} records for {shard['rows']} rows; make it again")
        return records

    # --------------------------------------------------------------------------------------------- writing

    def append(self, tensors: Mapping[Key, Tensor], meta: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add n rows: a tensor [n, width] for every key, on any device, and a JSON record per row.

        Checks everything before it keeps anything. Raises InputError for keys, shapes or records that do not
        fit, or when the disk is full; HookError for NaN or infinite activations.
        """
        if not self._writable:
            raise InputError(f"{self.path} is not open for writing; use ActivationStore.create(..., resume=True)")
        rows = self._checked_rows(tensors)
        n = len(next(iter(rows.values())))
        records = checked_records(meta, n)
        self._prepare_buffers(rows)
        start = 0
        while start < n:
            buffer = self._buffer
            fill = len(buffer.records)
            take = min(n - start, self._shard_rows - fill)
            for key, tensor in rows.items():
                buffer.tensors[key][fill : fill + take] = tensor[start : start + take]
            # Last, so that an interrupted copy leaves no half row behind.
            buffer.records.extend(records[start : start + take])
            start += take
            if len(buffer.records) == self._shard_rows:
                self._commit()

    def _checked_rows(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        if set(tensors) != set(self.keys):
            raise InputError(f"append needs exactly the keys {names_of(self.keys)}, got {names_of(tensors)}")
        rows: dict[Key, Tensor] = {}
        for key in self.keys:
            tensor, width = tensors[key], self._known_width(key)
            if tensor.ndim != 2 or not tensor.is_floating_point() or width not in (None, tensor.shape[1]):
                wanted = f"[n, {'width' if width is None else width}]"
                raise InputError(f"{name_of(key)} must be floats {wanted}, got {tensor.dtype} {list(tensor.shape)}")
            rows[key] = checked_finite(key, tensor.detach(), self.dtype)
        counts = {len(tensor) for tensor in rows.values()}
        if len(counts) > 1:
            raise InputError(f"every key must have the same number of rows, got {sorted(counts)}")
        return rows

    def _known_width(self, key: Key) -> int | None:
        tensors = self._buffer.tensors
        return tensors[key].shape[1] if key in tensors else self._index["keys"][name_of(key)]

    def _prepare_buffers(self, rows: Mapping[Key, Tensor]) -> None:
        for key, tensor in rows.items():
            if key not in self._buffer.tensors:
                shape = (self._shard_rows, tensor.shape[1])
                self._buffer.tensors[key] = torch.empty(shape, dtype=self.dtype)

    def _commit(self) -> None:
        """Write the buffered rows as the next shard, then the index that names it."""
        if not self._buffer.records:
            return
        index = read_index(self.path)
        # Further than the buffer: an interrupt fell between replacing the index and emptying the buffer.
        if count(index) == self._buffer.start:
            with self._writing():
                index = self._write_shard(index)
        self._index = index
        self._buffer = _Buffer(count(index), self._buffer.tensors)

    def _write_shard(self, index: dict[str, Any]) -> dict[str, Any]:
        name, records = f"shard-{len(index['shards']):05d}", self._buffer.records
        tensors = {name_of(key): tensor[: len(records)] for key, tensor in self._buffer.tensors.items()}
        write_text_atomic(self.path / f"{name}.jsonl", "".join(f"{record}\n" for record in records))
        size = write_safetensors(self.path / f"{name}.safetensors", tensors)
        shard = {"name": name, "rows": len(records), "bytes": size}
        widths = {key: tensors[key].shape[1] for key in index["keys"]}
        index = index | {"keys": widths, "shards": [*index["shards"], shard]}
        write_json_atomic(self.path / INDEX, index)
        return index

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A failed write ends the writing, with the index as it was."""
        try:
            yield
        except InputError as error:
            self._writable = False
            safe = f"the {len(self)} rows committed so far are safe, go on with resume=True"
            raise InputError(f"{error}; {safe}") from error

    def _remove_leftovers(self) -> None:
        """Delete what a killed run left: temporary files, and shards that the index does not name."""
        named = {shard["name"] for shard in self._index["shards"]}
        for file in self.path.iterdir():
            half_written = file.name.endswith(".tmp")
            unnamed = file.name.startswith("shard-") and file.stem not in named
            if half_written or unnamed:
                file.unlink()


class ActivationArray:
    """A lazy [rows, width] view of one key; an int, slice, list, array or mask reads only those rows."""

    def __init__(self, store: ActivationStore, key: Key, width: int) -> None:
        self._store, self.key, self.width = store, key, width

    def __len__(self) -> int:
        return len(self._store)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        return len(self), self.width

    @property
    def dtype(self) -> torch.dtype:
        """The type that rows are stored in."""
        return self._store.dtype

    def __getitem__(self, rows: Any) -> Tensor:
        """Rows as a new tensor: [width] for an int, else [m, width] in the order asked for.

        Raises IndexError out of range, InputError for an index that names no rows.
        """
        n = len(self)
        if isinstance(rows, slice):
            return self._store._read_rows(self.key, np.arange(*rows.indices(n)))
        wanted = np.asarray(rows)
        if wanted.dtype == bool and wanted.shape == (n,):
            wanted = np.flatnonzero(wanted)
        elif wanted.size == 0:
            wanted = wanted.astype(np.intp)
        if wanted.ndim > 1 or wanted.dtype.kind not in "iu":
            raise InputError(f"index activations by row numbers, a slice or a mask of {n} rows, got {rows!r}")
        wanted = np.where(wanted < 0, wanted + n, wanted)
        if ((wanted < 0) | (wanted >= n)).any():
            raise IndexError(f"row {rows!r} is out of range for {n} rows")
        found = self._store._read_rows(self.key, np.atleast_1d(wanted))
        return found[0] if wanted.ndim == 0 else found

    def __repr__(self) -> str:
        return f"ActivationArray({name_of(self.key)}, shape={list(self.shape)}, dtype={self.dtype})"
