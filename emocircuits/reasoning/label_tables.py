"""Labels as tables to edit by hand, how far two labellings agree, and mean values by category."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from ..evaluation.statistics import Interval, clustered_bootstrap
from .taxonomies import Taxonomy
from .traces import Trace

_COLUMNS = ("step", "label", "depends_on", "text")


def to_table(trace: Trace, delimiter: str = "\t") -> str:
    """The trace as a table to edit in any editor or spreadsheet: step, label, depends_on ("0 3"), text."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow(_COLUMNS)
    labels, links = trace.labels or (None,) * len(trace), trace.depends_on or ((),) * len(trace)
    for i, (label, sources, text) in enumerate(zip(labels, links, trace.steps.texts)):
        writer.writerow([i, label or "", " ".join(map(str, sources)), _one_line(text)])
    return out.getvalue()


def from_table(trace: Trace, table: str, taxonomy: Taxonomy | None = None) -> Trace:
    """The trace with the labels and dependencies of an edited table; columns and rows may come in any order.

    An empty label is None. With a taxonomy, labels must be its names or short forms. Raises InputError that names the
    row (the header is row 1) for a step that is unknown, missing or given twice, a text that is not the step's, an
    unknown label, or a dependency that is not an earlier step.
    """
    labels: dict[int, str | None] = {}
    links: dict[int, tuple[int, ...]] = {}
    for where, row in _rows(table):
        step = whole(row["step"])
        if step is None or step >= len(trace):
            raise InputError(f"{where}: step {row['step']!r} is not one of the trace's 0..{len(trace) - 1}")
        if step in labels:
            raise InputError(f"{where}: step {step} was already given; keep one row for each step")
        if "text" in row and _unmarked(row["text"]) != _unmarked(trace.steps.texts[step]):
            raise InputError(f"{where}: the text is not that of step {step}; is this the table of another trace?")
        labels[step] = _label(row["label"].strip(), taxonomy, where)
        links[step] = _sources(row.get("depends_on", ""), step, where)
    if missing := sorted(set(range(len(trace))) - set(labels)):
        raise InputError(f"the table has no row for step {missing[0]}; keep one row for each step")
    named, sources = (tuple(found[i] for i in range(len(trace))) for found in (labels, links))
    return replace(
        trace,
        labels=named if any(named) or trace.labels is not None else None,
        depends_on=sources if any(sources) or trace.depends_on is not None else None,
    )


