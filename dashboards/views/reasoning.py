"""Placeholder."""

from __future__ import annotations

from dashboards.shell import page
from emocircuits.report import RunData


def show(data: RunData) -> None:
    """Nothing yet."""


if __name__ == "__main__":
    page("Reasoning", show)
