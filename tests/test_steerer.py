"""Steerers: arithmetic, rows of one batch, files, and leaving no trace."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.errors import ArtefactError, HookError, InputError
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, Term


def steerer(name: str = "a", seed: int = 0, layers: tuple[int, ...] = (1, 2), strength: float = 1.0, **kw) -> Steerer:
    vectors = torch.randn(len(layers), 32, generator=torch.Generator().manual_seed(seed))
    return Steerer((Term("resid_post", layers, vectors, strength, **kw),), name)


@pytest.fixture
def llama():
    return zoo.build("llama")


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@given(x=st.floats(-2, 2), y=st.floats(-2, 2))
def test_sums_and_multiples_equal_the_summed_vectors(x: float, y: float) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    a, b = steerer("a", 1), steerer("b", 2)
    by_hand = Steerer((Term("resid_post", (1, 2), x * a.terms[0].vectors + y * b.terms[0].vectors),))
    with (x * a + y * b).attach(model, strict=False):
        together = logits(model, inputs)
    with by_hand.attach(model, strict=False):
        torch.testing.assert_close(logits(model, inputs), together, atol=1e-4, rtol=1e-4)


def test_zero_strength_and_detaching_are_bit_identical(llama) -> None:
    inputs = zoo.inputs("llama", llama)
    clean = logits(llama, inputs)
    with (0.0 * steerer()).attach(llama):
        assert torch.equal(logits(llama, inputs), clean)
    with steerer().attach(llama):
        assert not torch.allclose(logits(llama, inputs), clean, atol=1e-2)
    assert torch.equal(logits(llama, inputs), clean)
    made = steerer().install(llama)
    assert not torch.equal(logits(llama, inputs), clean)
    made.remove()
    made.remove()
    assert torch.equal(logits(llama, inputs), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_every_row_gets_its_own_steerer(llama) -> None:
    inputs = zoo.inputs("llama", llama, batch=3)
    parts = [steerer("a", 1, strength=0.7), None, steerer("b", 2, layers=(0,))]
    with Steerer.rows(parts).attach(llama):
        together = logits(llama, inputs)
    for i, part in enumerate(parts):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        if part is None:
            alone = logits(llama, row)
        else:
            with part.attach(llama):
                alone = logits(llama, row)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_generation_with_beams_repeats_rows(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, batch=2, length=5)
    kinds = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    parts = [steerer("a", 1, strength=3.0), steerer("b", 2, strength=3.0)]
    with Steerer.rows(parts).attach(model):
        together = model.generate(**inputs, **kinds)
    for i, part in enumerate(parts):
        with part.attach(model):
            alone = model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **kinds)
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)


def test_generated_positions_leave_the_prompt_alone(llama) -> None:
    inputs = zoo.inputs("llama", llama, batch=1, length=5)
    kinds = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    clean = llama.generate(**inputs, **kinds)
    with steerer(strength=5.0, positions="generated").attach(llama):
        moved = llama.generate(**inputs, **kinds)
    assert torch.equal(clean.scores[0], moved.scores[0])
    assert not torch.equal(clean.scores[1], moved.scores[1])
    with pytest.raises(HookError, match="resid_post.*never fired"), steerer(positions="generated").attach(llama):
        logits(llama, inputs)


def test_files_round_trip_and_know_their_model(llama, tmp_path) -> None:
    made = Steerer(
        (Term("resid_post", (1, 2), torch.randn(2, 32), 0.5, "generated"),), "anger", fingerprint(llama), {"ppl": 12.0}
    )
    again = Steerer.load(made.save(tmp_path / "anger.safetensors"))
    assert torch.equal(again.terms[0].vectors, made.terms[0].vectors)
    assert (again.name, again.strength, again.cost) == ("anger", 0.5, {"ppl": 12.0})
    assert again.check(llama) is None
    assert "other weights" in str(again.check(zoo.build("llama", seed=1)))
    with pytest.raises(ArtefactError, match="made for"), again.attach(zoo.build("gpt2")):
        pass


def test_bad_steerers_are_refused(llama) -> None:
    with (
        pytest.raises(ArtefactError, match="has width 16"),
        Steerer((Term("resid_post", (0,), torch.ones(1, 16)),)).attach(llama),
    ):
        pass
    with pytest.raises(InputError, match="layer 9"), steerer(layers=(9,)).attach(llama):
        pass
    with pytest.raises(InputError, match="choose from all, prompt"):
        steerer(positions="now")
    with pytest.raises(InputError, match="finite"):
        steerer().with_strength(float("nan"))
    with pytest.raises(InputError, match="at least one"):
        Steerer.rows([None])
    with pytest.raises(InputError, match="rows"), Steerer.rows([steerer(), steerer()]).attach(llama):
        logits(llama, zoo.inputs("llama", llama, batch=3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
