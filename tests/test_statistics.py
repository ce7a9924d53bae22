"""Intervals, tests and scores against brute force, scikit-learn and simulated truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from emocircuits.errors import InputError
from emocircuits.evaluation import statistics
from emocircuits.evaluation.statistics import (
    accuracy,
    auroc,
    auroc_per_class,
    clustered_bootstrap,
    holm,
    mean,
    newcombe,
    paired_test,
    wilson,
)


def clustered_sample(rng, n_clusters=40, per_cluster=6, spread=1.0):
    """Rows that share a cluster effect: the truth (mean 0) is blurred mostly between clusters."""
    clusters = np.repeat(np.arange(n_clusters), per_cluster)
    effects = rng.normal(0, spread, n_clusters)
    return effects[clusters] + rng.normal(0, 0.5, len(clusters)), clusters


class TestClusteredBootstrap:
    def test_vectorised_mean_agrees_with_resampling_rows(self):
        values, clusters = clustered_sample(np.random.default_rng(0), n_clusters=25)
        fast = clustered_bootstrap(values, clusters, n_boot=8000)
        slow = clustered_bootstrap(values, clusters, statistic=lambda v: float(np.mean(v)), n_boot=8000)
        assert fast.estimate == slow.estimate == pytest.approx(values.mean())
        width = slow.high - slow.low
        assert abs(fast.low - slow.low) < 0.06 * width
        assert abs(fast.high - slow.high) < 0.06 * width

    def test_unequal_clusters_match_the_exact_bootstrap_distribution(self):
        values, clusters = np.array([1.0, 2.0, 3.0, 10.0, -4.0, 0.5]), ["a", "a", "a", "b", "c", "c"]
        groups = [values[:3], values[3:4], values[4:]]
        exact = [np.concatenate([groups[i] for i in pick]).mean() for pick in itertools.product(range(3), repeat=3)]
        draws = statistics._bootstrap_means(values, np.array([0, 0, 0, 1, 2, 2]), 3, 200_000, np.random.default_rng(0))
        assert draws.mean() == pytest.approx(np.mean(exact), abs=0.02)
        assert draws.std() == pytest.approx(np.std(exact), abs=0.02)
        assert clustered_bootstrap(values, clusters).n_clusters == 3

    def test_covers_the_truth_about_as_often_as_it_claims_and_naive_rows_do_not(self):
        rng = np.random.default_rng(1)
        hits = naive = 0
        for trial in range(300):
            values, clusters = clustered_sample(rng)
            interval = clustered_bootstrap(values, clusters, n_boot=400, seed=trial)
            rows = clustered_bootstrap(values, np.arange(len(values)), n_boot=400, seed=trial)
            hits += interval.low <= 0 <= interval.high
            naive += rows.low <= 0 <= rows.high
        assert 0.90 <= hits / 300 <= 0.98
        assert naive / 300 < 0.75

    def test_more_confidence_is_wider_and_seed_decides(self):
        values, clusters = clustered_sample(np.random.default_rng(2))
        narrow, wide = (clustered_bootstrap(values, clusters, confidence=c) for c in (0.8, 0.99))
        assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
        assert clustered_bootstrap(values, clusters, seed=3) == clustered_bootstrap(values, clusters, seed=3)
        assert clustered_bootstrap(values, clusters, seed=3) != clustered_bootstrap(values, clusters, seed=4)

    def test_statistic_of_two_columns(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 200)
        table = np.column_stack([labels + rng.normal(0, 1, 200), labels])
        got = clustered_bootstrap(table, np.repeat(np.arange(50), 4), lambda t: auroc(t[:, 0], t[:, 1]), n_boot=200)
        assert got.low < got.estimate == auroc(table[:, 0], labels) < got.high

    @pytest.mark.parametrize(
        ("values", "clusters", "reason", "estimate"),
        [
            ([1.0, 2.0], ["a", "a"], "2 clusters", 1.5),
            ([], [], "no values", math.nan),
            ([1.0, math.nan], [0, 1], "1 of 2 values", math.nan),
            ([1.0, math.inf], [0, 1], "1 of 2 values", math.nan),
        ],
    )
    def test_undefined_is_nan_with_a_reason(self, values, clusters, reason, estimate):
        got = clustered_bootstrap(values, clusters)
        assert math.isnan(got.low)
        assert math.isnan(got.high)
        assert not got.defined
        assert reason in got.reason
        assert reason in str(got)
        np.testing.assert_equal(got.estimate, estimate)

    def test_a_statistic_often_undefined_under_resampling_has_no_interval(self):
        table = np.array([[0.1, 0], [0.9, 1], [0.8, 1]])
        got = clustered_bootstrap(table, [0, 1, 2], lambda t: auroc(t[:, 0], t[:, 1]), n_boot=300)
        assert got.estimate == 1.0
        assert math.isnan(got.low)
        assert "of the resamples" in got.reason

    def test_booleans_and_tuple_clusters(self):
        got = clustered_bootstrap([True, False, True, True], [("work", 0), ("work", 1), ("home", 0), ("home", 0)])
        assert (got.estimate, got.n, got.n_clusters) == (0.75, 4, 3)

    def test_bad_input(self):
        with pytest.raises(InputError, match="3 cluster labels for 2 values"):
            clustered_bootstrap([1, 2], [0, 1, 2])
        with pytest.raises(InputError, match="confidence"):
            clustered_bootstrap([1, 2], [0, 1], confidence=95)
        with pytest.raises(InputError, match="n_boot"):
            clustered_bootstrap([1, 2], [0, 1], n_boot=0)

    def test_block_size_does_not_change_the_result(self, monkeypatch):
        values, clusters = clustered_sample(np.random.default_rng(0), n_clusters=15)
        whole = clustered_bootstrap(values, clusters), paired_test(values, values / 2, clusters, n_perm=999)
        monkeypatch.setattr(statistics, "_CELLS_AT_ONCE", 100)
        assert clustered_bootstrap(values, clusters) == whole[0]
        assert paired_test(values, values / 2, clusters, n_perm=999) == whole[1]


class TestPairedTest:
    def test_exact_p_matches_brute_force(self):
        rng = np.random.default_rng(0)
        clusters = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
        a, b = rng.normal(0.6, 1, 10), rng.normal(0, 1, 10)
        observed = abs((a - b).sum())
        flips = [abs(((a - b) * np.array(signs)[clusters]).sum()) for signs in itertools.product([1, -1], repeat=6)]
        brute = sum(f >= observed - 1e-9 for f in flips) / 64
        got = paired_test(a, b, clusters)
        assert got.p == brute
        assert got.n_perm == 64
        assert got.difference.estimate == pytest.approx(a.mean() - b.mean())

    def test_sampled_p_agrees_with_exact_p(self):
        rng = np.random.default_rng(1)
        clusters = np.repeat(np.arange(12), 2)
        a, b = rng.normal(0.4, 1, 24), rng.normal(0, 1, 24)
        exact, sampled = paired_test(a, b, clusters), paired_test(a, b, clusters, n_perm=4000)
        assert (exact.n_perm, sampled.n_perm) == (4096, 4000)
        assert sampled.p == pytest.approx(exact.p, abs=0.03)

    def test_p_is_never_zero_and_a_clear_effect_is_found(self):
        a, b = np.ones(100), np.zeros(100)
        assert paired_test(a, b, np.arange(100), n_perm=500).p == 1 / 501

    def test_no_difference_gives_one(self):
        assert paired_test([1, 2, 3], [1, 2, 3], [0, 1, 2]).p == 1.0

    def test_false_alarms_stay_at_their_level_under_cluster_effects(self):
        rng = np.random.default_rng(5)
        alarms = 0
        for trial in range(300):
            values, clusters = clustered_sample(rng, n_clusters=14)
            alarms += paired_test(values, np.zeros_like(values), clusters, n_perm=400, seed=trial).p <= 0.05
        assert alarms / 300 <= 0.09

    def test_swapping_the_sides_flips_the_difference_only(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=30), rng.normal(size=30)
        one, two = paired_test(a, b, np.arange(30)), paired_test(b, a, np.arange(30))
        assert one.p == two.p
        assert one.difference.estimate == pytest.approx(-two.difference.estimate)

    def test_one_cluster_is_undefined_and_lengths_must_match(self):
        got = paired_test([1, 2], [0, 0], ["x", "x"])
        assert math.isnan(got.p)
        assert "2 clusters" in got.reason
        with pytest.raises(InputError, match="paired"):
            paired_test([1, 2], [1], [0, 0])


class TestAuroc:
    @given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
    def test_matches_scikit_learn_with_ties(self, rows):
        scores, labels = [float(s) for s, _ in rows], [y for _, y in rows]
        if len(set(labels)) == 1:
            assert math.isnan(auroc(scores, labels))
        else:
            assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))

    def test_matches_counting_pairs(self):
        rng = np.random.default_rng(0)
        s, y = rng.integers(0, 4, 50).astype(float), rng.integers(0, 2, 50)
        pairs = [(p > q) + 0.5 * (p == q) for p in s[y == 1] for q in s[y == 0]]
        assert auroc(s, y) == pytest.approx(np.mean(pairs))

    @settings(max_examples=30)
    @given(st.integers(0, 10_000))
    def test_macro_matches_scikit_learn(self, seed):
        rng = np.random.default_rng(seed)
        scores = rng.dirichlet(np.ones(4), 40).round(2)
        scores[:, 3] = 1 - scores[:, :3].sum(1)
        labels = np.concatenate([np.arange(4), rng.integers(0, 4, 36)])
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))

    def test_an_absent_class_is_nan_not_left_out(self):
        scores = np.random.default_rng(0).normal(size=(20, 3))
        labels = np.arange(20) % 2
        assert math.isnan(auroc(scores, labels))
        np.testing.assert_array_equal(np.isnan(auroc_per_class(scores, labels)), [False, False, True])

    def test_nan_scores_are_undefined(self):
        assert math.isnan(auroc([0.1, math.nan, 0.3], [0, 1, 1]))

    def test_bad_labels_and_shapes(self):
        with pytest.raises(InputError, match="0 to 1"):
            auroc([0.1, 0.2], [1, 2])
        with pytest.raises(InputError, match="0 to 1"):
            auroc([0.1, 0.2], ["anger", "fear"])
        with pytest.raises(InputError, match="do not fit"):
            auroc([0.1, 0.2], [1])
        with pytest.raises(InputError, match="2 classes"):
            auroc_per_class([[0.1], [0.2]], [0, 0])


class TestProportions:
    def test_accuracy_counts_unparseable_as_wrong(self):
        assert accuracy(["anger", None, "fear", "fear"], ["anger", "anger", "fear", "joy"]) == 0.5
        assert accuracy([None], [None]) == 0.0
        assert math.isnan(accuracy([], []))
        with pytest.raises(InputError, match="1 predictions for 2"):
            accuracy(["a"], ["a", "b"])

    def test_wilson_published_values(self):
        got = wilson(2847, 2880)
        assert (round(got.low, 4), round(got.high, 4)) == (0.9840, 0.9918)
        half = wilson(5, 10)
        assert (round(half.low, 3), round(half.high, 3)) == (0.237, 0.763)

    @given(st.integers(1, 500), st.data())
    def test_wilson_solves_the_score_equation(self, n, data):
        k = data.draw(st.integers(0, n))
        got = wilson(k, n)
        assert 0 <= got.low <= got.estimate <= got.high <= 1
        for bound in (got.low, got.high):
            if 0 < bound < 1:
                assert abs(k / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-4)

    def test_wilson_edges(self):
        assert wilson(0, 20).low == 0.0
        assert wilson(20, 20).high == 1.0
        assert wilson(0, 0).reason == "no trials"
        with pytest.raises(InputError, match="between 0 and n"):
            wilson(3, 2)


class TestNewcombe:
    @pytest.mark.parametrize(
        ("a", "b", "low", "high"),
        [
            ((56, 70), (48, 80), 0.0524, 0.3339),
            ((9, 10), (3, 10), 0.1705, 0.8090),
            ((5, 56), (0, 29), -0.0381, 0.1926),
            ((0, 10), (0, 10), -0.2775, 0.2775),
            ((10, 10), (0, 10), 0.6075, 1.0),
        ],
    )
    def test_published_values(self, a, b, low, high):
        got = newcombe(wilson(*a), wilson(*b))
        assert (round(got.low, 4), round(got.high, 4)) == (low, high)
        assert got.estimate == pytest.approx(a[0] / a[1] - b[0] / b[1])
        swapped = newcombe(wilson(*b), wilson(*a))
        assert (swapped.low, swapped.high) == pytest.approx((-got.high, -got.low))

    def test_covers_the_true_difference_as_often_as_promised(self):
        rng = np.random.default_rng(0)
        a, b = rng.binomial(30, 0.7, 1500), rng.binomial(20, 0.4, 1500)
        intervals = [newcombe(wilson(int(x), 30, 0.9), wilson(int(y), 20, 0.9)) for x, y in zip(a, b)]
        assert 0.87 < np.mean([i.low <= 0.3 <= i.high for i in intervals]) < 0.94
        assert intervals[0].confidence == 0.9

    def test_no_trials_on_one_side_is_undefined_and_says_so(self):
        got = newcombe(wilson(1, 2), wilson(0, 0))
        assert not got.defined
        assert math.isnan(got.estimate)
        assert got.reason == "no trials"


class TestHolm:
    def test_worked_example(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_matches_the_step_down_definition(self, pvalues):
        adjusted = holm(pvalues)
        m = len(pvalues)
        order = sorted(range(m), key=lambda i: pvalues[i])
        for place, i in enumerate(order):
            want = max(min(1.0, (m - j) * pvalues[order[j]]) for j in range(place + 1))
            assert adjusted[i] == pytest.approx(want)
        assert (adjusted >= np.array(pvalues)).all()

    def test_missing_tests_do_not_count(self):
        np.testing.assert_allclose(holm([0.02, math.nan, 0.03]), [0.04, math.nan, 0.04])
        assert holm([]).shape == (0,)
        with pytest.raises(InputError, match="between 0 and 1"):
            holm([1.2])


def test_default_statistic_is_the_public_mean():
    assert mean(np.array([1, 2, 6])) == 3.0
