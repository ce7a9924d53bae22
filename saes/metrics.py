"""How good an autoencoder is, by direct computation, and what simpler codes of the same data reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.errors import InputError


class Coder(Protocol):
    """What is measured here: every SAELens SAE, and the baselines below."""

    @property
    def W_dec(self) -> Any:
        """Rows that latents add to a vector [d_sae, d]."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Codes [N, d_sae] of vectors [N, d]."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Vectors [N, d] from codes [N, d_sae]."""
        ...


@dataclass(frozen=True)
class Quality:
    """Of n vectors: explained variance, mean L0, firing density of every latent, and how alike decoder rows are.

    explained_variance: 1 - sum |x - x'|^2 / sum |x - mean|^2 over vectors and dimensions together; NaN for constant
    data. density: share of the vectors at which each latent is active. max_cosine: of each decoder row with any other.
    """

    n: int
    explained_variance: float
    l0: float
    density: Tensor = field(repr=False)  # [d_sae]
    max_cosine: Tensor = field(repr=False)  # [d_sae]

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return 1 - self.explained_variance

    @property
    def dead(self) -> float:
        """Share of the latents that were active nowhere."""
        return float((self.density == 0).double().mean())

    def dense(self, above: float = 0.1) -> float:
        """Share of the latents that are active at more than this share of the vectors."""
        return float((self.density > above).double().mean())

    def histogram(self, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Counts [bins] and edges [bins + 1] of log10 density from 1 / n to 1; dead latents are left out."""
        live = np.log10(self.density[self.density > 0].double().numpy())
        return np.histogram(live, bins, (min(-math.log10(self.n), -1e-9), 0))

    def as_dict(self) -> dict[str, Any]:
        """The numbers of a report as plain values."""
        counts, edges = self.histogram()
        return {
            "n": self.n,
            "explained_variance": self.explained_variance,
            "fvu": self.fvu,
            "l0": self.l0,
            "dead": self.dead,
            "dense_1pct": self.dense(0.01),
            "dense_10pct": self.dense(0.1),
            "max_cosine_mean": float(self.max_cosine.mean()),
            "max_cosine_max": float(self.max_cosine.max()),
            "density_histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()},
        }


def quality(sae: Coder, x: Tensor, batch_size: int = 4096) -> Quality:
    """Measure an SAE on vectors [N, d], in the units it was made for. Raises InputError when they do not fit."""
    explained, density = fidelity(sae, x, batch_size)
    return Quality(len(x), explained, float(density.sum()), density, nearest_cosine(sae.W_dec.detach()))


@torch.no_grad()
def fidelity(sae: Coder, x: Tensor, batch_size: int = 4096) -> tuple[float, Tensor]:
    """Explained variance of vectors [N, d], and the density [d_sae] of each latent, whose sum is L0.

    Raises InputError when SAE and vectors do not fit.
    """
    check_width(sae, x)
    error, active = 0.0, torch.zeros(len(sae.W_dec), dtype=torch.float64)
    for batch in x.split(batch_size):
        batch = batch.to(sae.W_dec.device)
        codes = sae.encode(batch)
        error += float((sae.decode(codes) - batch).double().pow(2).sum())
        active += (codes != 0).sum(0).cpu()
    return _explained(error, x), active / len(x)


def check_width(sae: Coder, x: Tensor) -> None:
    """Raise InputError unless x is [N, d] with the d that the SAE reads, and finite."""
    d = sae.W_dec.shape[1]
    if x.dim() != 2 or x.shape[1] != d or not len(x):
        raise InputError(f"the SAE reads vectors of size {d}, and these are {list(x.shape)}; they are from elsewhere")
    if not torch.isfinite(x).all():
        raise InputError("the vectors hold NaN or infinity; drop those rows")


def explained_variance(x: Tensor, reconstruction: Tensor) -> float:
    """1 - sum |x - x'|^2 / sum |x - mean|^2 of vectors [N, d]; NaN when they are all the same."""
    return _explained(float((x - reconstruction).detach().double().pow(2).sum()), x)


def _explained(error: float, x: Tensor) -> float:
    total = float((x.double() - x.double().mean(0)).pow(2).sum())
    return 1 - error / total if total > 0 else math.nan


# ------------------------------------------------------------------------------------------------ directions


def _chunked_cosine(a: Tensor, b: Tensor, size: int = 2048) -> Iterator[tuple[int, Tensor]]:
    a, b = normalize(a.float(), dim=-1), normalize(b.float(), dim=-1)
    for start in range(0, len(a), size):
        yield start, a[start : start + size] @ b.T


def best_cosine(wanted: Tensor, found: Tensor) -> Tensor:
    """For each of the directions `wanted` [n, d], its greatest cosine with one of `found` [m, d]."""
    return torch.cat([cosine.amax(1) for _, cosine in _chunked_cosine(wanted, found)])


def nearest_cosine(rows: Tensor) -> Tensor:
    """For each row [m, d], its greatest cosine with another row; NaN for a single row."""
    if len(rows) < 2:
        return torch.full((len(rows),), torch.nan)
    found = []
    for start, cosine in _chunked_cosine(rows, rows):
        cosine.diagonal(start).fill_(-torch.inf)
        found.append(cosine.amax(1))
    return torch.cat(found)


