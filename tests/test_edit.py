"""Edits equal a re-implementation by hand, compose, respect positions and rows, and leave no trace."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from emocircuits.activations import Ablate, Add, Apply, Clamp, Edit, Patch, Project, Scale, capture, edit
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve

WIDTH = 32


def vector(seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def run(model, inputs, edits=(), **kw):
    with torch.no_grad():
        if not edits:
            return model(**inputs).logits
        with edit(model, edits, **kw):
            return model(**inputs).logits


def by_hand(model, inputs, layer: int, change) -> torch.Tensor:
    """The oracle: change the block's output by monkey-patching its forward."""
    block = model.get_submodule(resolve(model).blocks[layer])
    original = block.forward
    block.forward = lambda *a, **k: change(original(*a, **k))
    try:
        return run(model, inputs)
    finally:
        del block.forward


@pytest.mark.parametrize("name", list(zoo.TEXT))
def test_adding_to_the_residual_equals_a_patched_block(name: str) -> None:
    model = zoo.build(name)
    inputs, v = zoo.inputs(name, model), vector()
    expected = by_hand(model, inputs, 1, lambda x: x + 0.5 * v)
    for compile_to in ("auto", "hook"):
        found = run(model, inputs, Add(layer=1, vector=v, coefficient=0.5), compile_to=compile_to)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


KINDS: dict[str, tuple[Edit, object]] = {
    "scale": (Scale(layer=2, factor=0.3), lambda x: x * 0.3),
    "project": (Project(layer=2, direction=vector()), lambda x: x - (x @ unit()).unsqueeze(-1) * unit()),
    "target": (Project(layer=2, direction=vector(), target=2.0), lambda x: x + (2 - x @ unit()).unsqueeze(-1) * unit()),
    "clamp": (Clamp(layer=2, direction=vector(), high=0.1), lambda x: x - (x @ unit() - 0.1).clamp_min(0)[..., None] * unit()),  # noqa: E501
    "zero": (Ablate(layer=2), torch.zeros_like),
    "mean": (Ablate(layer=2, mode="mean", value=vector(3)), lambda x: vector(3).expand_as(x)),
    "patch": (Patch(layer=2, value=vector(4).expand(2, 9, WIDTH)), lambda x: vector(4).expand_as(x)),
    "apply": (Apply(layer=2, function=torch.tanh), torch.tanh),
    "units": (Ablate(layer=2, units=[1, 5]), lambda x: torch.where(torch.isin(torch.arange(WIDTH), torch.tensor([1, 5])), 0.0, x)),  # noqa: E501
}  # fmt: skip


def unit() -> torch.Tensor:
    return vector() / vector().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_every_kind_equals_its_formula(name: str, kind: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    made, change = KINDS[kind]
    torch.testing.assert_close(run(model, inputs, made), by_hand(model, inputs, 2, change), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "phi3"])
def test_ablating_a_head_or_neuron_equals_zeroed_weights(name: str) -> None:
    """Zeroing a unit must equal zeroing the weights that read it: the oracle touches no activation."""
    model = zoo.build(name)
    anatomy, inputs = resolve(model), zoo.inputs(name, model)
    for site, unit_, width in (("z", 2, anatomy.head_dim), ("mlp_post", 7, 1)):
        found = run(model, inputs, Ablate(site=site, layer=1, units=[unit_]))
        linear = model.get_submodule(anatomy.point(site, 1).module)
        weight = linear.weight
        columns = slice(unit_ * width, (unit_ + 1) * width)
        with torch.no_grad():
            kept = weight.clone()
            (weight[:, columns] if isinstance(linear, torch.nn.Linear) else weight[columns]).zero_()
            expected = run(model, inputs)
            weight.copy_(kept)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_scaling_queries_keys_and_values_changes_only_that_part(name: str, site: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    keys = ["q", "k", "v"]
    clean = capture(model, inputs, keys, 1, positions="all")
    with edit(model, Scale(site=site, layer=1, factor=2.0, units=[1])):
        moved = capture(model, inputs, keys, 1, positions="all")
        assert not torch.allclose(run(model, inputs), by_hand(model, inputs, 1, lambda x: x) * 0)
    for key in keys:
        factor = torch.ones(clean[key, 1].shape[2], 1)
        factor[1] = 2.0 if key == site else 1.0
        order = moved[key, 1] if key != site else clean[key, 1] * factor
        torch.testing.assert_close(order, clean[key, 1] * factor)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_rows_and_positions_touch_nothing_else(padding) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, padding=padding)
    clean = run(model, inputs)
    moved = run(model, inputs, Add(layer=1, vector=10 * vector(), rows=[1]))
    assert torch.equal(clean[[0, 2]], moved[[0, 2]])
    assert not torch.allclose(clean[1], moved[1], atol=1e-2)
    real = inputs["attention_mask"].bool() if padding else torch.ones_like(inputs["input_ids"]).bool()
    late = run(model, inputs, Add(layer=1, vector=10 * vector(), positions=[(2, 3)] * 3))
    for row in range(3):
        a, b = clean[row][real[row]], late[row][real[row]]
        torch.testing.assert_close(a[:2], b[:2])
        assert not torch.allclose(a[2], b[2], atol=1e-2)
    last = run(model, inputs, Add(layer=1, vector=10 * vector(), positions="last"))
    for row in range(3):
        a, b = clean[row][real[row]], last[row][real[row]]
        torch.testing.assert_close(a[:-1], b[:-1])
        assert not torch.allclose(a[-1], b[-1], atol=1e-2)


