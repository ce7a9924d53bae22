"""What latents mean: the steps that drive them, the labels they go with beyond chance, the words they write.

Label statistics compare with labels shuffled within each trace, so a latent that marks a trace, its topic or its length
is not taken for one that marks a kind of step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.activations import batches
from emocircuits.activations.sites import Key
from emocircuits.circuits.readout import direct_logits
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError, unknown

from .metrics import Coder, check_width
from .tokens import StepTokens, read_steps
from .vectors import is_sink

Floats = NDArray[np.float64]
N_BINS = 5  # of latents by how often they fire, each with a null of its own


@torch.no_grad()
def encode_all(sae: Coder, x: Tensor, batch_size: int = 4096) -> Any:
    """Codes of vectors [N, d] as a scipy CSR matrix [N, d_sae]: most of them are zero."""
    check_width(sae, x)
    parts = [sparse.csr_matrix(sae.encode(b.to(sae.W_dec.device)).float().cpu().numpy()) for b in x.split(batch_size)]
    return sparse.vstack(parts, format="csr")


def check_latents(sae: Coder, latents: Sequence[int]) -> None:
    """Raise InputError unless all of them are latents of this SAE, and there is one."""
    width = sae.W_dec.shape[0]
    if not latents or not all(0 <= i < width for i in latents):
        raise InputError(f"name latents of this SAE, 0 to {width - 1}; given were {list(latents)}")


def encode_items(
    model: Any, tokenizer: Any, sae: Coder, key: Key, items: Sequence[StepTokens], batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Any]:  # fmt: skip
    """CSR codes [rows, d_sae] of what is read of each item; at sinks, which no SAE here is trained on, they are 0."""
    task = progress.add_task("reading texts", total=len(items)) if progress is not None else None
    found: list[Any] = [None] * len(items)
    for index in batches(len(items), [len(item.ids) for item in items], batch_size):
        batch = [items[i] for i in index]
        x = read_steps(model, tokenizer, batch, [key])[key].float()
        kept = sparse.diags((~is_sink(x)).double().cpu().numpy())
        codes, ends = (kept @ encode_all(sae, x)).tocsr(), np.cumsum([0, *(len(item.read) for item in batch)])
        for i, a, b in zip(index, ends, ends[1:]):
            found[i] = codes[a:b]
        if progress is not None and task is not None:
            progress.advance(task, len(batch))
    return found


@dataclass(frozen=True)
class Activity:
    """Of each latent on one's own data: share of rows where it fires, its maximum, and its mean where it fires."""

    density: Tensor  # [d_sae]
    maximum: Tensor  # [d_sae]
    mean_active: Tensor  # [d_sae], NaN where it never fires

    @classmethod
    def of(cls, codes: Any) -> Activity:
        """From codes [N, d_sae] of `encode_all`. Published maxima are of other data and often far off."""
        fires = np.asarray((codes != 0).sum(0)).ravel()
        total = np.asarray(codes.sum(0)).ravel()
        mean = np.divide(total, fires, out=np.full(len(fires), np.nan), where=fires > 0)
        top = np.asarray(codes.max(0).todense()).ravel()
        return cls(*(torch.from_numpy(np.asarray(v, dtype=np.float32)) for v in (fires / codes.shape[0], top, mean)))


def top_steps(
    codes: Any, records: Sequence[Mapping[str, Any]], latent: int, n: int = 10
) -> list[tuple[float, Mapping[str, Any]]]:
    """The n rows that drive a latent most, as (activation, record), falling; fewer when it fires less often."""
    if not 0 <= latent < codes.shape[1]:
        raise InputError(f"latent {latent} does not exist; this SAE has 0 to {codes.shape[1] - 1}")
    column = codes[:, [latent]].tocoo()
    order = np.argsort(-column.data, kind="stable")[:n]
    return [(float(column.data[i]), records[int(column.row[i])]) for i in order if column.data[i] > 0]


# ------------------------------------------------------------------------------------------------ labels


