"""Baked folders: a plain load gives the steered model, or there is one clear sentence and no folder."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import zoo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.steering import Ramp, Steerer, Term
from emocircuits.steering.bake import bake

BAKED = [
    *(("llama", site) for site in ("attn_out", "mlp_out", "resid_post", "z", "mlp_post")),
    *((name, site) for name in ("gpt2", "gpt_neox", "gpt_neox_sequential") for site in ("attn_out", "resid_post", "z")),
    *((name, "attn_out") for name in ("qwen3", "olmo", "qwen3_moe")),
    *((name, "z") for name in ("gemma3_text", "olmo2")),
]


def steerer(model, *sites: str, **how) -> Steerer:
    anatomy, generator = resolve(model), torch.Generator().manual_seed(0)
    made = []
    for site in sites:
        width = anatomy.n_units(site) * (anatomy.head_dim if site == "z" else 1)
        vectors = torch.randn(2, width, generator=generator)
        made.append(Term(site, (1, -1), vectors, 0.5, heads=anatomy.n_heads if site == "z" else None, **how))
    return Steerer(tuple(made), "fear")


@torch.no_grad()
def logits(name: str, model) -> torch.Tensor:
    return model(**zoo.inputs(name, model, padding="left")).logits


@pytest.mark.parametrize(("name", "site"), BAKED)
def test_a_plain_load_gives_the_steered_model(tmp_path, name: str, site: str) -> None:
    model = zoo.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    fear = steerer(model, site)
    folder = bake(fear, model, tmp_path / "fear")
    with fear.attach(model):
        wanted = logits(name, model)
    baked = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(baked) is type(model)
    torch.testing.assert_close(logits(name, baked), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(name, model), wanted, atol=1e-2)
    assert config == model.config.to_dict()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["fear"]


def test_only_the_switches_that_are_needed_are_turned_on(tmp_path) -> None:
    model = zoo.build("llama")
    folder = bake(steerer(model, "resid_post"), model, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (False, True)
    both = bake(steerer(model, "z", "mlp_out"), model, tmp_path / "y")
    config = json.loads((both / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    baked = transformers.AutoModelForCausalLM.from_pretrained(both)
    assert not baked.model.layers[1].self_attn.q_proj.bias.any()
    assert not baked.model.layers[0].mlp.down_proj.bias.any()


def test_half_precision_and_a_tokenizer(tmp_path) -> None:
    class Saved:
        def save_pretrained(self, folder) -> None:
            (folder / "tokenizer.json").write_text("{}")

    model = zoo.build("llama").bfloat16()
    folder = bake(steerer(model, "resid_post"), model, tmp_path / "x", Saved())
    assert (folder / "tokenizer.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("qwen2", "resid_post", "config of qwen2 gives model.layers.1.mlp.down_proj a bias"),
        ("qwen3", "resid_post", "config of qwen3 gives"),
        ("mistral", "attn_out", "config of mistral"),
        ("gemma3_text", "resid_post", "gemma3_text passes every sublayer's output through a norm"),
        ("gemma2", "attn_out", "through a norm"),
        ("mixtral", "mlp_out", "no single projection"),
        ("llama", "resid_mid", "a constant at 'resid_mid'"),
    ],
)
def test_architectures_without_such_a_bias_are_refused_by_name(tmp_path, name: str, site: str, words: str) -> None:
    model = zoo.build(name)
    with pytest.raises(HookError, match=words) as refused:
        bake(steerer(model, site), model, tmp_path / "x")
    assert "attach the steerer" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_is_not_constant_is_refused(tmp_path) -> None:
    model = zoo.build("llama")
    fear = steerer(model, "resid_post")
    for made, words in (
        (fear.at("generated"), "positions 'generated'"),
        (Steerer.rows([fear, None]), "vectors per row"),
        (0.0 * fear, "nothing to bake"),
        (fear.when(Ramp(0, 1, 5)), "changes its strength as it goes"),
        (steerer(model, "resid_post", mode="cap"), "removes or bounds a component"),
    ):
        with pytest.raises(InputError, match=words):
            bake(made, model, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        bake(fear, model, tmp_path / "full")
    with pytest.raises(InputError, match="only a transformers model"):
        bake(fear, torch.nn.Linear(2, 2), tmp_path / "x")
    with fear.attach(model, compile_to="bias", strict=False), pytest.raises(HookError, match="detach it first"):
        bake(fear, model, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_an_architecture_that_scales_its_biases_is_found_out(tmp_path) -> None:
    config = transformers.GraniteConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(HookError, match="logits differ"):
        bake(steerer(model, "resid_post"), model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_on_disk_is_baked_by_name(tmp_path) -> None:
    """The command line's way, with everything real but the tokenizer."""
    from emocircuits.steering.formats import write_steerer

    model = zoo.build("llama")
    fear = steerer(model, "resid_post")
    model.save_pretrained(tmp_path / "plain")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(tmp_path / "plain")
    folder = write_steerer(fear, tmp_path / "baked", "baked", str(tmp_path / "plain"))
    baked = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with fear.attach(model):
        torch.testing.assert_close(logits("llama", baked), logits("llama", model), atol=1e-5, rtol=1e-5)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["llava", "voxtral"])
def test_the_text_tower_of_a_multimodal_model_is_baked(tmp_path, name: str) -> None:
    model = zoo.build(name)
    fear, inputs = steerer(model, "resid_post"), zoo.multimodal_inputs(name, model)
    baked = type(model).from_pretrained(bake(fear, model, tmp_path / "x"))
    with torch.no_grad(), fear.attach(model):
        torch.testing.assert_close(baked(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
