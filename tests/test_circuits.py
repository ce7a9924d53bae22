"""Closed forms equal brute-force ablation, derivatives equal differences, on real architectures at tiny size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from test_reading import Words

from emocircuits.activations import Ablate, capture, edit
from emocircuits.activations.restart import Checkpoint
from emocircuits.circuits.gradients import gradients
from emocircuits.circuits.heads import attribution, total_effects
from emocircuits.circuits.influence import reference, sublayer_influence
from emocircuits.circuits.neurons import integrated_gradients
from emocircuits.circuits.readout import Readout
from emocircuits.circuits.sublayers import attention_side, mlp_side
from emocircuits.circuits.units import Units, collect, head_effects
from emocircuits.directions import fit
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.reading import Example, read

ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3"]
EMOTIONS = ("anger", "fear", "surprise")


def texts(n: int = 6) -> list[Example]:
    stems = ["the door opened slowly", "a much longer prompt that has more words", "short one", "he came back at last"]
    return [
        Example(
            f"{stems[g % 4]} number{g}", e, f"g{g}", f" {e} said :", f"{e} no more of this{g}", f"t{g % 2}", f"g{g}"
        )
        for g in range(n)
        for e in EMOTIONS
    ]


def padded(model: Any) -> dict[str, torch.Tensor]:
    """Three rows, left-padded, all ending in the last column."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 100, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in zoo_forward(model) and not hasattr(model.get_decoder(), "rotary_emb"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


def zoo_forward(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)


def random_readout(model: Any, site: str = "final_norm", layer: int = 0) -> Readout:
    width = resolve(model).d_model
    weights = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    return Readout(EMOTIONS, site, layer, weights, "random")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_direct_head_effects_equal_ablation(name: str) -> None:
    model = zoo.build(name)
    inputs, anatomy = padded(model), resolve(model)
    v = torch.randn(2, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    clean = capture(model, inputs, ["z", "attn_out"], positions="last")
    for layer in range(anatomy.n_layers):
        found = head_effects(attention_side(model, layer), clean["z", layer], v)
        for head in range(anatomy.n_heads):
            with edit(model, Ablate(site="z", layer=layer, units=[head], positions="last")):
                without = capture(model, inputs, "attn_out", layer, positions="last")["attn_out", layer]
            torch.testing.assert_close(found[:, head], (clean["attn_out", layer] - without) @ v.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "olmo2"])
def test_where_no_norm_follows_attention_the_published_score_is_refused(name: str) -> None:
    model, tokenizer = zoo.build(name), Words()
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), EMOTIONS)
    with pytest.raises(HookError, match="no norm stands between"):
        collect(model, tokenizer, texts(), directions, norm="post")


def test_parallel_blocks_have_no_directions_after_attention() -> None:
    model, tokenizer = zoo.build("gpt_neox"), Words()
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), EMOTIONS)
    with pytest.raises(HookError, match="parallel"):
        collect(model, tokenizer, texts(), directions).attention_directions(directions)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in ("gpt_neox", "olmo2")])
