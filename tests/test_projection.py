"""Readings in two dimensions: the plane is the training readings' own, held-out ones are only placed in it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from test_directions import EMOTIONS, planted

from emocircuits.directions import centre
from emocircuits.errors import InputError, MissingPackageError
from emocircuits.projection import readings_plane


def split(seed: int = 0):
    features, _ = planted(seed=seed)
    inside = [t != "theme0" for t in features.themes]
    return features.where(inside), features.where([not k for k in inside])


def coordinates(found, held_out: bool) -> np.ndarray:
    return np.array([[p["x"], p["y"]] for p in found["points"] if p["held_out"] == held_out])


def test_components_are_those_of_the_training_readings() -> None:
    train, test = split()
    found = readings_plane(train, test, EMOTIONS, 7)
    a, b = (centre(f)[:, 1].numpy() for f in (train, test))
    pca = PCA(2, svd_solver="full").fit(a)
    assert found["variance"] == pytest.approx(pca.explained_variance_ratio_, rel=1e-4)
    for x, held_out in ((a, False), (b, True)):
        # A component's sign is free.
        np.testing.assert_allclose(np.abs(coordinates(found, held_out)), np.abs(pca.transform(x)), atol=1e-3)
    assert [p["emotion"] for p in found["points"]] == [*train.labels, *test.labels]


def test_umap_places_held_out_readings_among_their_own() -> None:
    train, test = split()
    found = readings_plane(train, test, EMOTIONS, 7, "umap", seed=3)
    assert found["variance"] is None
    assert silhouette_score(coordinates(found, True), test.labels) > 0.5
    assert found == readings_plane(train, test, EMOTIONS, 7, "umap", seed=3)
    fewer = readings_plane(train, test.where([g == test.groups[0] for g in test.groups]), EMOTIONS, 7, "umap", seed=3)
    assert np.array_equal(coordinates(found, False), coordinates(fewer, False))


def test_bad_input_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = split()
    with pytest.raises(InputError, match="pca, umap"):
        readings_plane(train, test, EMOTIONS, 7, "tsne")
    with pytest.raises(InputError, match="layer of these readings"):
        readings_plane(train, test, EMOTIONS, 5)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingPackageError, match="pip install umap-learn"):
        readings_plane(train, test, EMOTIONS, 7, "umap")
