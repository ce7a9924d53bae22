"""Heads are zeroed where heads are, and controls are drawn like with like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from organisms import EMOTIONS, LABEL, planted

from emocircuits.activations import capture
from emocircuits.circuits.sublayers import attention_side, head_writes
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.reasoning.head_ablation import ablated, ablation, head_norms, random_heads

HEADS = [(0, 1), (2, 0), (2, 3)]
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "phi3"]


def ids_of(name: str) -> torch.Tensor:
    return zoo.inputs(name, zoo.build(name), batch=1, length=12)["input_ids"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroing_a_head_subtracts_its_output_times_its_part_of_w_o(name: str) -> None:
    """In one pass by zeroing, in another by subtracting what the head wrote, layer after layer."""
    model, ids = zoo.build(name), ids_of(name)
    anatomy = resolve(model)
    with torch.no_grad(), ablated(model, HEADS):
        zeroed = model(input_ids=ids).logits
    handles = []
    for layer in (0, 2):
        point, side = anatomy.point("z", layer), attention_side(model, layer)

        def subtracted(_: Any, args: Any, out: torch.Tensor, layer: int = layer, side: Any = side) -> torch.Tensor:
            written = head_writes(side, args[0].reshape(-1, anatomy.n_heads, anatomy.head_dim))
            return out - sum(written[:, head] for at, head in HEADS if at == layer).reshape(out.shape)

        handles.append(model.get_submodule(point.module).register_forward_hook(subtracted))
    with torch.no_grad():
        by_hand = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(zeroed, by_hand, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert float((model(input_ids=ids).logits - zeroed).abs().max()) > 1e-3


def test_slices_of_attentions_output_are_not_heads() -> None:
    """The published bug, which zeroing the same slice behind o_proj would repeat."""
    model, ids = zoo.build("qwen2"), ids_of("qwen2")
    with torch.no_grad(), ablated(model, [(1, 2)]):
        right = model(input_ids=ids).logits

    def sliced(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill(torch.arange(32) // 8 == 2, 0.0)

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(sliced)
    with torch.no_grad():
        wrong = model(input_ids=ids).logits
    handle.remove()
    assert float((right - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "gpt2"])
def test_head_norms_are_those_of_what_heads_add(name: str) -> None:
    model, texts = zoo.build(name), [ids_of(name)[0], ids_of(name)[0, :5]]
    found = head_norms(model, texts)
    per_token = []
    for text in texts:
        acts = capture(model, text, ["z", "attn_out"], positions="all")
        layers = []
        for layer in range(4):
            side = attention_side(model, layer)
            z, added = acts["z", layer][0], acts["attn_out", layer][0]
            written = head_writes(side, z)
            bias = getattr(side.project, "bias", None)
            total = written.sum(1) if bias is None else written.sum(1) + bias
            share = written * (added / total)[:, None] if side.norm is not None else written
            layers.append(share.norm(dim=-1))
        per_token.append(torch.stack(layers)[:, 1:])  # [L, T - 1, H]
    torch.testing.assert_close(found, torch.cat(per_token, dim=1).mean(1), atol=1e-4, rtol=1e-3)


def test_head_norms_refuse_what_has_none() -> None:
    with pytest.raises(InputError, match="at least two tokens"):
        head_norms(zoo.build("llama"), [torch.tensor([1])])
    hybrid = head_norms(zoo.build("minicpmv4_6"), [ids_of("minicpmv4_6")[0]])
    assert hybrid[0].isnan().all()
    assert not hybrid[3].isnan().any()


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=20), st.integers(0, 50))
def test_random_heads_are_as_many_in_each_layer_and_others(heads: set[tuple[int, int]], seed: int) -> None:
    chosen = random_heads(sorted(heads), (6, 8), seed=seed)
    assert len(set(chosen)) == len(chosen) == len(heads)
    assert not set(chosen) & heads
    counts = [sum(layer == at for at, _ in heads) for layer in range(6)]
    if max(counts) <= 4:  # no layer is short of others
        assert [sum(layer == at for at, _ in chosen) for layer in range(6)] == counts
    assert chosen == random_heads(sorted(heads), (6, 8), seed=seed)


def test_norm_matched_heads_have_the_norms_that_random_ones_do_not() -> None:
    norms = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    heads = [(layer, int(norms[layer].argmax())) for layer in range(6)]
    size = sum(float(norms[h]) for h in heads)
    draws = [[random_heads(heads, (6, 16), norms=n, seed=s) for s in range(10)] for n in (None, norms)]
    ratio = [[sum(float(norms[h]) for h in chosen) / size for chosen in sets] for sets in draws]
    assert max(ratio[0]) < 0.8
    assert min(ratio[1]) > 0.85
    assert len({tuple(chosen) for chosen in draws[1]}) > 1


# ---------------------------------------------------------------- the whole experiment


def label_gap(model: Any) -> float:
    """Log-odds of an emotion's label where it belongs, averaged over emotions."""
    ids = torch.tensor([[1, 5, 40 + e, 9, 12, 7] for e in range(len(EMOTIONS))])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1, LABEL : LABEL + len(EMOTIONS)]
    return float((logits.diag() - (logits.sum(1) - logits.diag()) / 2).mean())


