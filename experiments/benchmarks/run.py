"""Measure capture, steering, import and reading against the bare model and other packages.

python experiments/benchmarks/run.py                        # everything; writes results/cpu.json and cpu.md
python experiments/benchmarks/run.py --quick --only import  # a look at one case; writes nothing
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from harness import Cell, Table, console, machine
from rich.table import Table as RichTable

CASES = {
    "capture": "capture_case",
    "circuits": "circuit_case",
    "steering": "steering_case",
    "attention": "attention_case",
    "serving": "serving_case",
    "import": "imports_case",
    "reading": "reading_case",
    "rollouts": "rollout_case",
    "reasoning": "reasoning_case",
    "saes": "sae_case",
}
RESULTS = Path(__file__).parent / "results"
NOTE = (
    "Medians of ratios over interleaved repetitions in one process (in brackets: their range). They compare ways of"
    " doing one piece of work on this machine; they say nothing about absolute speed or other machines."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the wanted cases, print their tables, and write the results of a complete run."""
    options = _options(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet()
    about, tables, started = machine(), [], time.perf_counter()
    about["repetitions"] = 2 if options.quick else options.repetitions
    folder = options.out or (None if options.quick or options.only else RESULTS)
    for name in options.only or CASES:
        case: Callable[[int], list[Table]] = import_module(CASES[name]).run
        for table in case(2 if options.quick else options.repetitions):
            console.print(_printed(table))
            tables.append(table)
        about["load_average_at_end"] = round(os.getloadavg()[0], 2)
        if folder is not None:  # after every case, so that an interrupted run keeps what it has
            _write(folder, about, tables)
    console.print(f"{_verdict(tables)}; the run took {(time.perf_counter() - started) / 60:.1f} minutes")
    if folder is None:
        console.print("a partial run: nothing was written (give --out FOLDER to keep it)")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of emocircuits on this machine's CPU.")
    parser.add_argument("--quick", action="store_true", help="2 repetitions: a check that it runs, not a result")
    parser.add_argument("--only", action="append", choices=list(CASES), help="run this case only; may be repeated")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds over all ways of a case (5 or more)")
    parser.add_argument(
        "--out", type=Path, help="folder of cpu.json and cpu.md (default: results/, complete runs only)"
    )
    options = parser.parse_args(arguments)
    if options.repetitions < 5:
        parser.error("a median needs at least 5 repetitions; for a look use --quick")
    return options


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _printed(table: Table) -> RichTable:
    printed = RichTable("way", *table.columns, "note", title=f"{table.title}\n{table.workload}", title_justify="left")
    for line in table.lines:
        cells = [line.cells.get(column) for column in table.columns]
        printed.add_row(line.way, *(_coloured(cell) for cell in cells), line.note)
    return printed


def _coloured(cell: Cell | None) -> str:
    if cell is None:
        return ""
    colour = {True: "green", False: "red", None: ""}[cell.met]
    return f"[{colour}]{cell.text()}[/]" if colour else cell.text()


def _verdict(tables: list[Table]) -> str:
    met = [cell.met for table in tables for line in table.lines for cell in line.cells.values()]
    judged = [m for m in met if m is not None]
    return f"{sum(judged)} of {len(judged)} targets met"


def _write(folder: Path, about: dict[str, Any], tables: list[Table]) -> None:
    from emocircuits.artefact import write_json_atomic, write_text_atomic

    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "cpu.json", {"machine": about, "note": NOTE, "tables": [_as_json(t) for t in tables]})
    write_text_atomic(folder / "cpu.md", _as_markdown(about, tables))
    console.print(f"wrote {folder / 'cpu.json'} and {folder / 'cpu.md'}")


def _as_json(table: Table) -> dict[str, Any]:
    lines = [
        {
            "way": line.way,
            "measured": {column: {**asdict(cell), "met": cell.met} for column, cell in line.cells.items()},
            "note": line.note,
        }
        for line in table.lines
    ]
    return {"title": table.title, "workload": table.workload, "lines": lines}


def _as_markdown(about: dict[str, Any], tables: list[Table]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    parts = [
        "# Benchmarks on a CPU",
        f"{about['cpu']}, {about['cores']} cores, {about['torch_threads']} torch threads, {about['system']},"
        f" Python {about['python']}. {versions}. {about['repetitions']} repetitions; load average"
        f" {about['load_average_at_start']} at the start and {about['load_average_at_end']} at the end.",
        f"{NOTE} {_verdict(tables)}.",
    ]
    for table in tables:
        head = ["way", *table.columns, "note"]
        rows = [head, ["---"] * len(head)]
        for line in table.lines:
            cells = [line.cells.get(column) for column in table.columns]
            rows.append([line.way, *("" if cell is None else cell.text() for cell in cells), line.note])
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {table.title}\n\n{table.workload}\n\n{body}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
