"""Silhouettes equal scikit-learn's, chance of firing together equals shuffling, and nothing is found in noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import silhouette_samples

from emocircuits.errors import InputError
from saes.geometry import coactivation, correlated, layout, separation, silhouettes


def clusters(n: int = 30, d: int = 8, spread: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, list[str | None]]:
    """Directions around three axes, and the name of each one's axis."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.eye(d)[:3].repeat(n, 1) + spread * torch.randn(3 * n, d, generator=generator)
    return rows, ["a", "b", "c"] * n


class TestSilhouette:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.integers(2, 4), st.integers(6, 20))
    def test_equals_scikit_learn(self, seed, n_labels, n):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, 5))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        y = np.unique(np.r_[np.arange(n_labels), rng.integers(n_labels, size=n - n_labels)], return_inverse=True)[1]
        assert np.allclose(silhouettes(x, y), silhouette_samples(x, y, metric="cosine"), atol=1e-9)

    def test_planted_kinds_are_apart_and_shuffled_ones_are_not(self):
        rows, labels = clusters()
        found = separation(rows, labels, shuffles=200)
        assert found.silhouette > 0.3
        assert found.p < 0.01
        assert found.silhouette > found.null_high > found.null_mean
        assert set(found.by_label) == {"a", "b", "c"}
        shuffled = np.random.default_rng(1).permutation(labels).tolist()
        assert separation(rows, shuffled, shuffles=200).p > 0.05

    def test_length_and_directions_without_a_label_do_not_matter(self):
        rows, labels = clusters()
        whole = separation(rows, labels, shuffles=10)
        scaled = rows * torch.arange(1, len(rows) + 1)[:, None]
        more = separation(torch.cat([scaled, torch.ones(1, 8)]), [*labels, None], shuffles=10)
        assert more.n == whole.n
        assert more.silhouette == pytest.approx(whole.silhouette)

    def test_what_cannot_be_compared(self):
        rows, labels = clusters(4)
        with pytest.raises(InputError, match="at least two"):
            separation(rows, ["a"] * len(rows))
        with pytest.raises(InputError, match="one each"):
            separation(rows, labels[:-1])
        with pytest.raises(InputError, match="zero"):
            separation(torch.cat([rows, torch.zeros(1, 8)]), [*labels, "a"])


class TestLayout:
    def test_keeps_kinds_apart_and_is_the_same_again(self):
        rows, labels = clusters(spread=0.1)
        found = layout(rows, seed=3)
        y = np.unique(np.array(labels), return_inverse=True)[1]
        assert found.shape == (90, 2)
        assert silhouette_samples(found, y).mean() > 0.5
        assert np.array_equal(found, layout(rows, seed=3))

    def test_few_directions(self):
        assert layout(torch.eye(5)[:4]).shape == (4, 2)
        with pytest.raises(InputError, match="three"):
            layout(torch.eye(5)[:2])


@pytest.fixture(scope="module")
def firing():
    """400 rows in 20 traces: 0 and 1 fire together, 2 and 3 both in the first traces only, the rest anywhere."""
    rng = np.random.default_rng(0)
    traces = np.repeat(np.arange(20), 20)
    on = rng.random((400, 12)) < 0.1
    shared = rng.random(400) < 0.1
    on[:, 0], on[:, 1] = shared, shared & (rng.random(400) < 0.9)
    for latent in (2, 3):
        on[:, latent] = (traces < 5) & (rng.random(400) < 0.4)
    on[:, 11] = False
    return sparse.csr_matrix(on * rng.random(on.shape)), traces.tolist()


class TestCoactivation:
    def test_finds_the_planted_pair_and_not_the_one_that_shares_its_traces(self, firing):
        codes, traces = firing
        assert [(p.a, p.b) for p in coactivation(codes, traces)] == [(0, 1)]
        assert (2, 3) in [(p.a, p.b) for p in coactivation(codes, [0] * 400)]

    def test_chance_is_what_shuffling_within_traces_gives(self, firing):
        codes, traces = firing
        found = coactivation(codes, traces, torch.eye(12), q=1.0, top=None)
        rng, on, where = np.random.default_rng(1), (codes != 0).toarray(), np.array(traces)
        draws = []
        for _ in range(4000):
            order = np.lexsort((rng.random(400), where))
            draws.append(on.T.astype(float) @ on[order])
        mean = np.mean(draws, axis=0)
        for pair in found:
            assert pair.both == (on[:, pair.a] & on[:, pair.b]).sum()
            assert pair.expected == pytest.approx(mean[pair.a, pair.b], abs=0.15)
            assert pair.jaccard == pytest.approx(pair.both / (on[:, pair.a] | on[:, pair.b]).sum())
            assert pair.cosine == 0

    def test_nothing_fires_together(self):
        assert coactivation(sparse.csr_matrix(np.eye(20)), range(20), min_active=1) == []
        with pytest.raises(InputError, match="one each"):
            coactivation(sparse.csr_matrix(np.eye(20)), range(3))


class TestCorrelated:
    def test_equals_numpy(self, firing):
        codes, _ = firing
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.corrcoef(codes.toarray().T)[0]
        order = [i for i in np.argsort(-np.nan_to_num(r, nan=-9), kind="stable") if i not in (0, 11)][:3]
        found = correlated(codes, 0, 3)
        assert [i for i, _ in found] == order
        assert np.allclose([v for _, v in found], r[order])
        assert correlated(codes, 11) == []
        with pytest.raises(InputError, match="does not exist"):
            correlated(codes, 12)
