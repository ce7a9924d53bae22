"""Import: how long `import emocircuits` and `emocircuits --help` take, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from harness import Line, Table, Way, interleaved
from peers import NOT_COMPARED

TORCH = "import torch"
NO_TORCH = "assert 'torch' not in sys.modules, 'torch was imported'"
OURS = {
    "import emocircuits": f"import sys, emocircuits; {NO_TORCH}",
    "emocircuits --help": f"""
import sys
from emocircuits.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
{NO_TORCH}
""",
}
PEERS = ("nnsight", "transformer_lens", *NOT_COMPARED)
TARGET = 0.1


def run(repetitions: int) -> list[Table]:
    """Ratios to `import torch`; a process that loaded torch with us ends the case with an error."""
    peers = {f"import {name}": f"import {name}" for name in PEERS if find_spec(name)}
    scripts = {"python alone": "", TORCH: TORCH, **OURS, **peers}
    timing = interleaved({name: _process(script) for name, script in scripts.items()}, repetitions)
    lines = [
        Line(
            name,
            {"time, x import torch": timing.ratio(name, TORCH, TARGET if name in OURS else None)},
            "torch not loaded" if name in OURS else "",
        )
        for name in scripts
    ]
    lines += [Line(f"import {name}", note="not installed") for name in PEERS if not find_spec(name)]
    return [Table("Import", "a fresh Python process each time, its own start included", lines)]


def _process(script: str) -> Way:
    def run() -> None:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the timed process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")

    return run
