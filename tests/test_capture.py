"""Batches equal single rows, nothing runs that nobody reads, and nothing stays on the model."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from oracle import read, traces
from torch.multiprocessing.reductions import StorageWeakRef

from emocircuits.activations import Ablate, Moments, Scale, batches, capture, edit, record
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve

SITES = ["resid_post", "mlp_out", "z"]
PADDED = ["llama", "gpt2", "gemma3_text", "mistral", "gpt_neox", "phi3", "qwen3_moe"]


def alone(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row][real][None]}


# ---------------------------------------------------------------- batches and positions


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_a_batch_equals_its_rows(name: str, padding: Any) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, batch=3, padding=padding)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    assert len(set(lengths)) == 3, "the batch must really be padded"
    per_row = torch.tensor([[0, n - 1, -n] for n in lengths])
    for positions in ("last", 0, 3, -1, -2, [0, 2], [-1, 1, 1], per_row):
        together = capture(model, inputs, SITES, positions=positions)
        for row in range(3):
            own = positions[row : row + 1] if isinstance(positions, torch.Tensor) else positions
            single = capture(model, alone(inputs, row), SITES, positions=own)
            for key in together:
                torch.testing.assert_close(together[key][row], single[key][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_span_means_equal_means_of_the_single_row(name: str, padding: Any) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, batch=3, padding=padding)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    one_each = [(1, n) for n in lengths]
    ragged = [[(0, 2), (2, 4)], [(1, 3)], [(0, 1), (1, 2), (2, 5)]]
    means = capture(model, inputs, SITES, positions=one_each, reduce="mean")
    several = capture(model, inputs, SITES, positions=ragged, reduce="mean")
    whole = capture(model, inputs, SITES, positions="all", reduce="mean")
    for row, length in enumerate(lengths):
        single = capture(model, alone(inputs, row), SITES, positions="all")
        for key, value in single.items():
            torch.testing.assert_close(means[key][row], value[0, 1:length].mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(whole[key][row], value[0].mean(0), atol=1e-5, rtol=1e-4)
            for slot, (start, stop) in enumerate(ragged[row]):
                torch.testing.assert_close(several[key][row, slot], value[0, start:stop].mean(0), atol=1e-5, rtol=1e-4)
    assert several.valid is not None
    assert several.valid.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert several["resid_post", 2].isnan().any(-1).equal(~several.valid), "an absent span is NaN, never zero"


def test_all_positions_say_which_are_real() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, padding="left")
    acts = capture(model, inputs, "resid_post", 1, positions="all")
    assert acts.valid is not None
    assert acts.valid.equal(inputs["attention_mask"].bool())
    expected = capture(model, alone(inputs, 1), "resid_post", 1, positions="all")["resid_post", 1][0]
    torch.testing.assert_close(acts["resid_post", 1][1][acts.valid[1]], expected, atol=1e-5, rtol=1e-4)


def test_means_are_not_rounded_weights_in_half_precision() -> None:
    model = zoo.build("llama").bfloat16()
    inputs = zoo.inputs("llama", model)
    mean = capture(model, inputs, "resid_post", 2, positions=[(0, 7)] * 2, reduce="mean")["resid_post", 2]
    tokens = capture(model, inputs, "resid_post", 2, positions="all")["resid_post", 2][:, :7]
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, tokens.float().mean(1).bfloat16())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "mistral", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_patterns_equal_eager_attention_and_leave_the_kernel_alone(name: str, padding: Any) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, padding=padding)
    if name == "gpt2":  # transformers does not derive learned positions from the padding; capture does
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    real = inputs["attention_mask"].bool()
    expected, before = read(model, inputs), model.config._attn_implementation
    with torch.no_grad():
        clean = model(**inputs).logits
        with record(model, "pattern") as steps, record(model, "pattern", 2) as nested:
            assert torch.equal(model(**inputs).logits, clean)
    acts = capture(model, inputs, "pattern")
    for layer in range(4):
        for weights in (steps[0]["pattern", layer], acts["pattern", layer]):
            a, b = (w.transpose(1, 2)[real] for w in (weights, expected["pattern", layer]))
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert torch.equal(nested[0]["pattern", 2], steps[0]["pattern", 2])
    assert model.config._attn_implementation == before


def test_attention_sinks_take_their_share() -> None:
    from emocircuits.activations.attention import Call, probabilities

    q, k, sinks = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(4)
    found = probabilities(Call(0, torch.nn.Identity(), q, k, k, None, {"s_aux": sinks}))
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + torch.full((5, 5), -torch.inf).triu(1)
    expected = scores.exp() / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [n for n in zoo.MULTIMODAL if n in zoo.ONE_STREAM])
def test_pictures_and_sound_reach_every_position_they_should(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.multimodal_inputs(name, model)
    expected = read(model, inputs)
    acts = capture(model, inputs, ["resid_pre", "resid_post"], positions="all")
    for key, value in acts.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-4)
    feature = next(key for key, value in inputs.items() if value.is_floating_point())
    other = capture(model, {**inputs, feature: inputs[feature] + 1}, "resid_pre", 0, positions="all")
    moved = (other["resid_pre", 0] - acts["resid_pre", 0]).abs().amax(-1) > 1e-4
    placeholders = torch.isin(inputs["input_ids"], torch.tensor(list(zoo.placeholder_ids(name).values())))
    assert moved.any(-1).all()
    assert not (moved & ~placeholders).any(), "features enter at their placeholders and nowhere else"


# ---------------------------------------------------------------- no wasted work


def test_the_forward_stops_when_everything_was_read() -> None:
    model = zoo.build("llama")
    ran: list[str] = []
    for name in ("model.layers.1.mlp", "model.layers.2", "model.layers.3", "model.norm", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    inputs = zoo.inputs("llama", model)
    for sites, layers, expected in [
        ("attn_out", [0, 1], []),
        ("resid_post", [0, 1], ["model.layers.1.mlp"]),
        ("resid_pre", 2, ["model.layers.1.mlp"]),
        ("pattern", 1, []),
        ("resid_post", None, ["model.layers.1.mlp", "model.layers.2", "model.layers.3"]),
        ("final_norm", None, ["model.layers.1.mlp", "model.layers.2", "model.layers.3", "model.norm"]),
    ]:
        ran.clear()
        capture(model, inputs, sites, layers)
        assert ran == expected, (sites, layers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2_5_vl", "qwen3_moe"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_only_where_wanted(name: str, padding: Any) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, padding=padding)
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape)))
    for row in range(2):
        with torch.no_grad():
            full = model(**alone(inputs, row)).logits[0]
        for positions, picked in [("last", full[-1:]), (2, full[2:3]), ([-1, 0], full[[-1, 0]])]:
            acts = capture(model, inputs, "resid_post", 1, logits=positions)
            assert acts.logits is not None
            torch.testing.assert_close(acts.logits[row], picked, atol=1e-5, rtol=1e-4)
            assert seen[-1] == (2, len(picked), 128), "the head sees the wanted positions only"


def test_gradients_flow_when_asked_and_only_then() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    acts = capture(model, inputs, ["resid_pre", "resid_post"], 2, grad=True)
    acts["resid_post", 2].sum().backward()
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert model.model.layers[3].mlp.down_proj.weight.grad is None
    assert not capture(model, inputs, "resid_post", 2)["resid_post", 2].requires_grad
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- moments


def test_moments_equal_numpy() -> None:
    model = zoo.build("llama")
    moments, rows, key = Moments(n_groups=3, covariance=True), [], ("resid_post", 2)
    groups = np.array([0, 1, 0, 1, 0, 0])
    for seed in range(4):
        inputs = zoo.inputs("llama", model, batch=6, seed=seed, padding="left")
        moments.groups = torch.from_numpy(groups)
        assert not capture(model, inputs, "resid_post", 2, into=moments), "nothing is kept beside the moments"
        rows.append(capture(model, inputs, "resid_post", 2)[key].double().numpy())
    x, group = np.concatenate(rows), np.tile(groups, 4)
    for g in (0, 1):
        np.testing.assert_allclose(moments.mean(key)[g], x[group == g].mean(0), atol=1e-6)
    assert moments.mean(key)[2].isnan().all(), "a group that was never seen has no mean"
    np.testing.assert_allclose(moments.cov(key), np.cov(x.T), atol=1e-5)
    assert moments.count(key).tolist() == [16, 8, 0]


def test_a_large_common_offset_costs_no_precision() -> None:
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    moments, key = Moments(covariance=True), ("resid_post", 0)
    for part in x.split(100):
        moments(key, part)
    np.testing.assert_allclose(moments.cov(key), np.cov(x.double().numpy().T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.mean(key)[0], x.double().numpy().mean(0), rtol=1e-9)


def test_nothing_grows_with_layers_or_batches_when_values_go_elsewhere() -> None:
    model = zoo.build("llama")
    alive: list[StorageWeakRef] = []

    def into(_key: Any, value: torch.Tensor) -> None:
        alive.append(StorageWeakRef(value.untyped_storage()))
        assert sum(not ref.expired() for ref in alive) == 1, "an earlier layer's tensor is still held"

    for seed in range(2):
        capture(model, zoo.inputs("llama", model, seed=seed), "mlp_post", into=into)
    assert len(alive) == 8


def test_moments_refuse_groups_that_do_not_fit() -> None:
    moments = Moments(n_groups=2)
    with pytest.raises(InputError, match="set Moments.groups"):
        moments(("resid_post", 0), torch.ones(3, 2))
    moments.groups = torch.tensor([0, 1])
    with pytest.raises(InputError, match="names 2 rows, but the batch has 3"):
        moments(("resid_post", 0), torch.ones(3, 2))
    moments(("resid_post", 0), torch.ones(2, 2))
    with pytest.raises(InputError, match="covariance=True"):
        moments.cov(("resid_post", 0))


# ---------------------------------------------------------------- traces


def test_nothing_is_left_behind_whatever_happens() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    seen: list[str] = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append("theirs"))
    before = traces(model)
    for sites in ("resid_post", "pattern", ["z", "resid_mid", "final_norm"]):
        capture(model, inputs, sites, logits="last")
        assert traces(model) == before
        with record(model, sites):
            model(**inputs)
            assert traces(model) != before, "the check itself must be able to see hooks"
        assert traces(model) == before
        with pytest.raises(KeyboardInterrupt), record(model, sites):
            raise KeyboardInterrupt
        assert traces(model) == before
        with pytest.raises(HookError, match="without input_ids or inputs_embeds"), record(model, sites):
            model(nonsense=1)
        assert traces(model) == before
    with pytest.raises(InputError, match="row 0 has 9 tokens"):
        capture(model, inputs, "resid_post", positions=30)
    assert traces(model) == before
    seen.clear()
    model(**inputs)
    assert seen == ["theirs"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_when_the_model_itself_fails(error: type[BaseException]) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    capture(model, inputs)

    def fail(*_: Any) -> None:
        raise error("inside")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    before = traces(model)
    with pytest.raises(error, match="inside"):
        capture(model, inputs, ["resid_post", "pattern"])
    with pytest.raises(error, match="inside"), record(model, ["resid_post", "pattern"]):
        model(**inputs)
    assert traces(model) == before
    handle.remove()
    assert len(capture(model, inputs)) == 4


def test_a_model_that_was_read_can_be_freed() -> None:
    model = zoo.build("llama")
    capture(model, zoo.inputs("llama", model), ["pattern", "resid_post"])
    with record(model, "pattern"):
        model.generate(**zoo.inputs("llama", model), max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_reading_inside_an_edit_sees_it_and_outside_does_not() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    for site in ("resid_pre", "resid_mid", "resid_post", "mlp_out", "z"):
        clean = capture(model, inputs, site, 1, positions="all")[site, 1]
        with edit(model, Ablate(site=site, layer=1)):
            assert not capture(model, inputs, site, 1, positions="all")[site, 1].any(), site
        with torch.no_grad(), record(model, site, 1, positions="all") as steps:
            with edit(model, Scale(site=site, layer=1, factor=0.5)):
                model(**inputs)
            assert torch.equal(steps[0][site, 1], clean), f"{site}: read before the later edit wrote"


# ---------------------------------------------------------------- refusals


def test_bad_requests_say_what_to_do() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    for kwargs, message in [
        ({"sites": "residual"}, "unknown site 'residual'; choose from resid_pre, q, k"),
        ({"sites": "z", "layers": 11}, "layer 11 does not exist; this model has layers 0 to 3"),
        ({"sites": []}, "name at least one"),
        ({"positions": "first"}, "unknown positions 'first'"),
        ({"positions": [(0, 2), (0, 2)]}, "reduce='mean'"),
        ({"positions": [(0, 2)], "reduce": "mean"}, "spans are given for 1 rows, but the batch has 2"),
        ({"positions": [(0, 2), (8, 11)], "reduce": "mean"}, r"span \(8, 11\) of row 1 is empty or outside"),
        ({"positions": [(0, 2), (3, 3)], "reduce": "mean"}, r"span \(3, 3\) of row 1 is empty"),
        ({"positions": torch.tensor([[1], [2], [3]])}, "given for 3 rows, but the batch has 2"),
        ({"positions": torch.ones(2, 9, dtype=torch.bool)}, "whole numbers"),
        ({"positions": -10}, "row 0 has 9 tokens, too few"),
        ({"reduce": "sum"}, "choose from mean"),
        ({"backend": "jax"}, "choose from torch, nnsight"),
    ]:
        with pytest.raises(InputError, match=message):
            capture(model, inputs, **kwargs)
    with pytest.raises(InputError, match="mapping"):
        capture(model, "some text")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="300 tokens, more than this model's context of 256"):
        capture(model, torch.ones(1, 300, dtype=torch.long))
    with pytest.raises(HookError, match="no forward pass"), record(model):
        pass


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_without_a_mask_is_refused(padding: Any) -> None:
    model = zoo.build("llama")
    padded = zoo.inputs("llama", model, padding=padding)["input_ids"]
    for ids in (padded, padded[1:], torch.cat([padded[1:], padded[1:]])):
        with pytest.raises(InputError, match="padded but has no attention_mask"):
            capture(model, {"input_ids": ids})
    begun = torch.cat([torch.zeros(2, 1, dtype=torch.long), padded[:, 2:7]], 1)  # a begin token that is also the pad
    if padding == "left":
        capture(model, {"input_ids": begun})
    empty = {"input_ids": padded, "attention_mask": torch.tensor([[1] * 9, [0] * 9])}
    with pytest.raises(InputError, match="row 1 of the batch is empty"):
        capture(model, empty)


def test_nan_names_its_layer() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    capture(model, inputs, "resid_post", [0, 1])
    with pytest.raises(HookError, match="'resid_post' at layer 2 hold NaN"):
        capture(model, inputs)
    with pytest.raises(HookError, match="'resid_post' at layer 2 hold NaN"):
        capture(model, inputs, into=Moments())


def test_offloaded_and_dispatched_models_are_read_like_any_other() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, padding="left")
    clean = capture(model, inputs, SITES)
    for move in (
        lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu")),
        lambda m: accelerate.dispatch_model(m, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True),
    ):
        moved = zoo.build("llama")
        move(moved)
        found = capture(moved, inputs, SITES)
        for key in clean:
            assert torch.equal(found[key], clean[key])
    with pytest.raises(InputError, match="holds no weights"):
        capture(zoo.build("llama").to("meta"), inputs)


def test_batches_hold_every_index_once_longest_first() -> None:
    made = batches(5, [3, 9, 1, 9, 4], 2)
    assert made == [[1, 3], [4, 0], [2]]
    assert resolve(zoo.build("llama")).n_layers == 4
