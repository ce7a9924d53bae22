"""Every number about an autoencoder against its definition, worked out another way."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from emocircuits.errors import InputError
from saes.metrics import (
    Centroids,
    LinearCoder,
    Quality,
    baselines,
    best_cosine,
    explained_variance,
    kmeans,
    matched_cosine,
    nearest_cosine,
    pca,
    probe,
    quality,
    random_sae,
    stability,
)


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class TestExplainedVariance:
    @given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 1000), st.floats(0, 3), st.floats(-100, 100))
    def test_is_one_minus_the_share_of_squares(self, n, d, seed, noise, shift):
        x = rows(n, d, seed) * torch.arange(1, d + 1) + shift
        made = x + noise * rows(n, d, seed + 1)
        mean = [sum(float(row[j]) for row in x) / n for j in range(d)]
        error = sum((float(x[i, j]) - float(made[i, j])) ** 2 for i in range(n) for j in range(d))
        total = sum((float(x[i, j]) - mean[j]) ** 2 for i in range(n) for j in range(d))
        assert explained_variance(x, made) == pytest.approx(1 - error / total, rel=1e-6, abs=1e-6)

    def test_is_not_a_mean_of_ratios(self):
        """Rows beside the mean weigh by their squares; a mean of ratios per row would say one half."""
        x = torch.tensor([[100.0, 0], [-100, 0], [0.1, 0], [-0.1, 0]])
        made = torch.tensor([[100.0, 0], [-100, 0], [0, 0], [0, 0]])
        assert explained_variance(x, made) > 0.99999

    def test_ends(self):
        x = rows(20, 3)
        assert explained_variance(x, x) == 1
        assert explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-6)
        assert math.isnan(explained_variance(torch.ones(4, 3), torch.ones(4, 3)))


class TestQuality:
    def test_counts(self):
        """Latent j of four is active at j of ten vectors, so densities, L0, dead and dense shares are known."""
        codes = torch.zeros(10, 4)
        for j in range(4):
            codes[:j, j] = 1.0
        coder = LinearCoder(torch.zeros(4), torch.eye(4), lambda c: c * (c > 0))
        found = quality(coder, codes, batch_size=3)
        assert found.density.tolist() == [0.0, 0.1, 0.2, 0.3]
        assert found.l0 == pytest.approx(0.6)
        assert found.dead == 0.25
        assert found.dense(0.1) == 0.5
        assert found.explained_variance == 1
        assert found.fvu == 0

    @given(st.lists(st.integers(0, 100), min_size=2, max_size=40))
    def test_the_histogram_holds_every_live_latent(self, counts):
        density = torch.tensor(counts, dtype=torch.float64) / 100
        found = Quality(100, 0.5, 1.0, density, torch.zeros(len(counts)))
        histogram, edges = found.histogram()
        assert histogram.sum() == sum(c > 0 for c in counts)
        assert edges[0] == -2
        assert edges[-1] == 0

    def test_batches_do_not_matter(self):
        coder, x = random_sae(rows(100, 6), 20, 3), rows(50, 6, 1)
        a, b = quality(coder, x, 7), quality(coder, x, 100)
        assert torch.equal(a.density, b.density)
        assert a.explained_variance == pytest.approx(b.explained_variance)
        assert a.explained_variance == pytest.approx(explained_variance(x, coder.decode(coder.encode(x))))

    @pytest.mark.parametrize("x", [rows(3, 5), rows(3, 4)[0], rows(0, 4), torch.full((2, 4), torch.nan)])
    def test_refuses_vectors_that_do_not_fit(self, x):
        with pytest.raises(InputError, match="from elsewhere|NaN"):
            quality(pca(rows(20, 4), 2), x)


class TestDirections:
    def test_nearest_cosine_is_of_another_row(self):
        w = rows(3000, 3)
        cosine = normalize(w) @ normalize(w).T
        cosine.fill_diagonal_(-2)
        torch.testing.assert_close(nearest_cosine(w), cosine.amax(1))
        assert nearest_cosine(rows(1, 3)).isnan().all()

    @given(st.integers(0, 100))
    def test_matching_is_the_best_permutation(self, seed):
        a, b = rows(4, 3, seed), rows(4, 3, seed + 1)
        cosine = normalize(a) @ normalize(b).T
        best = max(sum(float(cosine[i, j]) for i, j in enumerate(order)) for order in permutations(range(4)))
        assert float(matched_cosine(a, b).sum()) == pytest.approx(best, abs=1e-5)

    def test_a_shuffled_dictionary_is_the_same_one(self):
        w = rows(30, 8)
        other = 3 * w[torch.randperm(30)]
        torch.testing.assert_close(matched_cosine(w, other), torch.ones(30))
        torch.testing.assert_close(best_cosine(w[:5], other), torch.ones(5))
        found = stability([w, other, rows(30, 8, 1)])
        assert found.pairs[0, 1] == pytest.approx(1)
        assert found.pairs[0, 2] == pytest.approx(found.null, abs=0.1)
        with pytest.raises(InputError, match="at least two"):
            stability([w])


class TestBaselines:
    def test_pca_is_sklearn_s(self):
        x = rows(60, 8) @ rows(8, 8, 1)
        made = PCA(3).fit(x.numpy())
        expected = torch.from_numpy(made.inverse_transform(made.transform(x.numpy())))
        coder = pca(x, 3)
        torch.testing.assert_close(coder.decode(coder.encode(x)), expected, rtol=1e-4, atol=1e-4)

    def test_centroids_are_found(self):
        centres = 100 * rows(5, 4)
        x = (centres + rows(5, 4, 1).expand(40, 5, 4) * 0.1).reshape(-1, 4)
        found = quality(kmeans(x, 5), x)
        assert found.explained_variance > 0.99
        assert found.l0 == 1
        assert torch.equal(Centroids(centres).encode(centres), torch.eye(5))

    def test_the_random_sae_is_sparse_and_better_than_nothing(self):
        x = rows(500, 16)
        found = quality(random_sae(x, 64, 4), x)
        assert 3 < found.l0 <= 4
        assert 0 < found.explained_variance < quality(pca(x, 16), x).explained_variance

    def test_all_at_once(self):
        found = baselines(rows(200, 8), rows(50, 8, 1), width=16, k=2)
        assert len(found) == 3
        assert all(q.explained_variance < 1 for q in found.values())


class TestProbe:
    def test_finds_what_is_there(self):
        """The label is one feature; a probe of that one feature does as well as a dense one, noise labels do not."""
        x = rows(400, 10)
        labels = ["joy" if value > 0 else None for value in x[:, 3]]
        train, test = np.arange(300), np.arange(300, 400)
        assert probe(x, labels, train, test)["joy"] > 0.95
        assert probe(x, labels, train, test, k=1)["joy"] == 1
        noise = [("a", "b")[i] for i in torch.randint(2, (400,), generator=torch.Generator().manual_seed(0))]
        assert 0.3 < probe(x, noise, train, test)["a"] < 0.7

    def test_a_label_missing_from_a_split_is_undefined(self):
        assert math.isnan(probe(rows(10, 2), ["a"] * 5 + [None] * 5, np.arange(5), np.arange(5, 10))["a"])
