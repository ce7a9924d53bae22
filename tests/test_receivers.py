"""Attention between steps equals matrices written out, and a planted receiver head is found from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from attention_oracle import Largest, explicit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from organisms import receiver
from scipy.stats import kurtosis as scipy_kurtosis
from scipy.stats import rankdata

from emocircuits.activations import attention, rows
from emocircuits.errors import HookError, InputError
from emocircuits.reasoning.receivers import (
    agreement,
    attention_blocks,
    kurtosis,
    mean_map,
    receiver_heads,
    receiver_scores,
    split_half,
    vertical_scores,
)

BOUNDS = (2, 6, 6, 13, 14, 21, 30)  # step 1 has no token, step 3 has one, token 30 and later belong to no step
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox", "mixtral"]


def text(name: str, length: int = 33) -> torch.Tensor:
    return zoo.inputs(name, zoo.build(name), batch=1, length=length)["input_ids"]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_equal_written_out_attention(name: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build(name), text(name)
    if few:
        monkeypatch.setattr(rows, "CELLS", 4 * 33 * 5)
    blocks = attention_blocks(model, ids, BOUNDS)
    _, matrices = explicit(model, ids)
    assert blocks.shape == (4, 4, 6, 6)
    for layer, matrix in enumerate(matrices):
        for i in range(6):
            for j in range(6):
                part = matrix[:, BOUNDS[i] : BOUNDS[i + 1], BOUNDS[j] : BOUNDS[j + 1]]
                expected = part.mean((1, 2)).float()  # NaN for the empty step
                torch.testing.assert_close(blocks[layer, :, i, j], expected, atol=1e-5, rtol=1e-4, equal_nan=True)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8), st.integers(0, 4))
@settings(max_examples=15)
def test_what_a_step_attends_to_adds_up(sizes: list[int], start: int) -> None:
    assume(sum(sizes))
    model = zoo.TEXT["gemma3_text"]()
    bounds = [start + sum(sizes[:i]) for i in range(len(sizes) + 1)]
    ids = text("gemma3_text", max(bounds[-1], 2))
    mass = attention_blocks(model, ids, bounds) * torch.tensor(sizes)
    total = mass.nansum(-1)[..., torch.tensor(sizes) > 0]
    assert bool((total <= 1 + 1e-5).all())
    if start == 0:  # no token before the steps, so nothing else can be attended to
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_hybrid_model_has_nan_where_it_has_no_softmax_attention() -> None:
    model = zoo.build("minicpmv4_6")
    blocks = attention_blocks(model, text("minicpmv4_6"), BOUNDS)
    assert blocks[0].isnan().all()
    assert not blocks[3, :, 0, 0].isnan().any()


def test_the_pass_is_the_models_own_and_ends_at_the_last_attention() -> None:
    model, ids = zoo.build("llama"), text("llama")
    entering: list[torch.Tensor] = []
    ran: list[str] = []
    block = model.model.layers[3]
    block.register_forward_pre_hook(lambda _, args, kwargs: entering.append(args[0]), with_kwargs=True)
    block.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    attention_blocks(model, ids, (2, 6, 33))
    assert ran == []
    model(input_ids=ids, use_cache=False)
    assert ran == ["mlp", "lm_head"]
    assert torch.equal(*entering)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_no_matrix_of_all_heads_is_ever_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads = 200, 4
    monkeypatch.setattr(rows, "CELLS", heads * length * 10)
    model, ids = zoo.build(name), text(name, length)
    with Largest() as largest:
        attention_blocks(model, ids, (0, 50, 100, 150, length))
    assert largest.numel <= length**2  # the mask that some models make for themselves


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("qwen3"), text("qwen3")
    before = model(input_ids=ids).logits

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr("emocircuits.reasoning.receivers.by_queries", broken)
    with pytest.raises(error):
        attention_blocks(model, ids, BOUNDS)
    assert attention._HANDLERS == {}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 40), "at least 2"),
        ((0, 10, 50), "33 tokens"),
        ((0, 20, 10), "must rise"),
        ((-1, 10, 20), "must rise"),
        ((), "0 step"),
        ((4, 4, 4), "no step has a token"),
    ],
)
def test_bounds_that_do_not_fit(bounds: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attention_blocks(zoo.build("llama"), text("llama"), bounds)


def test_models_and_texts_that_cannot_be_read() -> None:
    model, ids = zoo.build("llama"), text("llama")
    with pytest.raises(InputError, match="one text"):
        attention_blocks(model, torch.cat([ids, ids]), BOUNDS)
    with pytest.raises(InputError, match="training mode"):
        attention_blocks(model.train(), ids, BOUNDS)
    model.eval().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(HookError, match="sdpa"):
        attention_blocks(model, ids, BOUNDS)
    hybrid = zoo.build("minicpmv4_6")
    with pytest.raises(HookError, match="layer 0 .* no softmax attention"):
        rows.read_attention(hybrid, ids, lambda _: None, [0])


# ---------------------------------------------------------------- scores


def random_blocks(n: int, seed: int, holes: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 6, (2, 3, n, n), generator=generator).float()  # few values, so that some are equal
    if holes:
        hole = int(torch.randint(n, (1,), generator=generator))
        blocks[..., hole, :] = blocks[..., hole] = torch.nan
    return blocks


@given(st.integers(2, 9), st.integers(1, 5), st.booleans(), st.sampled_from(["mean", "median"]), st.integers(0, 99))
def test_vertical_scores_equal_loops(n: int, p: int, rank: bool, reduce: str, seed: int) -> None:
    blocks = random_blocks(n, seed, holes=seed % 2 == 0)
    scores = vertical_scores(blocks, p, rank, reduce)
    for index in np.ndindex(2, 3):
        matrix = blocks[index].double().numpy()
        made = np.full((n, n), np.nan)
        for i in range(n):
            valid = [j for j in range(n) if i - j >= p and not np.isnan(matrix[i, j])]
            values = matrix[i, valid]
            made[i, valid] = rankdata(values) / len(valid) if rank and valid else values
        for j in range(n):
            column = made[:, j][~np.isnan(made[:, j])]
            expected = getattr(np, reduce)(column) if len(column) else np.nan
            np.testing.assert_allclose(float(scores[index][j]), expected, rtol=1e-12)
    assert scores[..., max(n - p, 0) :].isnan().all()


@given(st.lists(st.floats(-5, 5) | st.just(float("nan")), min_size=0, max_size=12))
def test_kurtosis_equals_scipy(values: list[float]) -> None:
    x = np.array(values)
    kept = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        expected = scipy_kurtosis(kept) if len(kept) > 1 and kept.std() > 1e-6 else None
    found = float(kurtosis(torch.tensor(values, dtype=torch.float64)[None, None])[0, 0])
    if expected is not None:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    elif len(set(kept)) < 2:
        assert np.isnan(found)


def test_receiver_heads_are_those_of_greatest_mean_kurtosis_behind_the_first_layer() -> None:
    nan = torch.nan
    maps = [torch.tensor([[9.0, 9.0], [1.0, 4.0], [nan, 2.0]]), torch.tensor([[9.0, 9.0], [3.0, 4.0], [5.0, nan]])]
    assert receiver_heads(maps, 4) == [(2, 0), (1, 1), (1, 0), (2, 1)]
    assert receiver_heads(maps, 1, skip_layers=0) == [(0, 0)]
    with pytest.raises(InputError, match="4 heads have a kurtosis"):
        receiver_heads(maps, 5)
    with pytest.raises(InputError, match="no kurtosis map"):
        receiver_heads([], 1)
    scores = torch.tensor([[[0.0, 0.0, nan]], [[1.0, nan, nan]], [[3.0, 5.0, nan]]])
    found = receiver_scores(scores, [(1, 0), (2, 0)])
    torch.testing.assert_close(found, torch.tensor([2.0, 5.0, nan]), equal_nan=True)
    with pytest.raises(InputError, match="no receiver head"):
        receiver_scores(scores, [])


def test_split_half_is_high_for_heads_that_stay_and_low_for_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    stable, noise = torch.randn(6, 8, generator=generator), torch.randn(10, 6, 8, generator=generator)
    assert float(split_half(stable + 0.3 * noise).median()) > 0.9
    assert abs(float(split_half(noise).mean())) < 0.4
    assert torch.equal(split_half(noise, seed=3), split_half(noise, seed=3))
    assert split_half(torch.ones(4, 6, 8)).isnan().all()
    with pytest.raises(InputError, match="at least two traces"):
        split_half(noise[:1])


@given(st.integers(0, 99))
def test_agreement_equals_a_loop_over_pairs(seed: int) -> None:
    scores = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(seed))
    scores[..., -3:] = torch.nan
    scores[2, 3] = torch.nan  # of a layer without attention
    heads = [(1, 0), (1, 2), (2, 1)]
    every = [(layer, head) for layer in (1, 2) for head in range(4) if (layer, head) != (2, 3)]
    for found, chosen in zip(agreement(scores, heads), (heads, every)):
        pairs = [
            np.corrcoef(scores[a][:-3], scores[b][:-3])[0, 1] for i, a in enumerate(chosen) for b in chosen[i + 1 :]
        ]
        assert found == pytest.approx(float(np.mean(pairs)), abs=1e-6)
    assert np.isnan(agreement(scores, heads[:1])[0])


# ---------------------------------------------------------------- a planted receiver head


def test_the_planted_receiver_head_and_its_step_are_found() -> None:
    made = receiver()
    maps, scores = [], []
    for seed in range(4):
        ids, bounds = made.trace(seed)
        scores.append(vertical_scores(attention_blocks(made.model, ids, bounds)))
        maps.append(kurtosis(scores[-1]))
    assert receiver_heads(maps, 1) == [made.head]
    mean = mean_map(maps, skip_layers=1)
    others = mean.flatten()[[i for i in range(mean.numel()) if divmod(i, mean.shape[1]) != made.head]]
    assert float(mean[made.head]) > float(others.nan_to_num(-3).max()) + 1
    for score in scores:
        assert int(receiver_scores(score, [made.head]).nan_to_num(-1).argmax()) == made.step
