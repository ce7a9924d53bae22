"""Measuring: interleaved repetitions in one process, and memory as the torch allocator counts it. Ratios only."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

Way = Callable[[], Any]
MIB = 1 << 20
PACKAGES = ("torch", "transformers", "numpy", "nnsight", "transformer-lens", "sae-lens")
console = Console(width=140)


@dataclass(frozen=True)
class Cell:
    """One measured number, the range of its repetitions, and the most it may be (None: shown for comparison)."""

    value: float
    low: float | None = None
    high: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target holds; None without one."""
        return None if self.target is None else self.value <= self.target

    def text(self) -> str:
        spread = "" if self.low is None or self.high is None else f" ({_short(self.low)} to {_short(self.high)})"
        verdict = "" if self.target is None else f"; target ≤ {self.target:g}: {'met' if self.met else 'NOT MET'}"
        return f"{_short(self.value)}{spread}{verdict}"


@dataclass(frozen=True)
class Line:
    """One way of doing a case's work; cells by column name, and a note (agreement, or why there is no number)."""

    way: str
    cells: Mapping[str, Cell] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One case: what was run, and a line for every way of running it."""

    title: str
    workload: str
    lines: list[Line]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for name in line.cells))


@dataclass(frozen=True)
class Timing:
    """Seconds per repetition of each way, and what each way returned when it was warmed up."""

    seconds: dict[str, list[float]]
    results: dict[str, Any]

    def ratio(self, way: str, base: str, target: float | None = None) -> Cell:
        """Median over repetitions of time / time of `base` in the same repetition, with their range."""
        ratios = [a / b for a, b in zip(self.seconds[way], self.seconds[base])]
        return Cell(statistics.median(ratios), min(ratios), max(ratios), target)


def interleaved(ways: Mapping[str, Way], repetitions: int) -> Timing:
    """Run every way once to warm up, then all of them in turn, starting each round one way further on."""
    names = list(ways)
    results = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with console.status("") as status:
        for name in names:
            status.update(f"warming up: {name}")
            results[name] = ways[name]()
        for round_ in range(repetitions):
            for shift in range(len(names)):
                name = names[(round_ + shift) % len(names)]
                status.update(f"round {round_ + 1} of {repetitions}: {name}")
                start = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - start)
    return Timing(seconds, results)


@dataclass(frozen=True)
class Memory:
    """Bytes beyond those in use at the start: the peak, and what the returned value still holds afterwards."""

    peak: int
    held: int


def memory_of(way: Way) -> Memory:
    """What a way asks of the torch allocator, added up from the profiler's record of every allocation and release.

    The counts are exact and repeat, which the process's resident size does not: it keeps freed blocks.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = way()
        gc.collect()
    kineto: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(kineto.events()) if e.name() == "[memory]")
    now = peak = 0
    for _, _, n_bytes in changes:
        now += n_bytes
        peak = max(peak, now)
    del result
    return Memory(peak, max(now, 0))


def build(factories: Mapping[str, Callable[[], Way]]) -> tuple[dict[str, Way], list[Line]]:
    """The ways that other packages offer here, each tried once, and lines saying why the rest is missing."""
    ways: dict[str, Way] = {}
    missing = []
    for name, factory in factories.items():
        try:
            with console.status(f"preparing {name}"):
                way = factory()
                way()
            ways[name] = way
        except ModuleNotFoundError:
            missing.append(Line(name, note="not installed"))
        except Exception as error:  # another package's failure must not end the run
            reason = (str(error).strip().splitlines() or [""])[-1][:100]
            missing.append(Line(name, note=f"failed: {type(error).__name__}: {reason}"))
    return ways, missing


def machine() -> dict[str, Any]:
    """The machine and the versions, as far as they bear on the numbers."""
    import torch

    from emocircuits import __version__

    versions = {"emocircuits": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
