"""How a cost card looks: Markdown for people, and a plot that needs no browser and no extra package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .steering import Steerer

Card = Mapping[str, Any]
WIDTH, HEIGHT, PAD = 360, 220, 44
COLORS = {"steered": "#6B4FD8", "random": "#8A8F98"}
PANELS = (("coherent", "coherent expression"), ("perplexity", "median perplexity"), ("capability", "capability"))


def markdown(steerer: Steerer, picture: str) -> str:
    """The card as Markdown; `picture` is the file name of its plot."""
    card = steerer.cost or {}
    columns = ["strength", "coherent expression", "forced choice", "degenerate", "perplexity", "repetition",
               "KL, neutral text", "capability"]  # fmt: skip
    lines = [
        f"# {steerer.name}: what it does and what it costs",
        "",
        f"Target: {card['emotion']}. Model: {card['model']}. Strength 1 below is the steerer's own"
        f" ({_num(card['strength'], 4)}). {card['n_scenarios']} held-out scenarios, judge {card['judge']}, seed"
        f" {card['seed']}, 95 % intervals clustered by scenario.",
        "",
        f"![dose and response]({picture})",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    lines += [_line(cell) for cell in card["cells"]]
    lines += [
        "",
        card.get("control", "Random: directions drawn at random, of the same norms at the same places."),
        "Capability: share of forty common-knowledge items whose right ending is the likeliest of three. It and the KL"
        " are measured with the steerer fully on, whatever its schedule or positions.",
        "",
        "## One text per strength",
        "",
    ]
    lines += [f"- **{_name(c)}**: {' '.join(c['example'].split())}" for c in card["cells"] if c["method"] != "random"]
    return "\n".join(lines) + "\n"


def _line(cell: Card) -> str:
    rates = [_rate(cell[k]) for k in ("coherent", "expression", "degenerate")]
    numbers = [_num(cell["perplexity"], 1), _num(cell["repetition"], 2), _num(cell["kl_on_neutral"], 3)]
    capable = "undefined" if cell["capability"] is None else f"{cell['capability']:.0%}"
    return f"| {' | '.join([_name(cell), *rates, *numbers, capable])} |"


def _name(cell: Card) -> str:
    if cell["method"] == "none":
        return "unsteered"
    return f"{cell['dose']:g}" if cell["method"] == "steered" else f"{cell['dose']:g}, random"


def _rate(interval: Card) -> str:
    if interval["estimate"] is None:
        return "undefined"
    return f"{interval['estimate']:.0%} ({interval['low']:.0%} to {interval['high']:.0%})"


def _num(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def plot(card: Card) -> str:
    """Three panels as one SVG: expression, perplexity and capability over signed strength."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(PANELS)} {HEIGHT + 30}"'
        ' font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (key, title) in enumerate(PANELS):
        parts.append(f'<g transform="translate({i * WIDTH},0)">{_panel(card, key, title)}</g>')
    for i, (method, color) in enumerate(COLORS.items()):
        x = PAD + 90 * i
        parts.append(f'<rect x="{x}" y="{HEIGHT + 12}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 15}" y="{HEIGHT + 21}">{escape(method)}</text>')
    return "".join(parts) + "</svg>\n"


def _panel(card: Card, key: str, title: str) -> str:
    cells = {m: [c for c in card["cells"] if c["method"] in (m, "none")] for m in COLORS}
    values = [v for rows in cells.values() for c in rows if (v := _value(c, key)) is not None]
    doses = [c["dose"] for c in card["cells"]]
    top = 1.0 if key != "perplexity" else 1.05 * max(values, default=1.0)
    low, high = min(doses), max(doses)
    x = lambda dose: PAD + (dose - low) / (high - low) * (WIDTH - 1.6 * PAD)  # noqa: E731
    y = lambda value: HEIGHT - 24 - value / top * (HEIGHT - 56)  # noqa: E731
    out = [f'<text x="{PAD}" y="16" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.5, 1):
        label = f"{share:.0%}" if key != "perplexity" else f"{share * top:.0f}"
        out.append(
            f'<line x1="{PAD}" x2="{WIDTH - PAD / 2}" y1="{y(share * top)}" y2="{y(share * top)}" stroke="#ddd"/>'
        )
        out.append(f'<text x="{PAD - 6}" y="{y(share * top) + 4}" text-anchor="end">{label}</text>')
    out += [f'<text x="{x(d)}" y="{HEIGHT - 8}" text-anchor="middle">{d:g}</text>' for d in sorted(set(doses))]
    for method, color in COLORS.items():
        out.append(_curve([(x(c["dose"]), _value(c, key)) for c in cells[method]], y, color))
    return "".join(out)


def _value(cell: Card, key: str) -> float | None:
    value = cell[key]
    return value["estimate"] if isinstance(value, Mapping) else value


def _curve(points: Sequence[tuple[float, float | None]], y: Any, color: str) -> str:
    known = [(px, y(value)) for px, value in sorted(points) if value is not None]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in known)
    dots = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in known)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>{dots}'
