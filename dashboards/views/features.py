"""Features of a sparse autoencoder on reasoning steps; shows what `emocircuits sae` wrote."""

from __future__ import annotations

from dashboards.shell import missing, page
from emocircuits.report import RunData

COMMAND = "emocircuits sae --help"


def show(data: RunData) -> None:  # noqa: ARG001 (no run holds features yet)
    """The empty state: nothing writes what this page will show into a run yet."""
    missing("This run holds no features",
            "A sparse autoencoder splits activations into features that can be named and steered, by its own command.",
            COMMAND)  # fmt: skip


if __name__ == "__main__":
    page("Features", show)
