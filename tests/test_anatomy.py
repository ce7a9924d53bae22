"""Every site of every architecture is the tensor that brute force finds, and what is missing says why."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracle import read
from torch import nn

from emocircuits.activations import SITES, Add, capture, edit
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import register_structure, resolve


@pytest.mark.parametrize("name", zoo.ONE_STREAM)
def test_every_site_equals_brute_force(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    anatomy, expected = resolve(model), read(model, inputs)
    acts = capture(model, inputs, anatomy.sites(), positions="all")
    assert set(acts) == set(expected), "a site that exists was not found, or one that does not was"
    for key, value in acts.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", zoo.ONE_STREAM)
def test_the_anatomy_validates_and_knows_its_shapes(name: str) -> None:
    model = zoo.build(name)
    anatomy = resolve(model)
    assert anatomy.validate(model) < 1e-5
    assert resolve(model) is anatomy
    assert (anatomy.n_layers, anatomy.d_model, anatomy.n_heads, anatomy.vocab_size) == (4, 32, 4, 128)
    sites = [s for s in anatomy.sites() if s != "pattern"]
    acts = capture(model, zoo.inputs(name, model), sites, positions="all")
    for (site, _), value in acts.items():
        assert value.shape[2] == anatomy.n_units(site), site
        assert value.dim() == 3 or value.shape[3] == anatomy.head_dim, site


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("llama", "pre-norm"), ("gpt2", "pre-norm"), ("gpt_neox_sequential", "pre-norm"), ("phi3", "pre-norm"),
        ("gpt_neox", "parallel"), ("gemma2", "sandwich"), ("gemma3", "sandwich"), ("olmo2", "post-norm"),
    ],
)  # fmt: skip
def test_structures_are_told_apart(name: str, structure: str) -> None:
    assert resolve(zoo.build(name)).structure == structure


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_omni_moe"])
def test_experts_have_no_neurons_and_say_so(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(HookError, match="'mlp_post' is not defined at layer 2 .*fused parameter.*use mlp_out"):
        capture(model, zoo.inputs(name, model), "mlp_post", 2)
    assert "mlp_post" not in resolve(model).sites()


def test_several_streams_are_no_residual_and_say_so() -> None:
    model = zoo.build("gemma3n")
    inputs, anatomy = zoo.multimodal_inputs("gemma3n", model), resolve(model)
    assert set(anatomy.sites()) == {"q", "k", "v", "z", "pattern", "attn_out", "mlp_post", "mlp_out", "final_norm"}
    for site in ("resid_pre", "resid_mid", "resid_post"):
        with pytest.raises(HookError, match=f"'{site}' is not defined .*several residual streams.*use attn_out"):
            capture(model, inputs, site, 1)
    with pytest.raises(HookError, match="'k' is not defined at layer 3 .*keys and values of an earlier layer"):
        capture(model, inputs, "k", 3)
    acts = capture(model, inputs, ["z", "attn_out"], 3, positions="all")
    attention = model.get_submodule(anatomy.attention[3])
    norm = model.get_submodule(anatomy.blocks[3]).post_attention_layernorm
    torch.testing.assert_close(norm(attention.o_proj(acts["z", 3].flatten(-2))), acts["attn_out", 3])


def test_gated_queries_and_other_mixers_are_named() -> None:
    model = zoo.build("minicpmv4_6")
    inputs, anatomy = zoo.inputs("minicpmv4_6", model), resolve(model)
    assert [bool(path) for path in anatomy.attention] == [False, False, False, True]
    with pytest.raises(HookError, match="'z' is not defined at layer 0 .*no softmax attention"):
        capture(model, inputs, "z", 0)
    with pytest.raises(HookError, match="'q' is not defined at layer 3 .*more than 4 heads"):
        capture(model, inputs, "q", 3)


def test_parallel_blocks_have_no_middle_and_say_so() -> None:
    model = zoo.build("gpt_neox")
    with pytest.raises(HookError, match="'resid_mid' is not defined at layer 1 of this gpt_neox model: .*in parallel"):
        capture(model, zoo.inputs("gpt_neox", model), "resid_mid", 1)
    assert "resid_mid" in resolve(zoo.build("gpt_neox_sequential")).sites()


def test_layers_count_from_the_end_too() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    anatomy = resolve(model)
    assert anatomy.point("z", -1) == anatomy.point("z", 3)
    torch.testing.assert_close(capture(model, inputs, "z", -1)["z", 3], capture(model, inputs, "z", 3)["z", 3])
    with edit(model, Add(layer=-1, vector=torch.ones(32))), torch.no_grad():
        model(**inputs)


def test_a_block_without_attention_does_not_shift_the_others() -> None:
    """Hybrid models: only some blocks have softmax attention."""
    model = zoo.build("llama")
    block = model.model.layers[1]
    block.linear_mixer = block.self_attn
    del block.self_attn
    anatomy = resolve(model)
    assert anatomy.attention == ("model.layers.0.self_attn", "", "model.layers.2.self_attn", "model.layers.3.self_attn")
    assert "pattern" in anatomy.sites()
    for site in ("q", "z", "attn_out"):
        with pytest.raises(HookError, match=f"'{site}' is not defined at layer 1 .*no softmax attention"):
            anatomy.point(site, 1)
    with pytest.raises(HookError, match="'pattern' is not defined at layer 1 .*no softmax attention"):
        capture(model, zoo.inputs("llama", model), "pattern", 1)


def test_a_projection_that_holds_something_else_is_not_taken_for_heads() -> None:
    """Some attentions keep a gate in q_proj, some compress keys: guessing there would give wrong heads."""
    gated, compressed = zoo.build("llama"), zoo.build("llama")
    gated.model.layers[0].self_attn.q_proj = nn.Linear(32, 2 * 48, bias=False)
    with pytest.raises(HookError, match="'q' is not defined at layer 0 .*holds more than 4 heads of width 12"):
        resolve(gated).point("q", 0)
    assert resolve(gated).point("k", 0).heads == 2
    del compressed.model.layers[0].self_attn.k_proj
    with pytest.raises(HookError, match="'k' is not defined .*not recognised"):
        resolve(compressed).point("k", 0)


def test_grouped_fused_projections_are_not_taken_for_interleaved_ones() -> None:
    model = zoo.build("gpt_neox")
    for block in model.gpt_neox.layers:  # one key and value head for all queries, as in Falcon
        block.attention.query_key_value = nn.Linear(32, 32 + 2 * 8)
    with pytest.raises(HookError, match="'q' is not defined .*not recognised"):
        resolve(model).point("q", 0)


def test_an_unknown_block_lists_its_children_and_can_be_registered() -> None:
    model = zoo.build("llama")
    for block in model.model.layers:
        block.mixer, block.mlp = block.mlp, None
    with pytest.raises(InputError, match="children: .*self_attn.*mixer.*register_structure\\('llama', mlp="):
        resolve(model)
    register_structure("llama", mlp="mixer")
    try:
        assert resolve(model).point("mlp_post", 0).module == "model.layers.0.mixer.down_proj"
    finally:
        register_structure("llama")
    with pytest.raises(InputError, match="children"):
        resolve(model)


def test_an_unknown_list_of_blocks_can_be_registered() -> None:
    model = zoo.build("llama")
    decoder = model.model
    decoder.stack, decoder.layers = decoder.layers, None
    with pytest.raises(InputError, match="no decoder .*children: model: LlamaModel.*register_structure"):
        resolve(model)
    register_structure("llama", blocks="stack")
    try:
        assert resolve(model).blocks[3] == "model.stack.3"
    finally:
        register_structure("llama")


def test_names_that_do_not_exist_list_the_choices() -> None:
    with pytest.raises(InputError, match="unknown role 'mixer'; choose from blocks, attention, mlp"):
        register_structure("llama", mixer="x")
    with pytest.raises(InputError, match="choose from " + ", ".join(SITES)):
        resolve(zoo.build("llama")).point("residual", 0)
    with pytest.raises(InputError, match="expected a torch model, got str"):
        resolve("llama")


def test_validation_names_the_layer_that_does_not_add_up() -> None:
    model = zoo.build("llama")
    block = model.model.layers[2]
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.1
    with pytest.raises(HookError, match="does not add up at layer 2 .*register_structure"):
        resolve(model).validate(model)