def test_planted_heads_matter_and_random_ones_do_not() -> None:
    made = planted()
    norms = head_norms(made.model, [torch.tensor([1, 5, 40, 9, 12, 7])])
    found = ablation(made.model, made.heads, lambda: label_gap(made.model), norms=norms)
    assert found.effect() < -1
    for control in ("random", "norm-matched"):
        assert len(found.control_effects(control)) == 10
        assert found.excess(control) < -1
        assert found.p_value(control) == pytest.approx(1 / 11)
    assert 0 < found.norm_ratio["random"] <= found.norm_ratio["norm-matched"]
    assert found.base["value"] == label_gap(made.model)  # nothing is left on the model


def test_each_draw_is_the_model_without_those_heads() -> None:
    model, ids = zoo.build("gemma3_text"), ids_of("gemma3_text")

    def measure() -> dict[str, float]:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        return {"mean": float(logits.mean()), "top": float(logits.max())}

    found = ablation(model, HEADS, measure, draws=3, seed=5)
    assert set(found.controls) == {"random"}
    for chosen, values in zip(found.drawn["random"], found.controls["random"]):
        with ablated(model, chosen):
            assert measure() == values
    assert found.effect("top") == found.ablated["top"] - found.base["top"]
    mean = sum(found.control_effects(metric="mean")) / 3
    assert found.excess(metric="mean") == pytest.approx(found.effect("mean") - mean)
    with pytest.raises(InputError, match="unknown metric 'length'; choose from mean, top"):
        found.excess(metric="length")
    with pytest.raises(InputError, match="unknown control"):
        found.excess("norm-matched", "mean")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model, ids, calls = zoo.build("llama"), ids_of("llama"), 0
    before = model(input_ids=ids).logits

    def measure() -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return float(model(input_ids=ids).logits.detach().mean())

    with pytest.raises(KeyboardInterrupt):
        ablation(model, HEADS, measure, draws=4, save=tmp_path / "run.json")
    assert torch.equal(model(input_ids=ids).logits, before)
    resumed = ablation(model, HEADS, measure, draws=4, save=tmp_path / "run.json")
    assert calls == 4 + 3
    whole = ablation(model, HEADS, measure, draws=4)
    assert resumed == whole
    with pytest.raises(InputError, match="another ablation"):
        ablation(model, HEADS, measure, draws=4, seed=1, save=tmp_path / "run.json")
    (tmp_path / "notes.json").write_text("not JSON")
    with pytest.raises(InputError, match="is not JSON"):
        ablation(model, HEADS, measure, draws=4, save=tmp_path / "notes.json")


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([], {}, "no head"),
        ([(4, 0)], {}, "head .4, 0. does not exist; this model has 4 layers of 4 heads"),
        ([(0, 4)], {}, "head .0, 4. does not exist"),
        (HEADS, {"draws": 0}, "at least one draw"),
        (HEADS, {"norms": torch.ones(4, 3)}, "shape .4, 4."),
    ],
)
def test_bad_input_is_refused_before_anything_runs(heads: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ablation(zoo.build("llama"), heads, lambda: pytest.fail("the measure ran"), **options)


def test_a_layer_without_heads_is_refused() -> None:
    with pytest.raises(HookError, match="layer 0"):
        ablation(zoo.build("minicpmv4_6"), [(0, 0)], lambda: pytest.fail("the measure ran"))


def test_a_measure_that_does_not_run_the_model_is_noticed() -> None:
    with pytest.raises(HookError, match="no forward pass"):
        ablation(zoo.build("llama"), HEADS, lambda: 1.0)
