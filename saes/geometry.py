"""How latents lie to one another: a map of decoder rows, kinds apart beyond chance, latents that fire together.

Maps are for looking. What is claimed comes from `separation` and `coactivation`, each beside its null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.errors import InputError
from emocircuits.projection import fitted_umap

from .features import Floats, false_discovery_rate


def layout(rows: Tensor, *, neighbors: int = 15, seed: int = 0) -> Floats:
    """UMAP [n, 2] of directions [n, d] by cosine, as RISE draws decoder rows (arXiv 2512.23988).

    Raises InputError for fewer than three directions or a zero one, MissingPackageError without umap-learn.
    """
    units = _units(rows)
    if len(units) < 3:
        raise InputError(f"a map needs at least three directions, and there are {len(units)}")
    return np.asarray(fitted_umap(units, neighbors=neighbors, seed=seed).embedding_, dtype=float)


@dataclass(frozen=True)
class Separation:
    """Mean silhouette by cosine distance (-1 to 1), all directions and per label, and the same with labels shuffled."""

    n: int
    silhouette: float
    by_label: dict[str, float]
    null_mean: float
    null_high: float  # 95th percentile
    p: float  # one-sided: share of shuffles that separate as well


def separation(rows: Tensor, labels: Sequence[str | None], *, shuffles: int = 1000, seed: int = 0) -> Separation:
    """Whether directions [n, d] of one label lie nearer to each other than to those of any other.

    Directions without a label are left out. Raises InputError for fewer than two labels, or a zero direction.
    """
    if len(labels) != len(rows):
        raise InputError(f"there are {len(rows)} directions and {len(labels)} labels; give one each")
    kept = [i for i, label in enumerate(labels) if label is not None]
    names, y = np.unique([str(labels[i]) for i in kept], return_inverse=True)
    if len(names) < 2:
        raise InputError("a silhouette compares labels, so there must be at least two")
    units = _units(rows[kept])
    scores = silhouettes(units, y)
    rng = np.random.default_rng(seed)
    null = np.array([silhouettes(units, rng.permutation(y)).mean() for _ in range(shuffles)])
    value = float(scores.mean())
    p = (1 + int((null >= value - 1e-12).sum())) / (1 + shuffles)
    by_label = {str(name): float(scores[y == i].mean()) for i, name in enumerate(names)}
    high = float(np.quantile(null, 0.95)) if shuffles else np.nan
    return Separation(len(kept), value, by_label, float(null.mean()) if shuffles else np.nan, high, p)


def silhouettes(units: Floats, y: NDArray[Any]) -> Floats:
    """Silhouette [n] of unit vectors [n, d] with labels y, each of 0..C-1, by cosine distance; 0 for an only member.

    Distances to a whole label are one product with the sum of its vectors, so no [n, n] matrix is made.
    """
    member = np.eye(int(y.max()) + 1)[y]
    count = member.sum(0)
    distance = count - units @ (units.T @ member)  # [n, C], summed over the members of each label
    mine, own = count[y], distance[np.arange(len(y)), y]
    inner = own / np.maximum(mine - 1, 1)
    outer = np.where(member > 0, np.inf, distance / count).min(1)
    scale = np.maximum(np.maximum(inner, outer), 1e-12)
    return np.where(mine > 1, (outer - inner) / scale, 0.0)


def _units(rows: Tensor) -> Floats:
    found = rows.detach().double().cpu()
    if found.dim() != 2 or not (found.norm(dim=1) > 0).all():
        raise InputError("directions must be [n, d] and none may be zero: leave out latents without a decoder row")
    return normalize(found, dim=1).numpy()


# ------------------------------------------------------------------------------------------------ firing together


@dataclass(frozen=True)
class Pair:
    """Two latents that fire at the same rows: how many, how many shuffling within traces gives, and how alike they are.

    jaccard: rows where both fire over rows where either does. cosine: of their decoder rows (NaN without them).
    """

    a: int
    b: int
    both: int
    expected: float
    jaccard: float
    cosine: float
    q: float

    @property
    def lift(self) -> float:
        """Times more often together than by chance."""
        return self.both / self.expected


def coactivation(
    codes: Any,
    traces: Sequence[Any],
    W_dec: Tensor | None = None,
    *,
    min_active: int = 5,
    q: float = 0.05,
    top: int | None = 50,
) -> list[Pair]:
    """Pairs of latents (columns of codes [N, m]) that fire at the same rows more often than their traces explain.

    Chance: either latent's rows shuffled among the rows of each trace, whose expectation is exact; p is the Poisson
    tail at it, whose spread is larger, so it errs on the safe side. False discovery rate over all pairs of latents that
    fire at `min_active` rows or more. Strongest first (by lift). Raises InputError unless there is a trace per row.
    """
    if len(traces) != codes.shape[0]:
        raise InputError(f"there are {codes.shape[0]} rows and {len(traces)} traces; give one each")
    fires: Any = sparse.csr_matrix(codes, dtype=bool, copy=True).astype(np.float64)
    count = np.asarray(fires.sum(0)).ravel()
    usable = np.flatnonzero(count >= min_active)
    fires, count = fires[:, usable].tocsr(), count[usable]
    stratum = np.unique([repr(t) for t in traces], return_inverse=True)[1]
    member: Any = sparse.csr_matrix((np.ones(len(stratum)), (stratum, np.arange(len(stratum)))))
    per_trace = (member @ fires).tocsr()
    together = sparse.triu(fires.T @ fires, k=1).tocoo()
    i, j, both = together.row, together.col, together.data
    if not len(both):
        return []
    expected = np.asarray((per_trace.T @ sparse.diags(1 / np.bincount(stratum)) @ per_trace).tocsr()[i, j]).ravel()
    found = false_discovery_rate(stats.poisson.sf(both - 1, expected), tests=len(usable) * (len(usable) - 1) // 2)
    kept = np.flatnonzero((found <= q) & (both > expected))
    kept = kept[np.argsort(-(both / expected)[kept], kind="stable")][:top]
    rows = None if W_dec is None else normalize(W_dec.detach().float().cpu(), dim=-1)
    pairs = []
    for k in kept.tolist():
        a, b = int(usable[i[k]]), int(usable[j[k]])
        cosine = float("nan") if rows is None else float(rows[a] @ rows[b])
        share = float(both[k] / (count[i[k]] + count[j[k]] - both[k]))
        pairs.append(Pair(a, b, int(both[k]), float(expected[k]), share, cosine, float(found[k])))
    return pairs


def correlated(codes: Any, latent: int, n: int = 5) -> list[tuple[int, float]]:
    """The n latents whose activations [N, m] go with one latent's most: (latent, Pearson's r over rows), falling.

    Latents that never fire are left out. Raises InputError for a latent that does not exist.
    """
    if not 0 <= latent < codes.shape[1]:
        raise InputError(f"latent {latent} does not exist; this SAE has 0 to {codes.shape[1] - 1}")
    a: Any = sparse.csc_matrix(codes, dtype=np.float64)
    mean = np.asarray(a.mean(0)).ravel()
    variance = np.asarray(a.power(2).mean(0)).ravel() - mean**2
    shared = np.asarray((a.T @ a[:, [latent]]).todense()).ravel() / a.shape[0] - mean * mean[latent]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where(variance > 0, shared / np.sqrt(variance * variance[latent]), np.nan)
    r[latent] = np.nan
    order = np.argsort(np.nan_to_num(-r, nan=np.inf), kind="stable")[:n]
    return [(int(k), float(r[k])) for k in order if not np.isnan(r[k])]
