"""Rollouts on disk: one JSON line each, appended as they come, safe against kills and against two processes at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InputError
from .traces import Rollout, Rollouts

KIND, VERSION = "rollouts", 1
LOCK_SECONDS = 60.0
Key = tuple[int, int]
DEFAULTS = {f.name: None if f.default is MISSING else f.default for f in fields(Rollout)}


class RolloutStore:
    """An append-only file of rollouts, one per (boundary, index); only an error may be followed by a better try.

    Its first line says what was sampled from, and by whom. A last line that a kill cut short is dropped, and its
    rollout is missing again. Any other damage is reported with its line. Processes may share a store.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads nothing yet; the file need not exist."""
        self.path = Path(path).expanduser()
        self._lock = FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS)
        self._held: dict[Key, Rollout] = {}
        self._header: dict[str, Any] | None = None
        self._read_bytes = self._read_lines = 0

    def claim(self, made_from: Mapping[str, Any]) -> None:
        """Start the file, or check that it was made from the same; plain JSON values by name.

        Raises InputError in one sentence that names what differs, or the line that is damaged.
        """
        wanted = json.loads(json.dumps(made_from))
        with self._appending() as append:
            if self._header is None:
                append({"kind": KIND, "version": VERSION, "made_from": wanted})
            found = (self._header or {})["made_from"]
        differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        if differing:
            raise InputError(
                f"{self.path} holds rollouts made with another {' and another '.join(differing)}; choose another path"
            )

    def add(self, rollouts: Iterable[Rollout]) -> int:
        """Append those that are not there yet, and make sure they are on the disk; how many that were.

        Raises InputError when the store was not claimed, is damaged, or cannot be written.
        """
        with self._appending() as append:
            if self._header is None:
                raise InputError(f"{self.path} has no header yet; call claim() first")
            fresh: dict[Key, Rollout] = {}
            for r in rollouts:
                key = (r.boundary, r.index)
                known = fresh.get(key) or self._held.get(key)
                if known is None or (known.finish == "error") > (r.finish == "error"):
                    fresh[key] = r
            append(*map(_plain, fresh.values()))
        return len(fresh)

    def missing(self, wanted: Iterable[Key]) -> list[Key]:
        """Those (boundary, index) that are not there, or only as an error, in the order given."""
        self._catch_up()
        return [key for key in wanted if self._is_missing(key)]

    def rollouts(self, n: int) -> Rollouts:
        """All that is there now, by boundary and index; `n` is the trace's number of steps."""
        self._catch_up()
        return Rollouts(n, tuple(self._held[key] for key in sorted(self._held)))

    def _is_missing(self, key: Key) -> bool:
        return key not in self._held or self._held[key].finish == "error"

    @contextmanager
    def _appending(self) -> Iterator[Any]:
        """Alone with the file, having read all of it: a function that appends JSON lines and reads them back."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, open(self.path, "ab") as file:
                self._catch_up()
                file.truncate(self._read_bytes)  # what is left behind is half a line of a process that is gone

                def append(*rows: Mapping[str, Any]) -> None:
                    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    file.write("".join(lines).encode("utf-8", "surrogatepass"))
                    file.flush()
                    os.fsync(file.fileno())
                    self._catch_up()

                yield append
        except Timeout as error:
            raise InputError(f"another process has held {self.path} for {LOCK_SECONDS:g} s; end it first") from error
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {(error.strerror or str(error)).lower()}") from error

    def _catch_up(self) -> None:
        """Read the whole lines that were added since the last time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._read_bytes:
                raise InputError(f"{self.path} was cut short or replaced while in use; open it again")
            file.seek(self._read_bytes)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            self._take(line, self._read_lines + 1)
            self._read_lines += 1
            self._read_bytes += len(line) + 1

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            if number == 1:
                if row["kind"] != KIND or row["version"] > VERSION:
                    raise ValueError("not a header that this version reads")
                row["made_from"].items()
                self._header = row
                return
            rollout = Rollout(**row)
            key = (rollout.boundary, rollout.index)
            if not (type(key[0]) is type(key[1]) is int and isinstance(rollout.text, str)):
                raise ValueError("boundary and index must be whole numbers, and text a text")
            if not self._is_missing(key):
                raise ValueError(f"rollout {key[1]} at boundary {key[0]} is there twice")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = "this is no rollout store" if number == 1 else "mend or remove that line"
            raise InputError(f"{self.path}, line {number}: {error}; {what}") from error
        self._held[key] = rollout


def _plain(rollout: Rollout) -> dict[str, Any]:
    """The fields that say something."""
    values = {name: getattr(rollout, name) for name in DEFAULTS}
    if rollout.probabilities is not None:
        values["probabilities"] = dict(rollout.probabilities)
    needed = ("boundary", "index", "text")
    return {name: value for name, value in values.items() if name in needed or value != DEFAULTS[name]}
