"""Coverage and entropy of tagged latents equal a count by hand, and what length alone does is no diversity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from emocircuits.errors import InputError
from saes.contexts import ChatRater, contexts, onset_share
from saes.diversity import diversity, diversity_effect, matched_sets
from saes.features import Activity
from saes.metrics import LinearCoder


def coder(m: int) -> LinearCoder:
    """A dictionary of m orthogonal rows: any latent may stand beside any other."""
    return LinearCoder(torch.zeros(m), torch.eye(m), lambda c: c)


def rows(lengths: list[int], density: float = 0.05, m: int = 60, seed: int = 0) -> tuple[Any, list[dict[str, Any]]]:
    """Traces of so many rows in which latents fire at random, all alike."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    codes = sparse.csr_matrix(rng.random((n, m)) * (rng.random((n, m)) < density))
    return codes, [{"trace": f"t{i:03}"} for i, length in enumerate(lengths) for _ in range(length)]


def test_coverage_and_entropy_by_hand() -> None:
    codes = sparse.csr_matrix([[1.0, 0, 2, 9], [0, 0, 1, 0], [4, 0, 0, 1], [0, 0, 0, 1]])
    records = [{"trace": t} for t in "aabc"]
    found = diversity(codes, records, [0, 1, 2], coder(4), sets=0)
    assert found.traces == ("a", "b", "c")
    assert found.length.tolist() == [2, 1, 1]
    assert found.tagged == (0, 2)  # latent 1 fires nowhere
    assert found.coverage.tolist() == [2, 1, 0]
    q = np.array([0.25, 0.75])
    assert found.entropy[0] == pytest.approx(-(q * np.log(q)).sum())
    assert found.entropy[1] == 0
    assert math.isnan(found.entropy[2])
    assert np.isnan(found.excess("coverage")).all()  # without matched sets there is nothing to exceed


def test_the_order_of_rows_and_their_scale_do_not_matter() -> None:
    codes, records = rows([5, 9, 3])
    tagged = list(range(20))
    found = diversity(codes, records, tagged, coder(60), sets=3)
    order = np.random.default_rng(1).permutation(len(records))
    again = diversity(codes[order] * 7, [records[i] for i in order], tagged, coder(60), sets=3)
    np.testing.assert_allclose(found.coverage, again.coverage)
    np.testing.assert_allclose(found.entropy, again.entropy)
    assert (found.entropy <= np.log(found.coverage) + 1e-12).all()


def test_matched_sets_are_of_other_latents_once_each_and_alike() -> None:
    codes, _ = rows([400], m=90)
    codes = codes.multiply(np.where(np.arange(90) % 3 == 0, 10.0, 1.0)).tocsr()  # a third is ten times as strong
    activity, tagged = Activity.of(codes), [0, 3, 6, 1, 4]
    made = matched_sets(coder(90), activity, tagged, 6, seed=3)
    assert made == matched_sets(coder(90), activity, tagged, 6, seed=3) != matched_sets(coder(90), activity, tagged, 6)
    for chosen in made:
        assert len(set(chosen)) == len(tagged)
        assert not set(chosen) & set(tagged)
        assert sum(i % 3 == 0 for i in chosen) == 3


def test_longer_traces_cover_more_but_no_more_than_matched_latents() -> None:
    rng = np.random.default_rng(0)
    problems = {f"t{i:03}": i // 2 for i in range(120)}
    groups = {trace: int(trace[-1]) % 2 for trace in problems}
    lengths = [int(20 * (1 + 2 * (i % 2)) * rng.uniform(0.5, 1.5)) for i in range(120)]
    codes, records = rows(lengths, density=0.01)
    found = diversity(codes, records, list(range(20)), coder(60), sets=8)
    group = np.array([groups[t] for t in found.traces])
    assert found.coverage[group == 1].mean() > found.coverage[group == 0].mean() + 3  # length alone
    for measure in ("coverage", "entropy"):
        effect = diversity_effect(found, measure, groups, problems)
        assert effect.low < 0 < effect.high
    # planted: in group 1, five more of the tagged latents take part
    extra = np.zeros(codes.shape)
    first = {t: i for i, t in reversed(list(enumerate(r["trace"] for r in records)))}
    for trace, row in first.items():
        extra[row, 15:20] = groups[trace]
    more = diversity((codes + sparse.csr_matrix(extra)).tocsr(), records, list(range(20)), coder(60), sets=8)
    effect = diversity_effect(more, "coverage", groups, problems)
    assert effect.low > 0
    assert effect.estimate > 1.5


def test_what_cannot_be_measured_is_refused() -> None:
    codes, records = rows([4, 4], density=0.5, m=6)
    for tagged, message in (([6], "latent 6 does not exist"), ([0, 1, 2, 3], "too few to match each")):
        with pytest.raises(InputError, match=message):
            diversity(codes, records, tagged, coder(6))
    with pytest.raises(InputError, match="one for each"):
        diversity(codes, records[1:], [0], coder(6))
    with pytest.raises(InputError, match="negative"):
        diversity(-codes, records, [0], coder(6))
    with pytest.raises(InputError, match="none of the tagged"):
        diversity(sparse.csr_matrix((8, 6)), records, [0], coder(6))
    found = diversity(codes, records, [0], coder(6), sets=1)
    with pytest.raises(InputError, match="'t000' has no group"):
        diversity_effect(found, "coverage", {}, {})
    with pytest.raises(InputError, match="unknown measure 'spread'"):
        found.excess("spread")


# ---- where latents fire


def sentences() -> tuple[Any, list[dict[str, Any]]]:
    """Two sentences of six tokens each; latent 0 fires at their first tokens, 1 at the last ones, 2 nowhere."""
    records = [
        {"trace": "t", "step": s, "token": 3 + 6 * s + k, "text": ("Oh, really?", "It is twelve.")[s]}
        for s in range(2)
        for k in range(6)
    ]
    dense = np.zeros((12, 3))
    dense[[0, 6], 0], dense[[0, 4, 5, 10, 11], 1] = (1, 2), 1
    return sparse.csr_matrix(dense), records


def test_onsets_are_counted_within_sentences() -> None:
    codes, records = sentences()
    share, base = onset_share(codes, records)
    assert share[:2].tolist() == [1, 0.2]
    assert math.isnan(share[2])
    assert base == pytest.approx(8 / 12)
    assert onset_share(codes, records, first=6)[0][1] == 1
    with pytest.raises(InputError, match='reduce="all"'):
        onset_share(codes[[0, 6]], [records[0], records[6]])


def test_a_judge_rates_the_strongest_contexts(endpoint: Any) -> None:
    codes, records = sentences()
    replies = iter(['{"0": false}', '```{"0": true}```', '{"0": "maybe"}', "no"])
    endpoint.answer = lambda _body: (200, next(replies))
    rater = ChatRater(endpoint.url, "m", size=1)
    start, end, silent = contexts(codes, records, [0, 1, 2], rater)
    assert (start.onset, start.ratio, start.rated, start.selected) == (1, 0.5, 2, False)
    assert (end.rated, end.unusable, end.reason) == (0, 2, "no context could be rated")
    assert math.isnan(end.ratio)
    assert silent.reason == "it fires nowhere"
    endpoint.answer = lambda _body: (200, '{"0": true, "1": true}')
    (found,) = contexts(codes, records, [0], ChatRater(endpoint.url, "m"))
    assert (found.ratio, found.rated, found.selected) == (1, 2, True)
    with pytest.raises(InputError, match="latent 9 does not exist"):
        contexts(codes, records, [0, 9], rater)
