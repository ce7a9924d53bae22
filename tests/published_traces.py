"""Where the published reasoning traces lie beside the repository, when they do."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "thought_anchors"


def problems() -> list[Path]:
    """Folders of the published problems; skips the test where they are absent."""
    found = sorted(FOLDER.glob("*/*/problem_*"))
    if not found:
        pytest.skip(f"the published traces are not at {FOLDER}")
    return found
