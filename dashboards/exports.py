"""A figure's numbers as a table to save. No Streamlit in here."""

from __future__ import annotations

from html import unescape
from typing import Any

import pandas as pd
import plotly.graph_objects as go


def figure_csv(fig: go.Figure) -> str:
    """Every point of every series, one per line: where it lies, its value, its error bars and its label."""
    traces: Any = fig.data
    rows = [row for trace in traces for row in (_cells(trace) if trace.type == "heatmap" else _points(trace))]
    return pd.DataFrame(rows).dropna(axis="columns", how="all").to_csv(index=False)


def _cells(trace: Any) -> list[dict[str, Any]]:
    columns, names = _axis(trace.x), _axis(trace.y)
    return [
        {"series": _word(trace.name), "x": x, "y": y, "value": value}
        for y, row in zip(names, trace.z)
        for x, value in zip(columns, row)
    ]


def _points(trace: Any) -> list[dict[str, Any]]:
    x, y = _axis(trace.x), _axis(trace.y)
    n = max(len(x), len(y))
    columns = {"x": x, "y": y, "label": _axis(trace.text) if not isinstance(trace.text, str) else []}
    for axis in ("x", "y"):
        error = getattr(trace, f"error_{axis}", None)
        columns |= {f"{axis}_plus": _axis(error and error.array), f"{axis}_minus": _axis(error and error.arrayminus)}
    whole = {name: values for name, values in columns.items() if len(values) == n}
    return [{"series": _word(trace.name), **{k: v[i] for k, v in whole.items()}} for i in range(n)]


def _axis(values: Any) -> list[Any]:
    """Values along an axis; those with two levels are joined."""
    if values is None or isinstance(values, (str, int, float)):
        return []
    found = list(values)
    if len(found) == 2 and all(isinstance(level, (list, tuple)) for level in found):
        return [" ".join(map(_word, pair)) for pair in zip(*found)]
    return [_word(v) if isinstance(v, str) else v for v in found]


def _word(value: Any) -> str:
    return "" if value is None else unescape(str(value))