def _rows(table: str) -> list[tuple[str, dict[str, str]]]:
    """Every row by column name, with words that say where it stands."""
    head = table.lstrip("\ufeff").split("\n", 1)[0]
    delimiter = next((mark for mark in "\t;" if mark in head), ",")
    try:
        cells = [row for row in csv.reader(io.StringIO(table.lstrip("\ufeff"), newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise InputError(f"the table is broken ({error}); check its quotes") from error
    names = [name.strip() for name in cells[0]] if cells else []
    if not {"step", "label"} <= set(names):
        raise InputError(f"row 1: the table needs the columns step and label, and has {', '.join(names) or 'none'}")
    rows = []
    for number, row in enumerate(cells[1:], start=2):
        if len(row) != len(names):
            raise InputError(f"row {number}: {len(row)} cells where the header has {len(names)}; check its quotes")
        rows.append((f"row {number}", dict(zip(names, row))))
    return rows


def _label(word: str, taxonomy: Taxonomy | None, where: str) -> str | None:
    if not word or taxonomy is None:
        return word or None
    if (name := taxonomy.find(word)) is None:
        raise InputError(f"{where}: unknown label {word!r}; choose from {', '.join(taxonomy.names)}")
    return name


def _sources(cell: str, step: int, where: str) -> tuple[int, ...]:
    numbers = [whole(word) for word in cell.replace(",", " ").split()]
    if any(k is None or k >= step for k in numbers):
        raise InputError(f"{where}: depends_on is {cell!r}; list earlier steps than {step}, such as '0 3'")
    return tuple(sorted({k for k in numbers if k is not None}))


def _one_line(text: str) -> str:
    """The text without line breaks, and with a mark that keeps a spreadsheet from taking it for a formula."""
    line = " ".join(text.replace("\0", " ").split())
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def _unmarked(text: str) -> str:
    """What of a step's text survives a spreadsheet, with or without the mark."""
    return _one_line(text).lstrip("' ")


# ---------------------------------------------------------------------------------------------- agreement, tables


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far labels agree with a reference, over the n steps that the reference labels.

    kappa: Cohen's, NaN where the reference or chance leaves nothing to agree on. macro_f1: over the categories of the
    reference. majority: accuracy of always saying its commonest category. confusion [k, k + 1] counts reference (row)
    against given (column), the last column for None.
    """

    names: tuple[str, ...]
    n: int
    accuracy: float
    kappa: float
    macro_f1: float
    majority: float
    confusion: NDArray[np.int64]


def agreement(given: Sequence[str | None], reference: Sequence[str | None], taxonomy: Taxonomy) -> Agreement:
    """Agreement of labels with a reference; a None in `given` is wrong, one in `reference` is left out.

    Raises InputError for lengths that differ, labels outside the taxonomy, or a reference without labels.
    """
    if len(given) != len(reference):
        raise InputError(f"{len(given)} labels for {len(reference)} in the reference; give one for each")
    column = {name: i for i, name in enumerate(taxonomy.names)}
    if strange := next((x for x in (*given, *reference) if x is not None and x not in column), None):
        raise InputError(f"unknown label {strange!r}; the taxonomy has {', '.join(column)}")
    confusion = np.zeros((len(column), len(column) + 1), dtype=np.int64)
    for g, r in zip(given, reference):
        if r is not None:
            confusion[column[r], len(column) if g is None else column[g]] += 1
    n = int(confusion.sum())
    if not n:
        raise InputError("the reference has no labels to agree with")
    truth, said, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    accuracy, chance = hits.sum() / n, float(truth @ said[:-1]) / n**2
    f1 = (2 * hits / np.maximum(truth + said[:-1], 1))[truth > 0]
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(
        taxonomy.names, n, float(accuracy), float(kappa), float(f1.mean()), float(truth.max()) / n, confusion
    )


@dataclass(frozen=True)
class CategoryRow:
    """One category: `mean` of its values with their interval, over `n` steps of `n_traces` traces.

    n_missing: steps of it whose value was NaN, left out. position: where they stand, 0 the first step and 1 the last.
    """

    label: str | None
    mean: Interval
    n: int
    n_missing: int
    n_traces: int
    position: float


def category_table(
    traces: Sequence[Trace],
    values: Sequence[ArrayLike],
    *,
    clusters: Sequence[Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[CategoryRow]:
    """Mean value per category, commonest first: averaged within each trace, then across traces (arXiv 2506.19143).

    values: one number per step of each trace, NaN where undefined. The interval resamples clusters, by default traces;
    name the problems in `clusters` when several traces solve one. Steps without a label come last, as None. Raises
    InputError for traces without labels and values that do not fit them.
    """
    clusters = range(len(traces)) if clusters is None else clusters
    if not len(traces) == len(values) == len(clusters):
        raise InputError(f"{len(traces)} traces, {len(values)} values and {len(clusters)} clusters; give one for each")
    found: dict[str | None, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for t, (trace, given) in enumerate(zip(traces, values)):
        numbers = np.asarray(given, dtype=np.float64)
        if trace.labels is None:
            raise InputError(f"trace {trace.id or t!r} has no labels; label it first")
        if numbers.shape != (len(trace),):
            raise InputError(f"trace {trace.id or t!r} has {len(trace)} steps, but values of shape {numbers.shape}")
        for i, (label, value) in enumerate(zip(trace.labels, numbers.tolist())):
            found[label][t].append((value, i / max(len(trace) - 1, 1)))
    rows = [_category_row(label, by_trace, clusters, confidence, seed) for label, by_trace in found.items()]
    return sorted(rows, key=lambda row: (row.label is None, -row.n, row.label or ""))


def _category_row(
    label: str | None,
    by_trace: Mapping[int, list[tuple[float, float]]],
    clusters: Sequence[Any],
    confidence: float,
    seed: int,
) -> CategoryRow:
    defined = {t: kept for t, rows in by_trace.items() if (kept := [row for row in rows if not math.isnan(row[0])])}
    means = np.array([np.mean(rows, axis=0) for rows in defined.values()]).reshape(-1, 2)
    n = sum(map(len, defined.values()))
    return CategoryRow(
        label,
        clustered_bootstrap(means[:, 0], [clusters[t] for t in defined], confidence=confidence, seed=seed),
        n,
        sum(map(len, by_trace.values())) - n,
        len(defined),
        float(means[:, 1].mean()) if n else math.nan,
    )


def whole(value: Any) -> int | None:
    """A number given as 3, "3" or " 3 "; None for anything else, true and 3.5 included."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
