"""Latents are tied to labels only beyond chance within traces; lens and overlap are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import step_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch.nn.functional import normalize

from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from saes.features import (
    Activity,
    _moments,
    _sums,
    behaviours,
    encode_all,
    enrichment,
    false_discovery_rate,
    logit_lens,
    overlap,
    top_steps,
)
from saes.metrics import LinearCoder

N, M, LABELS = 600, 40, ("backtracking", "other", "reflection")


@pytest.fixture(scope="module")
def planted():
    """Latent 0 fires at reflection, 1 at backtracking, 2 at both, 3 in traces 0 to 9; the others anywhere."""
    rng = np.random.default_rng(0)
    traces = np.arange(N) // 20
    share = np.where(traces < 10, 0.5, 0.1)  # of reflection, so that a latent of those traces meets it often
    labels = np.where(rng.random(N) < share, "reflection", np.where(rng.random(N) < 0.3, "backtracking", "other"))
    dense = rng.random((N, M)) * (rng.random((N, M)) < 0.1)
    for latent, on in (
        (0, labels == "reflection"),
        (1, labels == "backtracking"),
        (2, labels != "other"),
        (3, traces < 10),
    ):
        dense[:, latent] += on * (rng.random(N) < 0.6)
    dense[:, 4] = 0
    dense[0, 4] = 1
    return sparse.csr_matrix(dense), labels.tolist(), traces.tolist()


class TestEnrichment:
    def test_finds_what_was_planted(self, planted):
        found = enrichment(*planted)
        assert found.labels == LABELS
        assert found.of("reflection") == [0, 2] or found.of("reflection") == [2, 0]
        assert set(found.of("backtracking")) == {1, 2}
        assert found.lift[0, 2] > 2
        assert np.isnan(found.q[4]).all()

    def test_a_latent_of_some_traces_is_not_one_of_their_labels(self, planted):
        codes, labels, traces = planted
        assert 3 not in enrichment(codes, labels, traces).of("reflection")
        assert 3 in enrichment(codes, labels, [0] * N).of("reflection")

    def test_behaviours_are_of_latents_with_one_label(self, planted):
        rows = torch.eye(M)
        made = behaviours(enrichment(*planted), rows)
        assert made["reflection"][0] == [0]
        assert torch.equal(made["backtracking"][1], rows[1])
        assert "other" not in made

    @pytest.mark.parametrize("seed", range(5))
    def test_shuffled_labels_find_nothing(self, planted, seed):
        codes, labels, traces = planted
        shuffled = np.random.default_rng(seed).permutation(labels).tolist()
        found = enrichment(codes, shuffled, [0] * N, seed=seed)
        assert np.nanmean(found.q <= 0.05) < 0.03

    def test_p_is_uniform_without_an_effect(self, planted):
        codes, labels, traces = planted
        shuffled = np.random.default_rng(1).permutation(labels).tolist()
        p = enrichment(codes, shuffled, [0] * N).p
        p = p[~np.isnan(p)]
        assert abs(np.mean(p <= 0.5) - 0.5) < 0.15
        assert np.mean(p <= 0.05) < 0.12

    def test_moments_are_exact(self):
        """Against all orders of the labels within two small strata."""
        from itertools import permutations, product

        rng = np.random.default_rng(0)
        a = sparse.csc_matrix(rng.random((7, 3)) * (rng.random((7, 3)) < 0.7))
        y, stratum = np.array([0, 1, 1, 0, 0, 1, 0]), np.array([0, 0, 0, 1, 1, 1, 2])
        blocks = [np.flatnonzero(stratum == s) for s in range(3)]
        sums = []
        for orders in product(*(permutations(block) for block in blocks)):
            shuffled = y.copy()
            for block, order in zip(blocks, orders):
                shuffled[block] = y[list(order)]
            sums.append(_sums(a, shuffled, 2))
        centre, scale = _moments(a, y, stratum, 2)
        np.testing.assert_allclose(centre, np.mean(sums, 0))
        np.testing.assert_allclose(scale, np.std(sums, 0))

    def test_rows_without_a_label_are_left_out(self, planted):
        codes, labels, traces = planted
        twice = sparse.vstack([codes, codes], format="csr")
        found = enrichment(twice, [*labels, *[None] * N], [*traces, *traces])
        np.testing.assert_allclose(found.z, enrichment(codes, labels, traces).z)

    def test_bad_input(self, planted):
        codes, labels, traces = planted
        with pytest.raises(InputError, match="one each"):
            enrichment(codes, labels[1:], traces)
        with pytest.raises(InputError, match="at least two"):
            enrichment(codes, ["a"] * N, traces)
        with pytest.raises(InputError, match="unknown label"):
            enrichment(codes, labels, traces).of("joy")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_rate_by_its_definition(values):
    p = np.array(values)
    q = false_discovery_rate(p)
    for level in (0.01, 0.05, 0.2, 0.5):
        ranks = [r for r in range(1, len(p) + 1) if np.sort(p)[r - 1] * len(p) / r <= level]
        cut = np.sort(p)[ranks[-1] - 1] if ranks else -1.0
        np.testing.assert_array_equal(q <= level, p <= cut)


class TestActivity:
    def test_counts(self):
        codes = sparse.csr_matrix([[0.0, 2, 0], [0, 4, 0], [1, 0, 0], [0, 0, 0]])
        found = Activity.of(codes)
        assert found.density.tolist() == [0.25, 0.5, 0]
        assert found.maximum.tolist() == [1, 4, 0]
        assert found.mean_active[:2].tolist() == [1, 3]
        assert found.mean_active[2].isnan()

    def test_top_steps(self):
        codes = sparse.csr_matrix([[0.0, 2], [3, 4], [1, 0], [3, 0]])
        records = [{"text": t} for t in "abcd"]
        assert top_steps(codes, records, 0, 2) == [(3.0, {"text": "b"}), (3.0, {"text": "d"})]
        assert [r["text"] for _, r in top_steps(codes, records, 1)] == ["b", "a"]
        with pytest.raises(InputError, match="latent 2 does not exist"):
            top_steps(codes, records, 2)

    def test_encode_all(self):
        coder = LinearCoder(torch.zeros(6), torch.eye(6), lambda c: c * (c > 0))
        x = torch.randn(50, 6)
        np.testing.assert_allclose(encode_all(coder, x, 7).todense(), x.clamp_min(0).numpy())


class TestDirections:
    def test_lens_of_an_unembedding_row_is_its_token(self):
        model, tokenizer = step_model.model(), step_model.tokenizer()
        gain = model.model.norm.weight.detach()
        rows = model.lm_head.weight.detach()[[70, 90]] / gain  # the norm multiplies by its gain
        top = logit_lens(model, tokenizer, rows, k=3)
        logits = normalize(rows, dim=-1) * gain * 4 @ model.lm_head.weight.T
        for row, found in zip(logits, top):
            values, tokens = row.topk(3)
            assert [name for name, _ in found] == [tokenizer.decode([t]) for t in tokens.tolist()]
            torch.testing.assert_close(torch.tensor([v for _, v in found]), values.detach(), rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match=r"\[n, 16\]"):
            logit_lens(model, tokenizer, torch.zeros(2, 8))

    def test_overlap(self):
        generator = torch.Generator().manual_seed(7)
        rows = normalize(torch.randn(60, 32, generator=generator), dim=-1)
        vectors = torch.stack([-3 * rows[7] + 0.1 * rows[8], torch.randn(32, generator=generator)])[:, None]
        directions = DirectionSet(("joy", "fear"), "resid_post", (4,), vectors, torch.ones(1), torch.zeros(1, 32))
        joy, fear = overlap(rows, directions, 4)
        assert joy.latents[0] == 7
        assert joy.cosines[0] < -0.99
        assert joy.p < 0.01 < fear.p
        with pytest.raises(InputError, match="unknown layer"):
            overlap(rows, directions, 3)
        with pytest.raises(InputError, match="size 8"):
            overlap(rows[:, :8], directions, 4)
