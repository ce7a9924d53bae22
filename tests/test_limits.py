"""Steerers that take a component out or bound it, alone and beside others."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo

from emocircuits.activations import capture
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Ramp, Steerer, Term

UNIT = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)


@pytest.fixture
def llama():
    return zoo.build("llama")


def directions() -> DirectionSet:
    generator = torch.Generator().manual_seed(0)
    vectors, center = torch.randn(3, 4, 32, generator=generator), torch.randn(4, 32, generator=generator)
    return DirectionSet(("joy", "fear", "calm"), "resid_post", (0, 1, 2, 3), vectors, torch.full((4,), 2.0), center)


def component(model, ids, layer: int, unit: torch.Tensor = UNIT) -> torch.Tensor:
    return capture(model, ids, "resid_post", layer, positions="all")["resid_post", layer] @ unit


@pytest.mark.parametrize("mode", ["remove", "cap", "floor"])
def test_the_component_ends_where_it_was_asked_to(llama, mode) -> None:
    ids, found = zoo.inputs("llama", llama, batch=2)["input_ids"], directions()
    made = found.limiter("fear", mode, 0.1, 2)
    unit = found.units[1, 2]
    level = float(found.center[2] @ unit) + 0.1 * 2.0
    clean = component(llama, ids, 2, unit)
    with made.attach(llama):
        steered = component(llama, ids, 2, unit)
    bound = {"remove": lambda c: torch.full_like(c, level), "cap": lambda c: c.clamp(max=level)}
    expected = bound.get(mode, lambda c: c.clamp(min=level))(clean)
    expected[:, 0] = clean[:, 0]  # the attention sink
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    with (0.5 * made).attach(llama):
        torch.testing.assert_close(component(llama, ids, 2, unit), (clean + expected) / 2, atol=1e-4, rtol=1e-4)
    with (0 * made).attach(llama):
        assert torch.equal(component(llama, ids, 2, unit), clean)


def test_nothing_but_the_component_moves(llama) -> None:
    ids, found = zoo.inputs("llama", llama)["input_ids"], directions()
    unit = found.units[0, 1]
    values = []
    for on in (False, True):
        with found.limiter("joy", layers=1, strength=float(on)).attach(llama):
            values.append(capture(llama, ids, "resid_post", 1, positions="all")["resid_post", 1])
    moved = values[1] - values[0]
    torch.testing.assert_close(moved, (moved @ unit)[..., None] * unit, atol=1e-5, rtol=1e-4)


def test_rows_mix_pushes_removals_and_nothing(llama) -> None:
    inputs, found = zoo.inputs("llama", llama, batch=4), directions()
    parts = [
        found.steerer("joy", 0.3, [1, 2]), found.limiter("fear", "cap", 0.0, [2]), None,
        found.limiter("joy", layers=[1], strength=0.5) + found.steerer("fear", 0.2, [2]).when(Ramp(0.5, 1, 4)),
    ]  # fmt: skip
    with torch.no_grad(), Steerer.rows(parts).attach(llama):
        together = llama(**inputs).logits
    for i, part in enumerate(parts):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        with torch.no_grad(), (part or 0 * parts[0]).attach(llama):
            torch.testing.assert_close(together[i : i + 1], llama(**row).logits, atol=1e-4, rtol=1e-4)


def test_removals_come_after_pushes_of_the_same_layer(llama) -> None:
    ids = zoo.inputs("llama", llama)["input_ids"]
    push = Steerer((Term("resid_post", (1,), 3 * UNIT[None]),))
    take = Steerer((Term("resid_post", (1,), UNIT[None], mode="remove"),))
    for both in (lambda: push + take, lambda: take + push):
        with pytest.warns(UserWarning, match="same component"):
            made = both()
        with made.attach(llama):
            torch.testing.assert_close(component(llama, ids, 1), torch.zeros(ids.shape), atol=1e-5, rtol=0)


def test_conflicts_are_said_once_and_only_where_there_are_some() -> None:
    a = Steerer((Term("resid_post", (1, 2), torch.stack([UNIT, UNIT])),), "a")
    b = Steerer((Term("resid_post", (2, 3), -torch.stack([UNIT, UNIT])),), "b")
    with pytest.warns(UserWarning, match="push against each other"):
        both = a + b
    assert len(both.conflicts()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (a + -1.0 * b).conflicts() == []
        assert (a + Steerer((Term("resid_post", (3,), -UNIT[None]),), "c")).conflicts() == []
        assert len((both + 0.0 * a).conflicts()) >= 1


def test_rows_keep_their_own_order_of_limits(llama) -> None:
    inputs, found = zoo.inputs("llama", llama, batch=2), directions()
    make = lambda emotion, mode, level: found.limiter(emotion, mode, level, [2])  # noqa: E731
    parts = [
        make("joy", "remove", 0.0) + make("fear", "cap", -0.5),
        make("fear", "floor", 0.5) + make("calm", "cap", -0.5),
    ]
    with torch.no_grad(), Steerer.rows(parts).attach(llama):
        together = llama(**inputs).logits
    for i, part in enumerate(parts):
        with torch.no_grad(), part.attach(llama):
            alone = llama(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_rows_of_limits_share_one_edit_per_layer() -> None:
    found = directions()
    assert len(Steerer.rows([found.limiter(e) for e in found.emotions]).terms) == 4


def test_half_precision_keeps_small_differences_of_large_numbers() -> None:
    x = 100 + torch.randn(1, 3, 8, dtype=torch.bfloat16)
    unit, level = torch.eye(8)[0], 100.3
    exact = x.float().clone()
    exact[..., 0] = level
    term = Term("resid_post", (0,), unit[None], mode="remove", levels=torch.tensor([level]))
    edit = term.edits()[0]
    torch.testing.assert_close(edit.transform(x).to(torch.bfloat16), exact.to(torch.bfloat16))


def test_parts_of_different_models_are_refused(llama) -> None:
    a = Steerer((Term("resid_post", (1,), UNIT[None]),), "a", fingerprint(llama))
    b = Steerer((Term("resid_post", (1,), UNIT[None]),), "b", fingerprint(zoo.build("gpt2")))
    for combine in (lambda: a + b, lambda: Steerer.rows([a, None, b]), lambda: Steerer.sequence([(a, 2), (b, None)])):
        with pytest.raises(InputError, match="different models"):
            combine()


def test_other_strengths_and_places_have_no_cost_card() -> None:
    a = Steerer((Term("resid_post", (1,), UNIT[None]),), "a", cost={"x": 1})
    assert all(
        s.cost is None for s in (a.at("last"), a.with_strength(2), 2 * a, a.when(Ramp(0, 1, 2)), a + a, a.steady())
    )


def test_limits_travel_in_files(llama, tmp_path) -> None:
    ids, found = zoo.inputs("llama", llama)["input_ids"], directions()
    made = found.limiter("fear", "floor", 0.2, [1, 2], strength=0.7, positions="last")
    again = Steerer.load(made.save(tmp_path / "cap.safetensors"))
    assert (again.terms[0].mode, again.strength, again.terms[0].positions) == ("floor", 0.7, "last")
    values = []
    for one in (made, again):
        with torch.no_grad(), one.attach(llama):
            values.append(llama(ids).logits)
    assert torch.equal(*values)


def test_bad_limits_are_refused(llama) -> None:
    with pytest.raises(InputError, match="choose from add, remove, cap, floor"):
        Term("resid_post", (1,), UNIT[None], mode="raise")
    with pytest.raises(InputError, match="not at 'z'"):
        Term("z", (1,), UNIT[None], heads=4, mode="remove")
    with pytest.raises(InputError, match="levels"):
        Term("resid_post", (1,), UNIT[None], mode="cap", levels=torch.zeros(2))
    with (
        pytest.raises(InputError, match="direction. is zero"),
        Steerer((Term("resid_post", (1,), 0 * UNIT[None], mode="remove"),)).attach(llama),
    ):
        pass
