"""Laws that edits keep for any number, layer, site and row."""

from __future__ import annotations

import functools
from typing import Any

import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emocircuits.activations import Ablate, Add, Clamp, Project, Scale, capture, edit

WIDTH = 32


def vector(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (WIDTH,), generator=torch.Generator().manual_seed(seed))


def run(model: Any, inputs: dict[str, Tensor], edits: Any = (), **kwargs: Any) -> Tensor:
    with torch.no_grad(), edit(model, edits, **kwargs):
        return model(**inputs).logits


@functools.cache
def shared() -> tuple[Any, dict[str, Tensor], Tensor]:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=3, length=5, padding="left")
    return model, inputs, run(model, inputs)


LAYERS, NUMBERS, SEEDS = st.integers(0, 3), st.floats(-3, 3), st.integers(0, 99)
SITES = st.sampled_from(["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])


@settings(max_examples=20)
@given(x=NUMBERS, y=NUMBERS, layer=LAYERS, site=SITES)
def test_adds_are_linear_and_commute(x: float, y: float, layer: int, site: str) -> None:
    model, inputs, _ = shared()
    a, b = (Add(site=site, layer=layer, vector=vector(s), coefficient=c) for s, c in ((1, x), (2, y)))
    both = run(model, inputs, Add(site=site, layer=layer, vector=x * vector(1) + y * vector(2)))
    for edits in ([a, b], [b, a]):
        torch.testing.assert_close(run(model, inputs, edits), both, atol=1e-4, rtol=1e-3)


@settings(max_examples=20)
@given(layer=LAYERS, site=SITES, seed=SEEDS)
def test_neutral_edits_are_bit_identical(layer: int, site: str, seed: int) -> None:
    model, inputs, clean = shared()
    where: dict[str, Any] = {"site": site, "layer": layer}
    for made in (Scale(factor=1.0, **where), Add(vector=vector(seed), coefficient=0.0, **where), Clamp(**where)):
        assert torch.equal(run(model, inputs, made, compile_to="hook"), clean)


@settings(max_examples=30)
@given(target=st.floats(-4, 4), low=st.floats(-2, 0), high=st.floats(0, 2), seed=SEEDS)
def test_projection_and_clamp_do_what_they_say_once_and_twice(
    target: float, low: float, high: float, seed: int
) -> None:
    x, d = vector(seed + 1, 2, 3, WIDTH), vector(seed)
    u = d / d.norm()
    project, clamp = Project(direction=d, target=target), Clamp(direction=d, low=low, high=high)
    once = project.transform(x)
    torch.testing.assert_close(once @ u, torch.full((2, 3), target), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(project.transform(once), once, atol=1e-4, rtol=1e-4)
    held = clamp.transform(x)
    assert (held @ u).min() >= low - 1e-4
    assert (held @ u).max() <= high + 1e-4
    torch.testing.assert_close(clamp.transform(held), held, atol=1e-4, rtol=1e-4)
    for new in (once, held):  # nothing but the component moves
        torch.testing.assert_close(new - (new @ u)[..., None] * u, x - (x @ u)[..., None] * u, atol=1e-4, rtol=1e-4)
    by_unit = Clamp(low=low, high=high)
    assert torch.equal(by_unit.transform(by_unit.transform(x)), by_unit.transform(x))


@settings(max_examples=15)
@given(layer=LAYERS, seed=SEEDS)
def test_after_ablation_the_input_no_longer_matters(layer: int, seed: int) -> None:
    model, _, _ = shared()
    one, other = (zoo.inputs("llama", model, seed=s) for s in (seed, seed + 1))
    for made in (Ablate(layer=layer), Ablate(layer=layer, mode="mean", value=vector(seed))):
        assert torch.equal(run(model, one, made), run(model, other, made))


@settings(max_examples=20)
@given(row=st.integers(0, 2), layer=LAYERS, site=SITES, seed=SEEDS)
def test_an_edit_leaves_other_rows_and_earlier_layers_bit_identical(row: int, layer: int, site: str, seed: int) -> None:
    model, inputs, clean = shared()
    made = Add(site=site, layer=layer, vector=5 * vector(seed), rows=[row])
    moved, others = run(model, inputs, made), [r for r in range(3) if r != row]
    assert torch.equal(moved[others], clean[others])
    assert not torch.equal(moved[row], clean[row])
    before = capture(model, inputs, ["z", "resid_post"], positions="all")
    with edit(model, made):
        after = capture(model, inputs, ["z", "resid_post"], positions="all")
    for key in before:
        if key[1] < layer:
            assert torch.equal(before[key], after[key])
    assert not torch.equal(before["resid_post", layer][row], after["resid_post", layer][row])
