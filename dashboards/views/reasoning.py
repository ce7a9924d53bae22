"""Which sentences of a reasoning trace matter for where it ends; shows what `emocircuits anchors` wrote."""

from __future__ import annotations

from dashboards.shell import missing, page
from emocircuits.report import RunData

COMMAND = "emocircuits anchors --help"


def show(data: RunData) -> None:  # noqa: ARG001 (no run holds anchors yet)
    """The empty state: nothing writes what this page will show into a run yet."""
    missing("This run holds no reasoning traces",
            "Thought anchors say which sentences of a trace its answer hangs on. They come from their own command.",
            COMMAND)  # fmt: skip


if __name__ == "__main__":
    page("Reasoning", show)
