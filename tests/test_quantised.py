"""Models whose weights bitsandbytes or torchao loaded in 8 or 4 bits are read and steered like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from emocircuits.activations import capture
from emocircuits.circuits.sublayers import attention_side
from emocircuits.errors import HookError
from emocircuits.models.anatomy import resolve
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, Term

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def config(kind: str) -> Any:
    if kind.startswith("bnb"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if kind == "bnb8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def loaded(kind: str, folder: Path) -> Any:
    """A small Llama whose widths are multiples of bitsandbytes' blocks."""
    how = config(kind)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=128, initializer_range=0.3, max_position_embeddings=64,
    )).save_pretrained(folder)  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"}).eval()


def steerer(site: str, width: int, strength: float = 4.0) -> Steerer:
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    return Steerer((Term(site, (1, 2), vectors, strength),), site)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_post"])
@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao8"])
def test_a_quantised_model_is_steered_as_a_hook_would(kind: str, site: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    anatomy, ids = resolve(model), zoo.inputs("llama", model, batch=2, length=5)
    assert anatomy.validate(model) < 1e-2
    one = steerer(site, int(anatomy.d_mlp or 0) if site == "mlp_post" else anatomy.d_model)
    clean = model.generate(**ids, **GREEDY)
    with one.attach(model):
        found, logits = model.generate(**ids, **GREEDY), model(**ids).logits
    handles = [
        _by_hand(model, anatomy.point(site, layer), 4.0 * one.terms[0].vectors[i]) for i, layer in enumerate((1, 2))
    ]
    expected, by_hand = model.generate(**ids, **GREEDY), model(**ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, by_hand)
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)
    assert torch.equal(model.generate(**ids, **GREEDY), clean)


def _by_hand(model: Any, point: Any, vector: torch.Tensor) -> Any:
    module = model.get_submodule(point.module)
    if point.io == "input":
        return module.register_forward_pre_hook(lambda _, args: (args[0] + vector.to(args[0]), *args[1:]))

    def after(_: Any, __: Any, out: Any) -> Any:
        return (out[0] + vector.to(out[0]), *out[1:]) if isinstance(out, tuple) else out + vector.to(out)

    return module.register_forward_hook(after)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao8"])
def test_what_needs_plain_weights_says_so(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    assert torch.isfinite(capture(model, zoo.inputs("llama", model), "z", 1)["z", 1]).all()
    with pytest.raises(HookError, match="quantised"):
        attention_side(model, 1)
    with pytest.raises(HookError, match="bias"), steerer("mlp_post", 128).attach(model, compile_to="bias"):
        pass


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao8"])
def test_a_steerer_made_on_the_full_weights_fits_with_a_warning(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = replace(steerer("resid_post", 64), fingerprint=fingerprint(whole))
    with pytest.warns(UserWarning, match="same shapes, other weights"), made.attach(model):
        model(**zoo.inputs("llama", model))