@pytest.mark.parametrize(
    "kinds", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_phases_under_generation(kinds: dict) -> None:
    """Prompt-only and generated-only edits equal hand-made passes over the whole text, with and without a cache."""
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=2, length=6, padding="left")
    n = inputs["input_ids"].shape[1]
    greedy = {
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    for positions in ("prompt", "generated", "all"):
        with edit(model, Add(layer=1, vector=3 * vector(), positions=positions)):
            out = model.generate(**inputs, **greedy, **kinds)
            again = model.generate(**inputs, **greedy, **kinds)
        assert torch.equal(out.sequences, again.sequences), "a second generate in one block starts afresh"
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
        column = torch.arange(n + 2)
        keep = {"prompt": column < n, "generated": column >= n, "all": column >= 0}[positions]
        whole = {"input_ids": out.sequences[:, : n + 2], "attention_mask": mask}
        expected = by_hand(model, whole, 1, lambda x, keep=keep: x + keep[:, None] * 3 * vector())
        torch.testing.assert_close(out.scores[2], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_several_edits_of_a_module_are_one_hook_and_run_in_order() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    edits = [Add(layer=1, vector=vector(1)), Scale(layer=1, factor=0.5), Add(layer=1, vector=vector(2))]
    expected = by_hand(model, inputs, 1, lambda x: (x + vector(1)) * 0.5 + vector(2))
    with edit(model, edits, compile_to="hook"):
        assert len(model.model.layers[1]._forward_hooks) == 1
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_biases_equal_hooks_and_restore_the_parameter(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    linear = model.get_submodule(resolve(model).linear_out["resid_post", 1])
    before = linear.bias
    add = [Add(layer=1, vector=vector()), Add(site="mlp_out", layer=1, vector=vector(1))]
    hooked, biased = (run(model, inputs, add, compile_to=how) for how in ("hook", "bias"))
    torch.testing.assert_close(hooked, biased, atol=1e-4, rtol=1e-4)
    assert linear.bias is before
    with pytest.raises(HookError, match="cannot be a bias of this sandwich model"):
        run(zoo.build("gemma3_text"), inputs, add, compile_to="bias")


def test_detaching_is_bit_identical_also_after_exceptions_and_nesting() -> None:
    model = zoo.build("gemma3_text")
    inputs = zoo.inputs("gemma3_text", model)
    clean = run(model, inputs)
    with edit(model, Add(layer=1, vector=vector())):
        with edit(model, Scale(layer=2, factor=0.0)):
            run(model, inputs)
        torch.testing.assert_close(run(model, inputs), by_hand(model, inputs, 1, lambda x: x))
    assert torch.equal(run(model, inputs), clean)
    with pytest.raises(ZeroDivisionError), edit(model, Apply(layer=1, function=lambda _x: 1 / 0)):
        run(model, inputs)
    with pytest.raises(KeyboardInterrupt), edit(model, Scale(layer=1, factor=2.0)):
        raise KeyboardInterrupt
    assert torch.equal(run(model, inputs), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_edit_that_never_fired_is_named() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    with pytest.raises(HookError, match="Scale at 'resid_post', layer 1 never fired in 1 forward"):
        run(model, inputs, Scale(layer=1, factor=2.0, positions="generated"))
    with pytest.raises(HookError, match="no forward pass"), edit(model, Scale(layer=1, factor=2.0)):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = zoo.build("llama").to(dtype)
    inputs = zoo.inputs("llama", model)
    assert run(model, inputs, Add(layer=1, vector=vector(), positions="last")).dtype == dtype
    model = zoo.build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        moved, clean = run(model, inputs, Add(layer=1, vector=vector())), run(model, inputs)
    assert not torch.allclose(moved.float(), clean.float(), atol=1e-2)


def test_gradients_flow_through_edits() -> None:
    model, v = zoo.build("llama"), vector().requires_grad_()
    with edit(model, Add(layer=1, vector=v), compile_to="hook"):
        model(**zoo.inputs("llama", model)).logits.sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("compile_to", ["hook", "auto"])
def test_compiled_models_notice_edits_that_come_and_go(how: str, compile_to: str) -> None:
    torch._dynamo.reset()
    model = zoo.build("llama")
    inputs, v = zoo.inputs("llama", model), vector()
    expected = by_hand(model, inputs, 1, lambda x: x + v)
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    clean = run(compiled, inputs)
    with torch.no_grad(), edit(compiled, Add(layer=1, vector=v), compile_to=compile_to):
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(compiled, inputs), clean)
    torch._dynamo.reset()


@settings(max_examples=15)
@given(x=st.floats(-3, 3), y=st.floats(-3, 3), layer=st.integers(0, 3))
def test_adds_are_linear_and_order_free(x: float, y: float, layer: int) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    a, b = Add(layer=layer, vector=vector(1), coefficient=x), Add(layer=layer, vector=vector(2), coefficient=y)
    both = Add(layer=layer, vector=x * vector(1) + y * vector(2))
    for edits in ([a, b], [b, a]):
        torch.testing.assert_close(run(model, inputs, edits), run(model, inputs, both), atol=1e-3, rtol=1e-3)


@settings(max_examples=15)
@given(target=st.floats(-4, 4), low=st.floats(-2, 0), high=st.floats(0, 2), seed=st.integers(0, 9))
def test_projection_and_clamp_do_what_they_say_once_and_twice(
    target: float, low: float, high: float, seed: int
) -> None:
    x, d = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(seed)), vector(seed)
    u = d / d.norm()
    project, clamp = Project(direction=d, target=target), Clamp(direction=d, low=low, high=high)
    once = project.transform(x)
    torch.testing.assert_close(once @ u, torch.full((2, 3), target), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(project.transform(once), once, atol=1e-4, rtol=1e-4)
    held = clamp.transform(x)
    assert (held @ u).min() >= low - 1e-4
    assert (held @ u).max() <= high + 1e-4
    torch.testing.assert_close(clamp.transform(held), held, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(held - (held @ u)[..., None] * u, x - (x @ u)[..., None] * u, atol=1e-4, rtol=1e-4)


def test_resampling_draws_from_the_pool_by_seed() -> None:
    pool, x = torch.arange(5.0)[:, None].expand(5, WIDTH), torch.randn(64, 3, WIDTH)
    draws = [Ablate(mode="resample", value=pool, seed=s).transform(x)[:, 0, 0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert set(draws[0].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Add(layer=9, vector=vector()), "layer 9 does not exist"),
        (Add(site="residual", vector=vector()), "choose from resid_pre"),
        (Add(vector=vector(0, 8)), "has width 8, but the site has 32"),
        (Add(vector=vector() * torch.nan), "NaN"),
        (Ablate(site="z", units=[7]), "head 7 does not exist at 'z'; choose from 0 to 3"),
        (Ablate(mode="median"), "choose from zero, mean, resample"),
        (Ablate(mode="mean"), "needs `value`"),
        (Scale(factor=1.0, positions="later"), "choose from all, prompt, generated, last"),
        (Scale(site="pattern", factor=1.0), "read-only"),
    ],
)
def test_bad_edits_are_refused_before_anything_is_installed(made: Edit, message: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(InputError, match=message), edit(model, made):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
