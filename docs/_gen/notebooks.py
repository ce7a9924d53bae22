"""A notebook as a page: text, code and, where it was run, what it showed; figures stay interactive without network."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

PLOTLY = "assets/plotly.min.js"
UP = "../../"  # from a notebook's page to the site's root
FIGURE = "application/vnd.plotly.v1+json"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
OBJECT = re.compile(r"<\S+ object>")  # HTML for a notebook's own page, such as plotly's script
Cell = dict[str, Any]


def plotly() -> str:
    """The script that draws the figures, from the installed package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def page(path: Path, run: Path) -> str:
    """Markdown of a notebook. run: the same one with outputs, which are shown when it holds the same cells."""
    cells, outputs = _cells(path), _outputs(path, run)
    shown = "What it shows below is a small run" if outputs else "Run it to see its figures"
    parts = []
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [text for k, found in enumerate(outputs.get(i, [])) if (text := _shown(found, f"figure-{i}-{k}"))]
    title, *rest = parts
    head, _, lead = title.partition("\n")
    script = [f'<script src="{UP}{PLOTLY}"></script>'] if outputs else []
    return "\n\n".join([head, f"[Download this notebook]({path.name}). {shown}.", *script, lead, *rest])


def _cells(path: Path) -> list[Cell]:
    return json.loads(path.read_text("utf-8"))["cells"]


def _outputs(path: Path, run: Path) -> dict[int, list[Cell]]:
    """{cell: its outputs}; none where the notebook was not run, or was changed after that."""
    if not run.is_file():
        return {}
    mine, theirs = _cells(path), _cells(run)
    if ["".join(c["source"]) for c in mine] != ["".join(c["source"]) for c in theirs]:
        return {}
    return {i: cell["outputs"] for i, cell in enumerate(theirs) if cell.get("outputs")}


def _shown(output: Cell, name: str) -> str:
    """One output: a figure, or text; progress bars and warnings (stderr) are left out."""
    if output["output_type"] == "stream":
        return _block("".join(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if FIGURE in data:
        found = json.dumps({k: data[FIGURE].get(k) for k in ("data", "layout")}).replace("</", "<\\/")
        height = data[FIGURE].get("layout", {}).get("height") or 360
        return (
            f'<div id="{name}" style="height: {height}px"></div>\n'
            f"<script>{{ const f = {found}; "
            f"Plotly.newPlot('{name}', f.data, f.layout, {{responsive: true, displayModeBar: false}}); }}</script>"
        )
    said = "".join(data.get("text/plain", ""))
    return "" if OBJECT.fullmatch(said) else _block(said)


def _block(text: str) -> str:
    """Text as it was printed, also where it holds a fence."""
    lines = ESCAPES.sub("", text).strip("\n").replace("\n\n", "\n&#8203;\n")
    return f"<pre><code>{html.escape(lines).replace('&amp;#8203;', '&#8203;')}</code></pre>" if lines else ""
