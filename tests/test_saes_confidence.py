"""The confidence vector minimises what it says, in the model itself, beside its controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import step_model
import torch
import zoo
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

from emocircuits.activations import Add, capture, edit
from emocircuits.activations.upper import UpperLayers
from emocircuits.errors import ArtefactError, InputError
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, step_ends
from saes.confidence import Confidence, Settings, agreement, by_step, confidence_vector, entropy, learn, slope
from saes.metrics import LinearCoder
from saes.steering import component_steerer, direction_steerer
from saes.tokens import place_steps

KEY = ("resid_post", 0)
ROWS = normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
SAE = LinearCoder(torch.zeros(16), ROWS, lambda codes: codes)
QUICK = Settings(iterations=40, lr=0.05, batch=8, held_out=0.3, draws=3)
TEXTS = [f"{a}.\n\nThe {b} is {i}.\n\nSo {i}" for i, (a, b) in enumerate(zip("pqrstuvw", "abcdefgh"))]


@pytest.fixture(scope="module")
def lm():
    return step_model.model(), step_model.tokenizer()


@pytest.fixture(scope="module")
def found(lm):
    return confidence_vector(*lm, TEXTS, SAE, KEY, QUICK)


def read(lm, texts=TEXTS, key=KEY):
    items = place_steps(*lm, texts, "closing")
    return items, UpperLayers.read(lm[0], key, [i.ids for i in items], [[a for a, _ in i.read] for i in items])


def whole_model(model, items, vector, key=KEY):
    """[steps] entropy of whole passes in which `vector` is added at one step end each: the oracle."""
    out = []
    for item in items:
        for place in item.read:
            with edit(model, [Add(site=key[0], layer=key[1], vector=vector, positions=[[place]])]):
                p = model(torch.tensor([item.ids])).logits[0, place[0]].double().softmax(-1)
            out.append(-(p * p.clamp_min(1e-300).log()).sum())
    return torch.stack(out)


class TestObjective:
    def test_entropy(self):
        logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropy(logits), expected)
        assert torch.isfinite(entropy(1e4 * logits)).all()

    @pytest.mark.parametrize("chunk", [1, 4, 99])
    def test_value_and_gradient_are_those_of_the_whole_model(self, lm, chunk):
        items, upper = read(lm)
        vector = torch.randn(16, generator=torch.Generator().manual_seed(1))
        value, gradient = slope(upper, torch.arange(len(upper)), vector, chunk)
        whole = vector.clone().requires_grad_()
        expected = whole_model(lm[0], items, whole).mean()
        expected.backward()
        assert value == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-3, atol=1e-6)

    def test_gradient_in_latents_equals_finite_differences(self, lm):
        _, upper = read(lm)
        every, offset, eps = torch.arange(len(upper)), 0.3 * torch.randn(24), 0.05
        gradient = ROWS @ slope(upper, every, offset @ ROWS)[1]
        for i in range(0, 24, 5):
            step = torch.zeros(24)
            step[i] = eps
            up, down = (slope(upper, every, (offset + s) @ ROWS)[0] for s in (step, -step))
            assert (up - down) / (2 * eps) == pytest.approx(float(gradient[i]), rel=0.03, abs=2e-4)

    def test_by_step_does_not_depend_on_neighbours(self, lm):
        _, upper = read(lm)
        vector = torch.randn(len(upper), 16, generator=torch.Generator().manual_seed(2))
        together, alone = (by_step(upper, [None, vector], chunk) for chunk in (99, 1))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert (together[1][0] == 0).all()
        assert (together[1][1] > 0).all()

    def test_a_chunk_changes_no_result(self, lm):
        _, upper = read(lm)
        a, b = (learn(upper, torch.arange(len(upper)), ROWS, replace(QUICK, chunk=c))[0] for c in (1, 64))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class TestVector:
    def test_falls_and_its_mirror_image_does_not(self, found):
        train = found.effects["train"]
        assert train["offset"].entropy < train["none"].entropy - 0.1
        assert train["mirrored"].entropy > train["offset"].entropy
        assert train["offset"].entropy < train["random"].entropy
        assert train["offset"].high < 0
        assert found.history[-1] < found.history[0]

    @pytest.mark.parametrize("name", ["gemma3_text", "qwen3"])
    def test_on_other_architectures(self, name):
        model, sae = zoo.build(name), LinearCoder(torch.zeros(32), torch.eye(32), lambda c: c)
        ids = torch.randint(20, 100, (6, 12), generator=torch.Generator().manual_seed(0)).tolist()
        upper, every = UpperLayers.read(model, ("resid_post", 1), ids, [[4, 11]] * 6), torch.arange(12)
        offset, _ = learn(upper, every, sae.W_dec, Settings(iterations=30, lr=0.05, batch=12))
        # A small step along it, for the sign is a statement about the slope.
        small = 0.3 * offset / offset.norm()
        (clean, up, down), _ = by_step(upper, [None, small, -small])
        assert up.mean() < clean.mean() < down.mean()

    def test_measures_what_the_whole_model_does(self, lm, found):
        items, _ = read(lm)
        held = [item for item in items if item.trace in found.held_out]
        for name, vector in (("none", 0 * found.vector), ("offset", found.vector), ("mirrored", -found.vector)):
            effect = found.effects["held_out"][name]
            with torch.no_grad():
                expected = whole_model(lm[0], held, vector)
            assert effect.n == len(expected)
            assert effect.entropy == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found.effects["held_out"]["none"].change == 0

    def test_norm_dense_and_cosines(self, lm, found):
        items, upper = read(lm)
        names = [item.trace for item in items for _ in item.read]
        train = torch.tensor([n not in found.held_out for n in names])
        x = upper.residual[train]
        with torch.no_grad():
            h = whole_model(lm[0], items, torch.zeros(16))[train]
        low = h < h.median()
        dense = x[low].mean(0) - x[~low].mean(0)
        torch.testing.assert_close(found.dense, dense, rtol=1e-4, atol=1e-5)
        assert found.norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
        for name, other in (("mean step vector", x.mean(0)), ("low less high entropy", dense)):
            cosine = torch.nn.functional.cosine_similarity(found.vector, other, dim=0)
            assert found.cosines[name] == pytest.approx(float(cosine), abs=1e-4)

    def test_seeds(self, lm, found):
        again = confidence_vector(*lm, TEXTS, SAE, KEY, QUICK)
        other = confidence_vector(*lm, TEXTS, SAE, KEY, replace(QUICK, seed=1, start=0.2))
        assert torch.equal(again.offset, found.offset)
        assert not torch.equal(other.offset, found.offset)
        assert other.held_out == found.held_out
        cosines = agreement([found, again, other])
        assert float(cosines[0, 1]) == pytest.approx(1, abs=1e-5)
        assert float(cosines[0, 2]) < 0.9999

    def test_latents(self, found):
        top = found.top(SAE, 24)
        assert sum(share for _, _, share in top) == pytest.approx(1, abs=1e-5)
        assert [share for _, _, share in top] == sorted((share for _, _, share in top), reverse=True)
        assert found.direction(SAE, 1) @ ROWS[top[0][0]] == pytest.approx(1.0 if top[0][1] > 0 else -1.0, abs=1e-5)
        torch.testing.assert_close(found.direction(SAE), normalize(found.vector, dim=0))


def planted():
    """A Llama whose upper layers do nothing and whose head says token 7 the more, the more of dimension 0 there is.

    Its last norm only divides by a constant, so that nothing else matters.
    """
    model = step_model.model()
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1e6)
        model.model.norm.variance_epsilon = 1e12
        model.lm_head.weight.zero_()
        model.lm_head.weight[7, 0] = 4.0
    return model


def test_finds_the_one_direction_that_matters():
    lm = planted(), step_model.tokenizer()
    sae = LinearCoder(torch.zeros(16), torch.eye(16), lambda codes: codes)
    found = confidence_vector(*lm, TEXTS, sae, KEY, replace(QUICK, start=0.0))
    ((latent, offset, share),) = found.top(sae, 1)
    assert (latent, offset > 0) == (0, True)
    assert share > 0.99
    assert float(found.direction(sae)[0]) > 0.999
    held = found.effects["held_out"]
    assert held["offset"].entropy < held["none"].entropy < held["mirrored"].entropy
    assert held["top"].entropy == pytest.approx(held["offset"].entropy, rel=1e-3)


class TestSteering:
    def test_doses_are_residual_norms(self, lm, found):
        w, ids = found.direction(SAE, 5), torch.tensor([lm[1](TEXTS[0])["input_ids"]])
        clean = capture(lm[0], ids, *KEY, positions="all")[KEY]
        made = direction_steerer(lm[0], KEY, w, found.norm, dose=-0.5, positions="all")
        with made.attach(lm[0]):
            moved = capture(lm[0], ids, *KEY, positions="all")[KEY]
        torch.testing.assert_close(moved, clean - 0.5 * found.norm * w, rtol=1e-4, atol=1e-5)
        assert made.provenance["unit"] == "residual norm"

    def test_as_a_component_at_step_ends(self, lm, found, tmp_path):
        control = step_ends(lm[1])
        steerer = component_steerer(lm[0], KEY, found.direction(SAE, 5), 2.0, control=control, positions="all")
        again, ids = Steerer.load(steerer.save(tmp_path / "s")), torch.tensor([lm[1](TEXTS[0])["input_ids"]])
        ends = [a for a, _ in place_steps(*lm, TEXTS[:1], "closing")[0].read[:-1]]
        clean = capture(lm[0], ids, *KEY, positions="all")[KEY][0]
        with again.attach(lm[0]):
            moved = capture(lm[0], ids, *KEY, positions="all")[KEY][0]
        assert [i for i in range(len(clean)) if not torch.equal(clean[i], moved[i])] == ends

    @pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_norm_is_positive(self, lm, norm):
        with pytest.raises(InputError, match="positive number"):
            direction_steerer(lm[0], KEY, ROWS[0], norm)


class TestFiles:
    def test_round_trip(self, found, tmp_path):
        again = Confidence.load(found.save(tmp_path / "c"))
        for name in ("offset", "vector", "dense"):
            assert torch.equal(getattr(again, name), getattr(found, name))
        plain = ("key", "norm", "effects", "cosines", "settings", "held_out", "history", "sae", "fingerprint")
        for name in plain:
            assert getattr(again, name) == getattr(found, name), name
        assert again.top(SAE, 3) == found.top(SAE, 3)

    def test_other_files(self, lm, tmp_path):
        saved = direction_steerer(lm[0], KEY, ROWS[0], 1.0).save(tmp_path / "s")
        with pytest.raises(ArtefactError, match="not a 'confidence'"):
            Confidence.load(saved)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_pass(self, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the model ran")

        monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)

    def test_before_any_forward_pass(self, lm):
        wide = LinearCoder(torch.zeros(8), torch.eye(8), lambda c: c)
        for sae, key, texts, message in (
            (wide, KEY, TEXTS, "reads vectors of size 8"),
            (SAE, ("resid_pre", 0), TEXTS, "between two blocks"),
            (SAE, ("attn_out", 1), TEXTS, "between two blocks"),
            (SAE, ("resid_post", 7), TEXTS, "layer 7 does not exist"),
            (SAE, KEY, [], "no steps to read"),
            (SAE, KEY, TEXTS[:1], "from one trace"),
        ):
            with pytest.raises(InputError, match=message):
                confidence_vector(*lm, texts, sae, key, QUICK)

    def test_an_sae_of_another_model(self, lm):
        sae = LinearCoder(torch.zeros(16), ROWS, lambda codes: codes)
        about = {"source": {"model": fingerprint(step_model.model().apply(_redrawn))}}
        metadata = type("M", (), {"emocircuits": about})
        object.__setattr__(sae, "cfg", type("C", (), {"metadata": metadata}))
        with pytest.raises(ArtefactError, match="other weights"):
            confidence_vector(*lm, TEXTS, sae, KEY, QUICK)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"iterations": 0}, "iterations must be at least 1"),
            ({"batch": 0}, "batch must be at least 1"),
            ({"lr": 0.0}, "lr must be positive"),
            ({"held_out": 1.0}, "held_out is a share"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            Settings(**options)

    def test_other_latents(self, found):
        with pytest.raises(InputError, match="another SAE"):
            found.top(LinearCoder(torch.zeros(16), -ROWS, lambda c: c))
        with pytest.raises(InputError, match="from 1 to 24"):
            found.direction(SAE, 0)


def _redrawn(module):
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter)


@pytest.mark.real_model
def test_on_the_demo_model(demo):
    from saes.study import reasoning_traces

    key, rows = ("resid_post", 12), normalize(torch.randn(900, 640, generator=torch.Generator().manual_seed(0)), dim=-1)
    sae = LinearCoder(torch.zeros(640), rows, lambda codes: codes)
    settings = Settings(iterations=15, batch=16, chunk=16, held_out=0.4, draws=1, lr=0.3)
    found = confidence_vector(demo.model, demo.tokenizer, reasoning_traces()[:5], sae, key, settings)
    for part in ("train", "held_out"):
        effects = found.effects[part]
        assert effects["offset"].entropy < effects["none"].entropy
        assert effects["mirrored"].entropy > effects["offset"].entropy
    items = place_steps(demo.model, demo.tokenizer, reasoning_traces()[:1], "closing")
    upper = UpperLayers.read(demo.model, key, [items[0].ids], [[a for a, _ in items[0].read]])
    (h,), _ = by_step(upper, [found.vector])
    with torch.no_grad():
        expected = whole_model(demo.model, items, found.vector, key)
    torch.testing.assert_close(h.double(), expected, rtol=1e-3, atol=1e-3)