def matched_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines [min(m, n)] of the one-to-one matching of rows [m, d] and [n, d] with the greatest sum (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    cosine = torch.cat([chunk for _, chunk in _chunked_cosine(a, b)]).cpu()
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return cosine[rows, columns]


@dataclass(frozen=True)
class Stability:
    """Mean matched cosine of each pair of dictionaries, and what random directions of the same sizes reach."""

    pairs: Mapping[tuple[int, int], float]
    null: float

    @property
    def mean(self) -> float:
        """Over all pairs."""
        return sum(self.pairs.values()) / len(self.pairs)


def stability(dictionaries: Sequence[Tensor], seed: int = 0) -> Stability:
    """How far SAEs [m, d] of the same data agree across seeds. Raises InputError for fewer than two."""
    if len(dictionaries) < 2:
        raise InputError("stability compares SAEs of several seeds; give at least two decoders")
    each = [w.detach().cpu() for w in dictionaries]
    pairs = {
        (i, j): float(matched_cosine(each[i], each[j]).mean()) for j in range(len(each)) for i in range(j)
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(each[0].shape, generator=generator) for _ in range(2))
    return Stability(pairs, float(matched_cosine(a, b).mean()))


# ------------------------------------------------------------------------------------------------ baselines


@dataclass(frozen=True)
class LinearCoder:
    """Codes (x - mean) @ encoder, kept where `keep` keeps them, and decoded by rows of unit norm."""

    mean: Tensor
    W_dec: Tensor  # [d_sae, d]
    keep: Callable[[Tensor], Tensor]
    gain: float = 1.0

    def encode(self, x: Tensor) -> Tensor:
        """Codes [N, d_sae]."""
        return self.gain * self.keep((x - self.mean) @ self.W_dec.T)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Vectors [N, d]."""
        return feature_acts @ self.W_dec + self.mean


def pca(train: Tensor, k: int) -> LinearCoder:
    """The k principal components of rows [N, d]: a dense code of k numbers a vector."""
    mean = train.mean(0)
    _, _, components = torch.linalg.svd(train - mean, full_matrices=False)
    return LinearCoder(mean, components[:k], lambda codes: codes)


def random_sae(train: Tensor, width: int, k: int, seed: int = 0) -> LinearCoder:
    """A TopK SAE with random unit rows and their transpose as encoder, scaled by the one factor that fits best."""
    rows = normalize(torch.randn(width, train.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)

    def keep(codes: Tensor) -> Tensor:
        top = codes.topk(k, sorted=False)
        return torch.zeros_like(codes).scatter(-1, top.indices, top.values.relu())

    mean, sample = train.mean(0), train[:4096] - train.mean(0)
    made = keep(sample @ rows.T) @ rows
    return LinearCoder(mean, rows, keep, float((made * sample).sum() / made.pow(2).sum()))


def kmeans(train: Tensor, width: int, seed: int = 0) -> Any:
    """One of `width` centroids per vector: the sparsest code there is, L0 = 1."""
    from sklearn.cluster import MiniBatchKMeans

    options: Any = {"random_state": seed, "n_init": 1, "batch_size": 4096}
    fitted = MiniBatchKMeans(min(width, len(train)), **options).fit(train.numpy())
    return Centroids(torch.from_numpy(fitted.cluster_centers_).to(train.dtype))


@dataclass(frozen=True)
class Centroids:
    """Each vector is coded as 1 at its nearest centroid."""

    W_dec: Tensor  # [width, d]

    def encode(self, x: Tensor) -> Tensor:
        """Codes [N, width]."""
        return torch.nn.functional.one_hot(torch.cdist(x, self.W_dec).argmin(1), len(self.W_dec)).to(x.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Vectors [N, d]."""
        return feature_acts @ self.W_dec


def baselines(train: Tensor, test: Tensor, width: int, k: int, seed: int = 0) -> dict[str, Quality]:
    """Quality on `test` [M, d] of what needs no autoencoder, fitted on the same vectors `train` [N, d]."""
    return {
        f"PCA, {k} components": quality(pca(train, k), test),
        f"k-means, {width} centroids": quality(kmeans(train, width, seed), test),
        f"random SAE, width {width}, k {k}": quality(random_sae(train, width, k, seed), test),
    }


def probe(
    features: Tensor, labels: Sequence[str | None], train: Sequence[int], test: Sequence[int], k: int | None = None
) -> dict[str, float]:
    """Held-out AUROC per label of a logistic probe on features [N, m]: vectors (the dense probe) or codes.

    k: probe only the k features whose means differ most on the training rows (SAEBench's sparse probing). Rows without
    a label count as "other". A label that is missing from either split gives NaN.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    spread = features[train].std(0)
    x = ((features - features[train].mean(0)) / torch.where(spread > 0, spread, 1)).numpy()
    found = {}
    for label in sorted({name for name in labels if name is not None}):
        y = np.array([name == label for name in labels])
        if len({*y[train]}) < 2 or len({*y[test]}) < 2:
            found[label] = math.nan
            continue
        difference = np.abs(x[train][y[train]].mean(0) - x[train][~y[train]].mean(0))
        columns = slice(None) if k is None else np.argsort(-difference)[:k]
        fitted = LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit(x[train][:, columns], y[train])
        found[label] = float(roc_auc_score(y[test], fitted.decision_function(x[test][:, columns])))
    return found
