"""What there is to see of a latent: where it fires, how strongly, beside which others, and which words it writes.

The contents of a SAEDashboard or Neuronpedia page, for any SAE on any texts; `saes.publish` writes them in both forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.activations.sites import Key
from emocircuits.circuits.readout import direct_logits
from emocircuits.reasoning.traces import Trace

from .features import check_latents, encode_items
from .geometry import correlated
from .metrics import Coder
from .splice import check_place
from .tokens import Splitter, StepTokens, paragraphs, place_steps

BARS = 40
WORDS = 10


@dataclass(frozen=True)
class Context:
    """Tokens around one place, the latent's activation at each, and which of them is the place."""

    trace: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class Group:
    """Contexts whose peaks lie in one interval of activation, and the share of firing tokens that do.

    The strongest contexts of all make a group of their own; its share is None.
    """

    low: float
    high: float
    share: float | None
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class Bars:
    """A histogram: counts, and the middles of their bins."""

    middles: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Bars:
        """Forty bins over the values; none for no values."""
        if not len(values):
            return cls((), ())
        counts, edges = np.histogram(values, BARS)
        return cls(tuple(((edges[:-1] + edges[1:]) / 2).tolist()), tuple(counts.tolist()))


@dataclass(frozen=True)
class LatentPage:
    """One latent. density: of tokens where it fires. promoted, suppressed: words, by the direct path to the logits.

    aligned: (coordinate, value, share of the row's absolute sum) of its decoder row. beside: (latent, Pearson's r of
    activations, cosine of decoder rows).
    """

    latent: int
    name: str
    n_texts: int
    n_tokens: int
    density: float
    maximum: float
    activations: Bars
    logits: Bars
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    aligned: tuple[tuple[int, float, float], ...]
    beside: tuple[tuple[int, float, float], ...]
    groups: tuple[Group, ...]


def latent_pages(
    model: Any,
    tokenizer: Any,
    sae: Coder,
    key: Key,
    traces: Iterable[Trace | str],
    latents: Sequence[int],
    *,
    names: Mapping[int, str] | None = None,
    split: Splitter = paragraphs,
    top: int = 20,
    intervals: int = 5,
    per_interval: int = 5,
    before: int = 32,
    after: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LatentPage]:
    """Pages of the latents, from every token of the traces' steps (prompts are read, and not shown); sinks count as 0.

    top: strongest contexts, which do not overlap; then `per_interval` drawn from each of `intervals` equal intervals of
    activation. Raises InputError before any forward pass for a latent that does not exist, and as `check_place` and
    `place_steps` do.
    """
    check_place(model, sae, key)
    check_latents(sae, latents)
    placed = place_steps(model, tokenizer, traces, "all", split)
    codes: Any = sparse.vstack(encode_items(model, tokenizer, sae, key, placed, batch_size, progress), format="csc")
    rows = sae.W_dec.detach().float().cpu()
    units = normalize(rows, dim=-1)
    texts = _Texts(tokenizer, placed, before, after)
    made = []
    for latent in latents:
        logits = direct_logits(model, rows[[latent]])[0].cpu()
        column = codes[:, [latent]].toarray().ravel()
        fires = column[column > 0]
        made.append(LatentPage(
            latent, (names or {}).get(latent, ""), len(placed), len(column), float((column > 0).mean()),
            float(fires.max(initial=0.0)), Bars.of(fires), Bars.of(logits.numpy()),
            _words(tokenizer, logits), _words(tokenizer, -logits, -1), _aligned(rows[latent]),
            tuple((i, r, float(units[i] @ units[latent])) for i, r in correlated(codes, latent)),
            _groups(column, texts, top, intervals, per_interval, np.random.default_rng((seed, latent))),
        ))  # fmt: skip
    return made


class _Texts:
    """Rows of codes as places in texts."""

    def __init__(self, tokenizer: Any, placed: Sequence[StepTokens], before: int, after: int) -> None:
        self.names = [one.trace for one in placed]
        self.ids = [[one.ids[r["token"]] for r in one.records] for one in placed]
        self.starts = np.cumsum([0, *map(len, self.ids)])
        self.tokenizer, self.before, self.after = tokenizer, before, after

    def window(self, row: int) -> tuple[int, int]:
        """First and last (exclusive) row shown around one, within its text."""
        i = int(np.searchsorted(self.starts, row, "right")) - 1
        return max(int(self.starts[i]), row - self.before), min(int(self.starts[i + 1]), row + self.after + 1)

    def context(self, row: int, column: NDArray[Any]) -> Context:
        first, stop = self.window(row)
        i = int(np.searchsorted(self.starts, row, "right")) - 1
        ids = self.ids[i][first - self.starts[i] : stop - self.starts[i]]
        tokens = tuple(self.tokenizer.decode([t]) for t in ids)
        return Context(self.names[i], tokens, tuple(column[first:stop].tolist()), row - first)

    def apart(self, rows: Iterable[int], n: int) -> list[int]:
        """The first n rows that lie in no window of one before them."""
        chosen: list[int] = []
        shown: list[tuple[int, int]] = []
        for row in rows:
            if len(chosen) == n:
                break
            if not any(a <= row < b for a, b in shown):
                chosen.append(row)
                shown.append(self.window(row))
        return chosen


def _groups(
    column: NDArray[Any], texts: _Texts, top: int, intervals: int, per: int, rng: np.random.Generator
) -> tuple[Group, ...]:
    rows = np.flatnonzero(column > 0)
    if not len(rows):
        return ()
    strongest = texts.apart(rows[np.argsort(-column[rows], kind="stable")].tolist(), top)
    groups = [Group(float(column[strongest[-1]]), float(column[strongest[0]]), None,
                    tuple(texts.context(r, column) for r in strongest))]  # fmt: skip
    edges = np.linspace(0, column.max(), intervals + 1)
    place = np.minimum(np.searchsorted(edges, column[rows], "left") - 1, intervals - 1)
    for i in reversed(range(intervals)):
        mine = rows[place == i]
        drawn = sorted(texts.apart(rng.permutation(mine).tolist(), per), key=lambda r: -column[r])
        contexts = tuple(texts.context(r, column) for r in drawn)
        groups.append(Group(float(edges[i]), float(edges[i + 1]), len(mine) / len(rows), contexts))
    return tuple(groups)


def _words(tokenizer: Any, logits: Tensor, sign: int = 1) -> tuple[tuple[str, float], ...]:
    found = logits.topk(min(WORDS, len(logits)))
    return tuple((tokenizer.decode([t]), sign * v) for t, v in zip(found.indices.tolist(), found.values.tolist()))


def _aligned(row: Tensor, n: int = 3) -> tuple[tuple[int, float, float], ...]:
    size = row.abs()
    top = size.topk(min(n, len(row))).indices.tolist()
    return tuple((i, float(row[i]), float(size[i] / size.sum())) for i in top)
