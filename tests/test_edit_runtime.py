"""Edits under half precision, autocast, gradients, offloading and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracle import write, writing
from torch import Tensor

from emocircuits.activations import Ablate, Add, Apply, Scale, edit
from emocircuits.activations.edit import Installed

WIDTH = 32


def vector(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (WIDTH,), generator=torch.Generator().manual_seed(seed))


def run(model: Any, inputs: dict[str, Tensor], edits: Any = (), **kwargs: Any) -> Tensor:
    with torch.no_grad(), edit(model, edits, **kwargs):
        return model(**inputs).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- dtypes, gradients, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_is_right(dtype: torch.dtype) -> None:
    model = zoo.build("llama").to(dtype)
    inputs = zoo.inputs("llama", model)

    def newest(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + vector().to(dtype)], 1)

    for made, change in [
        (Add(layer=1, vector=vector(), positions="last"), newest),
        (Apply(layer=1, function=lambda x: x.float() * 2), lambda x: x * 2),
        (Ablate(layer=1, units=[3]), lambda x: x * (torch.arange(WIDTH) != 3).to(dtype)),
    ]:
        found = run(model, inputs, made)
        assert found.dtype == dtype
        assert torch.equal(found, write(model, inputs, "resid_post", 1, change))


def test_autocast_reaches_edited_models_too() -> None:
    model = zoo.build("llama")
    inputs, made = zoo.inputs("llama", model), Add(site="mlp_out", layer=1, vector=vector())
    with torch.autocast("cpu", torch.bfloat16):
        for compile_to in ("hook", "auto"):
            found = run(model, inputs, made, compile_to=compile_to)
            expected = write(model, inputs, "mlp_out", 1, lambda x: x + vector())
            torch.testing.assert_close(found.float(), expected.float(), atol=0.15, rtol=0.05)
            assert not torch.allclose(found.float(), run(model, inputs).float(), atol=0.5)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "resid_mid", "z", "q"])
def test_gradients_flow_to_the_vector_and_through_the_model(site: str) -> None:
    model, shape = zoo.build("llama"), (12,) if site in ("z", "q") else (WIDTH,)
    inputs = zoo.inputs("llama", model)
    v, by_hand = (vector(0, *shape).requires_grad_() for _ in range(2))
    with edit(model, Add(site=site, layer=1, vector=v)):
        model(**inputs).logits.square().mean().backward()
    weight = model.model.layers[0].mlp.down_proj.weight
    found, weight.grad = weight.grad, None
    with writing(model, site, 1, lambda x: x + by_hand):
        model(**inputs).logits.square().mean().backward()
    for one, other in ((v.grad, by_hand.grad), (found, weight.grad)):
        assert one is not None
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_offloaded_and_dispatched_models_are_edited_like_any_other() -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = zoo.inputs("llama", zoo.build("llama"), padding="left")
    edits = [Add(site="mlp_out", layer=1, vector=vector()), Scale(site="z", layer=2, factor=0.5, positions="last")]
    expected = run(zoo.build("llama"), inputs, edits)
    for move in (
        lambda m: accelerate.cpu_offload(m, execution_device=torch.device("cpu")),
        lambda m: accelerate.dispatch_model(m, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True),
    ):
        moved = zoo.build("llama")
        move(moved)
        clean = run(moved, inputs)
        close(run(moved, inputs, edits), expected)
        assert torch.equal(run(moved, inputs), clean)


# ---------------------------------------------------------------- torch.compile


def shallow() -> Any:
    """One block, because tracing is slow."""
    torch._dynamo.reset()
    model = zoo.build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "block"])
def test_compiled_models_notice_edits_that_come_and_go(how: str) -> None:
    model = shallow()
    inputs, made = zoo.inputs("llama", model), Scale(factor=0.5)
    expected, clean = run(model, inputs, made), run(model, inputs)
    compiled: Any = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    close(run(compiled, inputs), clean)
    with torch.no_grad(), edit(compiled, made):
        close(compiled(**inputs).logits, expected)
        with edit(compiled, Ablate(site="z", units=[1])):
            assert not torch.allclose(compiled(**inputs).logits, expected, atol=1e-3)
        close(compiled(**inputs).logits, expected)
    close(run(compiled, inputs), clean)


def test_a_compiled_model_notices_biases() -> None:
    model = shallow()
    inputs, add = zoo.inputs("llama", model), Add(site="mlp_out", vector=vector())
    expected, clean = run(model, inputs, add), run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        close(run(compiled, inputs), clean)
        close(run(compiled, inputs, add), expected)


def test_installed_edits_of_compiled_models_may_be_removed_in_any_order() -> None:
    skipped = torch._dynamo.config.skip_nnmodule_hook_guards
    model = shallow()
    inputs, edits = zoo.inputs("llama", model), [Scale(factor=0.5), Scale(site="z", factor=0.5)]
    clean, expected = run(model, inputs), run(model, inputs, edits[1])
    model.compile(backend="eager")
    one, two = (Installed(model, model, [e]) for e in edits)
    one.remove()
    close(run(model, inputs), expected)
    two.remove()
    close(run(model, inputs), clean)
    assert torch._dynamo.config.skip_nnmodule_hook_guards == skipped