@dataclass(frozen=True)
class Enrichment:
    """How much more each latent [d_sae] fires at steps of each label [C] than with labels shuffled within traces.

    lift: mean activation at the label over mean activation at all steps. z: standardised by the exact mean and variance
    under shuffling. p: one-sided, from shuffled z of latents that fire about as often. q: false discovery rate over all
    latents and labels (Benjamini-Hochberg). NaN for latents that fire at too few steps to say.
    """

    labels: tuple[str, ...]
    lift: Floats
    z: Floats
    p: Floats
    q: Floats

    def of(self, label: str, q: float = 0.05) -> list[int]:
        """Latents enriched at a label, strongest first."""
        if label not in self.labels:
            raise unknown("label", label, self.labels)
        column = self.labels.index(label)
        found = np.flatnonzero(self.q[:, column] <= q)
        return found[np.argsort(-self.z[found, column])].tolist()


def enrichment(
    codes: Any,
    labels: Sequence[str | None],
    traces: Sequence[Any],
    *,
    shuffles: int = 500,
    min_active: int = 5,
    seed: int = 0,
) -> Enrichment:
    """Which latents go with which labels; rows without a label are left out.

    traces: labels are shuffled among rows of the same trace; pass (trace, position) pairs to hold position, too.
    Raises InputError unless there is a label and a trace per row and at least two labels.
    """
    if not len(labels) == len(traces) == codes.shape[0]:
        raise InputError(
            f"there are {codes.shape[0]} rows, {len(labels)} labels and {len(traces)} traces; give one each"
        )
    rows = np.array([i for i, label in enumerate(labels) if label is not None])
    names = tuple(sorted({str(labels[i]) for i in rows}))
    if len(names) < 2:
        raise InputError("enrichment compares labels, so there must be at least two")
    a = codes[rows].tocsc()
    y = np.array([names.index(str(labels[i])) for i in rows])
    stratum = np.unique([repr(traces[i]) for i in rows], return_inverse=True)[1]
    fires = np.asarray((a != 0).sum(0)).ravel()
    usable = fires >= min_active
    centre, scale = _moments(a, y, stratum, len(names))
    scale[~usable] = np.nan

    def standardised(order: NDArray[Any]) -> Floats:
        return (_sums(a, y[order], len(names)) - centre) / scale

    z = standardised(np.arange(len(y)))
    rng, by_stratum = np.random.default_rng(seed), np.argsort(stratum, kind="stable")
    null = np.empty((shuffles, *z.shape), dtype=np.float32)
    for i in range(shuffles):
        order = np.empty(len(y), dtype=np.intp)
        order[by_stratum] = np.lexsort((rng.random(len(y)), stratum))
        null[i] = standardised(order)
    p = _pooled(z, null, fires)
    total = np.asarray(a.sum(0)).ravel()[:, None] / len(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = _sums(a, y, len(names)) / np.bincount(y) / total
    return Enrichment(names, np.where(usable[:, None], lift, np.nan), z, p, false_discovery_rate(p))


def _sums(a: Any, y: NDArray[Any], n_labels: int) -> Floats:
    """[m, C] activation of each latent summed over the rows of each label."""
    return np.asarray(a.T @ np.eye(n_labels)[y])


def _moments(a: Any, y: NDArray[Any], stratum: NDArray[Any], n_labels: int) -> tuple[Floats, Floats]:
    """Exact mean and standard deviation [m, C] of `_sums` when labels are shuffled within strata."""
    member = sparse.csr_matrix((np.ones(len(y)), (stratum, np.arange(len(y)))))
    sums, squares = (member @ a).tocsr(), (member @ a.power(2)).tocsr()
    n = np.bincount(stratum).astype(float)[:, None]
    counts = np.zeros((len(n), n_labels))
    np.add.at(counts, (stratum, y), 1.0)
    drawn = counts * (n - counts) / (n * np.maximum(n - 1, 1))
    variance = squares.T @ drawn - sums.power(2).T @ (drawn / n)
    scale = np.sqrt(np.maximum(variance, 0))
    return np.asarray(sums.T @ (counts / n)), np.where(scale > 1e-9 * np.abs(scale).max(initial=1), scale, np.nan)


def _pooled(z: Floats, null: NDArray[Any], fires: NDArray[Any]) -> Floats:
    """p of z [m, C] among the null [P, m, C] of latents that fire about as often."""
    p = np.full(z.shape, np.nan)
    for column in range(z.shape[1]):
        known = np.flatnonzero(~np.isnan(z[:, column]))
        for group in np.array_split(known[np.argsort(fires[known], kind="stable")], N_BINS):
            if len(group):
                ordered = np.sort(null[:, group, column].ravel())
                above = len(ordered) - np.searchsorted(ordered, z[group, column] - 1e-5)
                p[group, column] = (1 + above) / (1 + len(ordered))
    return p


def false_discovery_rate(p: Floats, tests: int | None = None) -> Floats:
    """Benjamini-Hochberg q values of p values of any shape; NaN stay NaN and do not count as tests.

    tests: how many there were in all, when those with p = 1 were left out.
    """
    q = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    order = np.argsort(p[known])
    scaled = p[known][order] * (known.sum() if tests is None else tests) / np.arange(1, known.sum() + 1)
    values = np.empty(len(order))
    values[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    q[known] = values
    return q


def behaviours(found: Enrichment, W_dec: Tensor, q: float = 0.05) -> dict[str, tuple[list[int], Tensor]]:
    """Per label, the latents that are enriched there and at no other, and the unit mean of their decoder rows (RISE).

    Labels without such latents are left out.
    """
    significant = found.q <= q
    alone = significant.sum(1) == 1
    made = {}
    for column, label in enumerate(found.labels):
        latents = np.flatnonzero(alone & significant[:, column]).tolist()
        if latents:
            made[label] = (latents, normalize(normalize(W_dec[latents].detach().float(), dim=-1).mean(0), dim=0))
    return made


# ------------------------------------------------------------------------------------------------ directions


def logit_lens(model: Any, tokenizer: Any, rows: Tensor, k: int = 10) -> list[list[tuple[str, float]]]:
    """The k tokens that each residual direction [n, d_model] raises most on the direct path to the logits.

    Raises as `direct_logits` does; it holds [n, vocabulary] logits, so pass the rows that are shown.
    """
    top = direct_logits(model, rows).topk(k, dim=-1)
    return [
        [(tokenizer.decode([token]), value) for token, value in zip(tokens, values)]
        for tokens, values in zip(top.indices.tolist(), top.values.tolist())
    ]


@dataclass(frozen=True)
class Overlap:
    """Of one emotion's direction: the decoder rows nearest to it (either sign), and how far random directions come."""

    emotion: str
    latents: tuple[int, ...]
    cosines: tuple[float, ...]
    p: float  # share of random directions whose nearest row is at least as near


def overlap(
    W_dec: Tensor, directions: DirectionSet, layer: int, *, top: int = 5, draws: int = 500, seed: int = 0
) -> list[Overlap]:
    """Latents along each emotion's direction at a layer, beside random directions of the same space."""
    slot = directions.slots(layer)[0]
    rows = normalize(W_dec.detach().float().cpu(), dim=-1)
    if rows.shape[1] != directions.units.shape[-1]:
        raise InputError(f"decoder rows have size {rows.shape[1]}, and directions {directions.units.shape[-1]}")
    noise = normalize(torch.randn(draws, rows.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)
    null = (noise @ rows.T).abs().amax(1)
    made = []
    for i, emotion in enumerate(directions.emotions):
        cosine = rows @ directions.units[i, slot].float().cpu()
        nearest = cosine.abs().topk(min(top, len(rows))).indices
        p = (1 + int((null >= cosine.abs().max()).sum())) / (1 + draws)
        made.append(Overlap(emotion, tuple(nearest.tolist()), tuple(cosine[nearest].tolist()), p))
    return made