def test_direct_head_effects_behind_the_norm_equal_ablation(name: str) -> None:
    """The published score: the projection of the MLP's normed input, with and without the head."""
    model = zoo.build(name)
    inputs, anatomy, layer = padded(model), resolve(model), 2
    v = torch.randn(2, anatomy.d_model, generator=torch.Generator().manual_seed(0))
    norm = model.get_submodule(anatomy.point("resid_mid", layer).module)
    assert "norm" in type(norm).__name__.lower()
    clean = capture(model, inputs, ["z", "resid_mid"], layer, positions="last")
    side = attention_side(model, layer)
    found = head_effects(side, clean["z", layer], v, None, clean["resid_mid", layer], norm)
    for head in range(anatomy.n_heads):
        with edit(model, Ablate(site="z", layer=layer, units=[head])):
            without = capture(model, inputs, "resid_mid", layer, positions="last")["resid_mid", layer]
        wanted = (norm(clean["resid_mid", layer]) - norm(without)) @ v.T
        torch.testing.assert_close(found[:, head], wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_and_neurons_add_up_to_their_sublayer(name: str) -> None:
    model = zoo.build(name)
    anatomy = resolve(model)
    acts = capture(model, padded(model), ["mlp_post", "mlp_out"], positions="last")
    v = torch.randn(anatomy.d_model, generator=torch.Generator().manual_seed(0))
    for layer in range(anatomy.n_layers):
        side, a = mlp_side(model, layer), acts["mlp_post", layer]
        y = side.written(a)
        bias = getattr(side.project, "bias", None)
        constant = 0 if bias is None else side.scale(y) * ((side.gain() * bias) @ v)
        if side.norm is not None and getattr(side.norm, "bias", None) is not None:
            constant = constant + side.norm.bias @ v
        total = side.scale(y) * (a @ ((v * side.gain()) @ side.weight)) + constant
        torch.testing.assert_close(total, acts["mlp_out", layer] @ v, rtol=1e-4, atol=1e-4)


def brute_force(model: Any, inputs: dict, readout: Readout, layer: int, head: int, positions: str) -> torch.Tensor:
    """One whole forward pass without restart, as published."""
    with edit(model, Ablate(site="z", layer=layer, units=[head], positions=positions)):
        return readout(next(iter(capture(model, inputs, readout.site, readout.layer).values())))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_total_effects_equal_one_forward_per_head(name: str, positions: str) -> None:
    model = zoo.build(name)
    inputs, anatomy = padded(model), resolve(model)
    for readout in (random_readout(model), random_readout(model, "resid_post", 2)):
        clean = readout(next(iter(capture(model, inputs, readout.site, readout.layer).values())))
        found = total_effects(model, inputs, readout, positions=positions, rows=5)
        last = anatomy.n_layers if readout.site == "final_norm" else readout.layer + 1
        assert found[:, last:].isnan().all()
        for layer in range(last):
            for head in range(anatomy.n_heads):
                wanted = clean - brute_force(model, inputs, readout, layer, head, positions)
                torch.testing.assert_close(found[:, layer, head], wanted, rtol=1e-4, atol=1e-4)
    before = {k: v for m in model.modules() for k, v in vars(m).items() if k == "forward"}
    assert not before, "nothing is left on the model"


def test_ablation_by_mean_and_by_other_rows() -> None:
    model = zoo.build("gemma3_text")
    inputs, anatomy, readout = padded(model), resolve(model), random_readout(model)
    baseline = torch.randn(anatomy.n_layers, anatomy.n_heads, anatomy.head_dim)
    clean = readout(next(iter(capture(model, inputs, readout.site, 0).values())))
    found = total_effects(model, inputs, readout, mode="mean", baseline=baseline, layers=[1])
    with edit(model, Ablate(site="z", layer=1, units=[2], mode="mean", value=baseline[1, [2]])):
        wanted = clean - readout(next(iter(capture(model, inputs, readout.site, 0).values())))
    torch.testing.assert_close(found[:, 1, 2], wanted, rtol=1e-4, atol=2e-5)
    assert found[:, 0].isnan().all()
    other = total_effects(model, inputs, readout, mode="resample", seed=3, layers=[1])
    z = capture(model, inputs, "z", 1, positions="all")["z", 1]
    matches = []
    for shift in (1, 2):  # the only two ways in which three rows can all change places
        given = z.clone()
        given[:, :, 2] = z.roll(shift, 0)[:, :, 2]
        matches.append(clean - _with(model, inputs, readout, "z", 1, given))
    assert any(torch.allclose(other[:, 1, 2], m, rtol=1e-4, atol=1e-4) for m in matches)
    with pytest.raises(InputError, match="two rows"):
        total_effects(model, {k: v[:1] for k, v in inputs.items()}, readout, mode="resample")
    with pytest.raises(InputError, match="needs `baseline`"):
        total_effects(model, inputs, readout, mode="mean")
    with pytest.raises(InputError, match="mode"):
        total_effects(model, inputs, readout, mode="median")


def test_the_cached_restart_refuses_rows_that_end_elsewhere() -> None:
    model = zoo.build("llama")
    inputs = padded(model)
    inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    with pytest.raises(HookError, match="pad left"):
        Checkpoint(model, inputs, cached=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_gradients_equal_autograd_through_a_push(name: str) -> None:
    model = zoo.build(name)
    inputs, readout = padded(model), random_readout(model)
    for site in ("attn_out", "mlp_post", "z"):
        found = gradients(model, inputs, readout, [site])[site]
        for layer in (0, 3):
            value, grad = found[layer]
            push = 1e-3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(layer))
            moved = [_with(model, inputs, readout, site, layer, value + sign * push) for sign in (1, -1)]
            slope = (moved[0] - moved[1]).sum(0) / 2
            expected = (grad * push).flatten(1).sum(1)
            torch.testing.assert_close(slope, expected, rtol=2e-2, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def _with(model: Any, inputs: dict, readout: Readout, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
    from emocircuits.activations import Patch

    with edit(model, Patch(site=site, layer=layer, value=value), compile_to="hook"):
        return readout(next(iter(capture(model, inputs, readout.site, readout.layer).values())))


def test_attribution_is_the_exact_effect_in_a_model_that_is_linear_after_the_heads() -> None:
    """At the last layer's heads only a norm follows, so gradient and ablation nearly agree for small heads."""
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.mul_(1e-3)
    inputs, readout = padded(model), random_readout(model)
    exact = total_effects(model, inputs, readout, layers=[3])
    screened = attribution(model, inputs, readout)
    torch.testing.assert_close(screened[:, 3], exact[:, 3], rtol=2e-2, atol=1e-5)


def test_integrated_gradients_add_up_to_the_ablation_of_the_layer() -> None:
    model = zoo.build("llama")
    inputs, readout = padded(model), random_readout(model)
    clean = readout(next(iter(capture(model, inputs, readout.site, 0).values())))
    with edit(model, Ablate(site="mlp_post", layer=2)):
        without = readout(next(iter(capture(model, inputs, readout.site, 0).values())))
    found = integrated_gradients(model, inputs, readout, 2, steps=64).sum(1)
    torch.testing.assert_close(found, clean - without, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_influence_equals_finite_differences(name: str) -> None:
    model, tokenizer = zoo.build(name), Words()
    sets = {
        kind: fit(read(model, tokenizer, texts(), site=site, position="last_prompt"), EMOTIONS)
        for kind, site in (("attn", "resid_mid"), ("mlp", "resid_post"))
    }
    end = reference(list(sets.values()), [2, 3])
    assert torch.allclose(end.norm(dim=-1), torch.ones(3))
    exact = sublayer_influence(model, [padded(model)], sets, end)
    checked = sublayer_influence(model, [padded(model)], sets, end, verify_dose=1e-2)
    torch.testing.assert_close(exact.values, checked.values, rtol=2e-2, atol=2e-3)
    assert exact.cosine.abs().max() <= 1 + 1e-5
    assert torch.allclose(exact.shares("mlp").sum(-1), torch.ones(3))


@pytest.mark.parametrize("position", ["last_prompt", "response_mean"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "olmo2"])
def test_streamed_units_equal_one_text_at_a_time(name: str, position: str, tmp_path) -> None:
    model, tokenizer = zoo.build(name), Words()
    directions = fit(read(model, tokenizer, texts(), position=position), EMOTIONS)
    units = collect(model, tokenizer, texts(), directions, position=position, batch_size=4)
    a, z, effects = [], [], []
    for example in texts():
        if example.label != "fear":
            continue
        whole = tokenizer(example.prompt)["input_ids"] + tokenizer(example.continuation, False)["input_ids"]
        start, ids = len(whole), whole + tokenizer(example.response, False)["input_ids"]
        span = slice(start, len(ids)) if position == "response_mean" else slice(start - 1, start)
        acts = capture(model, torch.tensor([ids]), ["z", "mlp_post"], positions="all")
        a.append(acts["mlp_post", 1][0, span].mean(0))
        z.append(acts["z", 1][0, span].mean(0))
        effects.append(head_effects(attention_side(model, 1), acts["z", 1][0, span], directions.units[:, 1]).mean(0))
    e = EMOTIONS.index("fear")
    torch.testing.assert_close(units.mean("mlp_post")[e, 1], torch.stack(a).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(units.mean("z")[e, 1], torch.stack(z).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(units.mean("head_effects")[e, 1], torch.stack(effects).mean(0), rtol=1e-4, atol=1e-4)
    assert units.deltas("z").sum(0).abs().max() < 1e-4, "differences from the mean of all emotions sum to zero"
    again = Units.load(units.save(tmp_path / "units.safetensors"))
    assert torch.equal(again.neurons(), units.neurons())
    assert again.folds == ("t0", "t1")


def test_neuron_scores_are_beta_times_the_mean_activation() -> None:
    model, tokenizer = zoo.build("llama"), Words()
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), EMOTIONS)
    units = collect(model, tokenizer, texts(), directions)
    down = model.model.layers[2].mlp.down_proj.weight
    beta = directions.units[1, 2] @ down
    torch.testing.assert_close(units.neurons(contrast=False)[1, 2], beta * units.mean("mlp_post")[1, 2])


def test_bad_requests_are_one_sentence() -> None:
    model, tokenizer = zoo.build("llama"), Words()
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), EMOTIONS)
    with pytest.raises(InputError, match="no group of texts holds all of"):
        collect(model, tokenizer, [t for t in texts() if t.label != "fear"], directions)
    with pytest.raises(InputError, match="every layer"):
        collect(model, tokenizer, texts(), directions.select([1, 2]))
    moe = zoo.build("mixtral")
    with pytest.raises(HookError, match="down_proj"):
        collect(moe, tokenizer, texts(), fit(read(moe, tokenizer, texts(), position="last_prompt"), EMOTIONS))


@pytest.mark.real_model
def test_effects_on_the_demo_model_equal_ablation(demo) -> None:
    model, tokenizer = demo
    inputs = dict(tokenizer(["They gave my seat away again, and nobody would say why."], return_tensors="pt"))
    readout = random_readout(model)
    clean = capture(model, inputs, ["z", "attn_out"], positions="last")
    end = readout(capture(model, inputs, "final_norm")["final_norm", 0])
    total = total_effects(model, inputs, readout, layers=[2, 11, 17])
    last = total_effects(model, inputs, readout, layers=[2, 11, 17], positions="last")
    for layer, head in ((2, 1), (11, 3), (17, 0)):
        direct = head_effects(attention_side(model, layer), clean["z", layer], readout.weights)[:, head]
        with edit(model, Ablate(site="z", layer=layer, units=[head], positions="last")):
            without = capture(model, inputs, "attn_out", layer)["attn_out", layer]
        wanted = (clean["attn_out", layer] - without) @ readout.weights.T
        assert float((direct - wanted).abs().max() / wanted.abs().max()) < 1e-5
        for found, positions in ((total, "all"), (last, "last")):
            wanted = end - brute_force(model, inputs, readout, layer, head, positions)
            torch.testing.assert_close(found[:, layer, head], wanted, rtol=1e-3, atol=1e-3 * float(end.abs().max()))
