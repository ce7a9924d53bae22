"""The zoo itself: every model builds, runs, generates, repeats exactly, and leaves no part idle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import PreTrainedModel

EVERY = [*zoo.TEXT, *zoo.MULTIMODAL]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's blocks: the only list of layers whose owner also owns the input embedding."""
    embedding = model.get_input_embeddings()
    for module in model.modules():
        layers = getattr(module, "layers", getattr(module, "h", None))
        if isinstance(layers, nn.ModuleList) and any(child is embedding for child in module.children()):
            return layers
    raise AssertionError("no decoder found")


def generate(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=3, do_sample=False)


def logits(model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", EVERY)
def test_builds_small_forwards_and_generates(name: str) -> None:
    model = zoo.build(name)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = zoo.inputs(name, model)
    out = logits(model, **batch)
    assert out.shape == (2, 9, 128)
    assert torch.isfinite(out).all()
    assert 0.5 < out.std() < 8, "logits are flat or saturated, so tests could not discriminate"
    generated = generate(model, batch)
    assert generated.shape == (2, 12)
    assert torch.equal(generated[:, :9], batch["input_ids"])


@pytest.mark.parametrize("name", zoo.MULTIMODAL)
def test_multimodal_features_reach_the_logits(name: str) -> None:
    model = zoo.build(name)
    batch = zoo.multimodal_inputs(name, model)
    for token in zoo.placeholder_ids(name).values():
        assert (batch["input_ids"] == token).sum(dim=1).min() >= 4
    out = logits(model, **batch)
    assert torch.isfinite(out).all()
    for key in [k for k, v in batch.items() if v.is_floating_point()]:
        changed = logits(model, **{**batch, key: batch[key] + torch.randn(batch[key].shape)})
        assert (changed[:, -1] - out[:, -1]).abs().max() > 1e-2, f"{key} does not matter"
    generated = generate(model, batch)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_model_other_seed_other_model(name: str) -> None:
    model, again, other = zoo.build(name), zoo.build(name), zoo.build(name, seed=1)
    batch = zoo.inputs(name, model)
    assert torch.equal(logits(model, **batch), logits(again, **batch))
    assert not torch.allclose(logits(model, **batch), logits(other, **batch), atol=0.1)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(logits(again, **batch), logits(zoo.build(name), **batch)), "copies share weights"


@pytest.mark.parametrize("name", EVERY)
def test_every_sublayer_matters(name: str) -> None:
    model = zoo.build(name)
    batch = zoo.inputs(name, model)
    clean = logits(model, **batch)
    layers = decoder_layers(model)
    assert len(layers) == 4
    for layer in layers:
        attention = next(m for n, m in layer.named_children() if n in ("self_attn", "attn", "attention", "linear_attn"))
        for part in (attention, layer.get_submodule("mlp")):
            handle = part.register_forward_hook(_silence)
            assert (logits(model, **batch) - clean).abs().mean() > 5e-3
            handle.remove()
    assert torch.equal(logits(model, **batch), clean)


def _silence(_module: nn.Module, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
    return output * 0 if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])


@pytest.mark.parametrize("name", EVERY)
def test_no_norm_or_bias_is_neutral(name: str) -> None:
    for path, parameter in zoo.build(name).named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.02, f"{path} is constant"


@pytest.mark.parametrize("name", zoo.TEXT)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_hides_only_the_padding(name: str, side: str) -> None:
    model = zoo.build(name)
    batch = zoo.inputs(name, model, padding=side)  # type: ignore[arg-type]
    keep = batch["attention_mask"].bool()
    assert keep.sum(dim=1).tolist() == [9, 7]
    positions = (keep.cumsum(dim=1) - 1).clamp(min=0)
    padded = logits(model, **batch, position_ids=positions)[1][keep[1]]
    alone = logits(model, input_ids=batch["input_ids"][1:][:, keep[1]])[0]
    assert torch.allclose(padded, alone, atol=1e-4)


def test_building_leaves_the_global_random_state_alone() -> None:
    zoo._text_master.cache_clear()
    torch.manual_seed(7)
    expected = copy.deepcopy(torch.get_rng_state())
    zoo.TEXT["llama"]()
    assert torch.equal(torch.get_rng_state(), expected)
