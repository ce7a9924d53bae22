"""The vLLM extension, on modules that return what vLLM's layers return (vLLM itself is not needed)."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch import nn

from emocircuits.activations import capture
from emocircuits.errors import ArtefactError, HookError, InputError
from emocircuits.steering import Ramp, Steerer, Term
from emocircuits.steering.vllm_worker import SteerWorker, decoder_layers, hook_layers

IDS = torch.tensor([[5, 6, 7, 8]])


class Layer(nn.Module):
    """A Llama layer in vLLM's form: takes and returns (hidden_states, residual), whose sum is the residual stream."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, residual, rotary, mask):
        residual = hidden if residual is None else hidden + residual
        hidden, _ = self.layer.self_attn(self.layer.input_layernorm(residual), rotary, mask)
        residual = hidden + residual
        return self.layer.mlp(self.layer.post_attention_layernorm(residual)), residual


class Engine(nn.Module):
    """A model of such layers, and the residual stream after each."""

    def __init__(self, llama) -> None:
        super().__init__()
        self.config, self.embed_tokens, self.rotary = llama.config, llama.model.embed_tokens, llama.model.rotary_emb
        self.layers = nn.ModuleList(map(Layer, llama.model.layers))

    @torch.no_grad()
    def forward(self, ids):
        hidden, residual, stream = self.embed_tokens(ids), None, []
        rotary = self.rotary(hidden, torch.arange(ids.shape[1])[None])
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, rotary, mask)
            stream.append(hidden + residual)
        return stream


class Worker(SteerWorker):
    def __init__(self, model, eager: bool = True) -> None:
        self.model_runner = SimpleNamespace(model=model, model_config=SimpleNamespace(enforce_eager=eager))


def llama():
    model = zoo.build("llama")
    model.config._attn_implementation = "eager"
    return model


def steerer(site: str = "resid_post", layers: tuple[int, ...] = (1, 2), width: int = 32, **how) -> Steerer:
    vectors = torch.randn(len(layers), width, generator=torch.Generator().manual_seed(0))
    return Steerer((Term(site, layers, vectors, 0.5, **how),), "fear")


def streams(model, fear: Steerer | None = None) -> list[torch.Tensor]:
    if fear is None:
        acts = capture(model, IDS, "resid_post", positions="all")
    else:
        with fear.attach(model, compile_to="hook"):
            acts = capture(model, IDS, "resid_post", positions="all")
    return [acts["resid_post", layer] for layer in range(4)]


def test_hidden_plus_residual_is_the_steered_stream(tmp_path) -> None:
    model = llama()
    fear = steerer() + steerer(layers=(2,))
    worker = Worker(Engine(model))
    clean = worker.model_runner.model(IDS)
    torch.testing.assert_close(clean, streams(model), atol=1e-5, rtol=1e-5)
    path = str(fear.save(tmp_path / "fear.safetensors"))
    assert worker.steer(path) == 2
    assert worker.steer(path) == 2  # instead of the first, not on top of it
    torch.testing.assert_close(worker.model_runner.model(IDS), streams(model, fear), atol=1e-5, rtol=1e-5)
    worker.unsteer()
    worker.unsteer()
    assert all(map(torch.equal, worker.model_runner.model(IDS), clean))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_layers_that_return_plain_tensors(name: str) -> None:
    model, fear = zoo.build(name), steerer()
    wanted = streams(model, fear)
    handles = hook_layers(fear, model)
    torch.testing.assert_close(streams(model), wanted, atol=1e-5, rtol=1e-5)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_layers_stay_in_half_precision() -> None:
    block = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Identity()])})
    hook_layers(steerer(layers=(1,)), block)
    out, residual = block["layers"][1]((torch.zeros(3, 32, dtype=torch.bfloat16), torch.ones(3, 32)))  # type: ignore
    assert out.dtype == torch.bfloat16
    assert out.any()
    assert torch.equal(residual, torch.ones(3, 32))


def test_refusals(tmp_path) -> None:
    model = zoo.build("llama")
    for made, kind, words in (
        (steerer("mlp_out"), InputError, "term at 'mlp_out'"),
        (steerer(positions="last"), InputError, "positions 'last'"),
        (steerer(mode="floor"), InputError, "does 'floor'"),
        (steerer().when(Ramp(0, 1, 5)), InputError, "changes its strength"),
        (steerer(layers=(7,)), InputError, "layer 7, but this model has 4"),
        (steerer(width=16), ArtefactError, "width 16"),
    ):
        with pytest.raises(kind, match=words):
            hook_layers(made, model)
    with pytest.raises(HookError, match="enforce_eager=True"):
        Worker(model, eager=False).steer(str(steerer().save(tmp_path / "x.safetensors")))
    with pytest.raises(HookError, match="found none"):
        decoder_layers(nn.Linear(2, 2))
    two = nn.ModuleDict({"a": nn.ModuleDict({"layers": nn.ModuleList()}), "b": nn.ModuleDict({"h": nn.ModuleList()})})
    with pytest.raises(HookError, match="a.layers"):
        decoder_layers(two)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_text_layers_of_a_multimodal_model_are_found() -> None:
    for name in ("llava", "qwen2_5_vl", "gemma3", "qwen2_audio"):
        assert len(decoder_layers(zoo.build(name))) == 4


def test_importing_it_needs_no_vllm() -> None:
    code = "import sys, emocircuits.steering.vllm_worker; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
