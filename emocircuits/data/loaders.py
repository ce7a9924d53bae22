"""Read texts and prompts from CSV, TSV and JSONL files, with errors that name the line."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from emocircuits.errors import InputError, unknown

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")

Row = tuple[int, dict[str, Any]]  # the line a row starts on, counted from 1, and its cells


@dataclass(frozen=True)
class LabelledText:
    """One text with its label (None if the file was read without labels), its line, and its other columns."""

    text: str
    label: str | None
    line: int
    extra: dict[str, Any] = field(default_factory=dict, hash=False)


def load_texts(path: str | Path, text_column: str = "text", label_column: str | None = "label") -> list[LabelledText]:
    """Texts and labels of a .csv, .tsv, .jsonl or .ndjson file, in UTF-8; blank lines are skipped.

    `label_column=None` reads texts alone. Raises InputError, with the line number, for an unknown column
    (lists those there are), an empty text or label, a broken row, or a file without rows.
    """
    texts = []
    for line, row in read_rows(Path(path).expanduser()):
        text = _text_cell(path, line, row, text_column)
        label = None if label_column is None else _label_cell(path, line, row, label_column)
        extra = {name: cell for name, cell in row.items() if name not in (text_column, label_column)}
        texts.append(LabelledText(text, label, line, extra))
    return texts


def load_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows with a "prompt" from a .jsonl, .ndjson, .csv or .tsv file; every other key is kept as it is.

    Raises InputError, with the line number, for a row without a prompt, a broken row, or a file without rows.
    """
    rows = []
    for line, row in read_rows(Path(path).expanduser()):
        _text_cell(path, line, row, "prompt")
        rows.append(row)
    return rows


def _text_cell(path: str | Path, line: int, row: dict[str, Any], column: str) -> str:
    value = _cell(path, line, row, column)
    if not isinstance(value, str):
        raise InputError(f"{path}, line {line}: {column!r} must be text, got {value!r}")
    if not value.strip():
        raise InputError(f"{path}, line {line}: {column!r} is empty; fill it or delete the row")
    return value


def _label_cell(path: str | Path, line: int, row: dict[str, Any], column: str) -> str:
    """Whole numbers are fine as labels; they become text."""
    value = _cell(path, line, row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text_cell(path, line, row, column).strip()


def _cell(path: str | Path, line: int, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise InputError(f"{path}, line {line}: {unknown('column', column, row)}")
    return row[column]


def read_rows(path: Path) -> Iterator[Row]:
    """Every row with its line number. Raises InputError for a file that cannot be read or has no rows."""
    suffix = path.suffix.lower()
    if suffix not in (*_DELIMITERS, *_JSON_LINES):
        raise unknown("file type", path.name, [*_DELIMITERS, *_JSON_LINES])
    # newline="" leaves line breaks inside quoted cells alone, as csv asks for.
    file = StringIO(_read_text(path), newline="")
    rows = _csv_rows(path, file, _DELIMITERS[suffix]) if suffix in _DELIMITERS else _json_rows(path, file)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows; add at least one")
    return chain([first], rows)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); check the path") from error
    try:
        return raw.removeprefix(BOM_UTF8).decode()  # spreadsheets write that byte order mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def _json_rows(path: Path, file: TextIO) -> Iterator[Row]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {line}: each line must be a JSON object, got {type(row).__name__}")
        yield line, row


def _csv_rows(path: Path, file: TextIO, delimiter: str) -> Iterator[Row]:
    header: list[str] | None = None
    for line, cells in _csv_cells(path, file, delimiter):
        if header is None:
            header = _checked_header(path, line, cells)
        elif len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}; "
                "put quotes around text that holds the separator or a line break"
            )
        else:
            yield line, dict(zip(header, cells))


def _csv_cells(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Cells of every row that is not blank, with the line it starts on (a quoted cell may span lines)."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {start}: broken row ({error}); check its quotes") from error


def _checked_header(path: Path, line: int, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path}, line {line}: column {twice[0]!r} appears twice; rename one of them")
    return header
