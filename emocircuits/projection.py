"""Readings in two dimensions: principal components, or UMAP. Maps are for looking, not for claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .directions import centre
from .errors import MissingPackageError, unknown
from .reading import Features

METHODS = ("pca", "umap")
Floats = NDArray[np.floating[Any]]


def readings_plane(
    train: Features, test: Features, emotions: Sequence[str], layer: int, method: str = "pca", seed: int = 0
) -> dict[str, Any]:
    """Group-centred readings of one layer in the plane of the training ones: {"layer", "variance", "points"}.

    Held-out readings are placed in that plane and do not shape it. variance: shares of the two components (None for
    UMAP). Raises InputError for a layer that was not read, MissingPackageError without umap-learn.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    sides = [f.complete(tuple(emotions)).at([layer]) for f in (train, test)]
    a, b = (centre(f)[:, 0].numpy() for f in sides)
    share = None
    if method == "pca":
        _, spread, axes = np.linalg.svd(a - a.mean(0), full_matrices=False)
        placed = [(x - a.mean(0)) @ axes[:2].T for x in (a, b)]
        share = (spread**2 / (spread**2).sum())[:2].tolist()
    else:
        made = fitted_umap(a, seed=seed)
        placed = [made.embedding_, made.transform(b)]
    points = [
        {"x": u, "y": v, "emotion": emotion, "theme": theme, "held_out": held}
        for f, xy, held in zip(sides, placed, (False, True))
        for (u, v), emotion, theme in zip(np.asarray(xy, dtype=float).tolist(), f.labels, f.themes)
    ]
    return {"layer": layer, "variance": share, "points": points}


def fitted_umap(rows: Floats, *, neighbors: int = 15, seed: int = 0) -> Any:
    """UMAP fitted on rows [n, d] by cosine distance, the same for the same seed; n is 3 or more.

    Raises MissingPackageError without umap-learn.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise MissingPackageError("UMAP needs umap-learn; run: pip install umap-learn") from error
    options: Any = {"metric": "cosine", "random_state": seed, "n_jobs": 1, "init": "spectral"}
    if len(rows) <= 16:  # too few for the spectral start
        options["init"] = "random"
    return UMAP(n_neighbors=min(neighbors, len(rows) - 1), **options).fit(rows)
