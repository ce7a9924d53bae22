"""Every prompt gets coefficients of its own, by its own entropy, and they steer its own row."""

from __future__ import annotations

import pytest
import step_model
import torch
import zoo
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

from emocircuits.activations import Add, capture, edit
from emocircuits.activations.upper import UpperLayers
from emocircuits.errors import InputError
from emocircuits.reading import pad
from emocircuits.steering import Steerer, step_ends
from saes.confidence import entropy
from saes.mixture import Fit, Mixture, fitted

KEY = ("resid_post", 1)
V = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
MIXTURE = Mixture(V, KEY, 4.0)
PROMPTS = [list(range(20, 31)), [41, 42, 43, 44], list(range(60, 67))]


@pytest.fixture(scope="module")
def model():
    return step_model.model()


def batch(prompts=PROMPTS, side="left"):
    ids, mask = pad(prompts, side, 1)
    return {"input_ids": ids, "attention_mask": mask}


def whole_model(model, ids, coefficients, tokens=1, mixture=MIXTURE):
    """Mean entropy over the last tokens, each edited in a whole pass of its own: the oracle."""
    vector = mixture.norm * coefficients @ normalize(mixture.vectors, dim=-1)
    found = []
    for p in range(len(ids) - tokens, len(ids)):
        with edit(model, [Add(site=mixture.key[0], layer=mixture.key[1], vector=vector, positions=[[(p, p + 1)]])]):
            found.append(entropy(model(torch.tensor([ids])).logits[0, p]))
    return torch.stack(found).mean()


class TestFit:
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_lowers_every_rows_entropy(self, model, tokens):
        found = MIXTURE.fit(model, **batch(), tokens=tokens)
        assert found.shape == (3, 3)
        with torch.no_grad():
            for ids, own in zip(PROMPTS, found):
                before, after = (whole_model(model, ids, c, tokens) for c in (torch.zeros(3), own))
                assert after < before

    def test_is_adam_on_the_whole_models_entropy(self, model):
        """Step for step what an optimiser finds that runs the whole model for every prompt."""
        settings = Fit(steps=4, lr=0.05)
        found = MIXTURE.fit(model, **batch(), tokens=2, settings=settings)
        for ids, own in zip(PROMPTS, found):
            c = torch.zeros(3, requires_grad=True)
            adam = torch.optim.Adam([c], 0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 4)
            for _ in range(4):
                adam.zero_grad()
                whole_model(model, ids, c, 2).backward()
                adam.step()
                schedule.step()
            torch.testing.assert_close(own, c.detach(), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
    def test_neither_padding_nor_neighbours_matter(self, name):
        other = zoo.build(name)
        mixture = Mixture(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), KEY, 5.0)
        left, right = (mixture.fit(other, **batch(side=side)) for side in ("left", "right"))
        alone = torch.cat([mixture.fit(other, torch.tensor([ids])) for ids in PROMPTS])
        torch.testing.assert_close(left, alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(right, alone, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(alone[0], alone[1])

    def test_a_chunk_changes_no_result(self, model):
        one, many = (MIXTURE.fit(model, **batch(), tokens=3, settings=Fit(chunk=c)) for c in (1, 64))
        torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-4)

    def test_leaves_no_gradients_and_no_hooks(self):
        model = step_model.model()
        MIXTURE.fit(model, **batch())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    def test_finds_the_sign_that_is_planted(self):
        planted = step_model.model()
        with torch.no_grad():
            for block in planted.model.layers[2:]:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            planted.model.norm.weight.fill_(1.0)
            planted.lm_head.weight.zero_()
            planted.lm_head.weight[7, 0] = 8.0
            planted.lm_head.weight[9, 0] = -8.0  # less of dimension 0 makes it as sure, of another token
        x = capture(planted, batch(), *KEY)[KEY][:, 0]
        found = Mixture(torch.eye(16)[:2], KEY, 4.0).fit(planted, **batch())
        assert torch.equal(found[:, 0] > 0, x > 0)
        assert (found[:, 0].abs() > 0.03).all()


class TestSteering:
    def test_each_row_of_a_left_padded_batch_writes_as_it_would_alone(self, model):
        coefficients = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.0]])
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
        with MIXTURE.attach(model, coefficients):
            together = model.generate(**batch(), **options)[:, -8:]
        for ids, own, row in zip(PROMPTS, coefficients, together):
            with MIXTURE.attach(model, own[None]):
                assert torch.equal(model.generate(torch.tensor([ids]), **options)[0, -8:], row)
        clean = model.generate(**batch(), **options)[:, -8:]
        assert torch.equal(clean[1], together[1])
        assert not torch.equal(clean, together)

    def test_adds_coefficients_times_norm_times_units(self, model):
        coefficients = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
        inputs = batch()
        clean = capture(model, inputs, *KEY, positions="all")[KEY]
        with MIXTURE.attach(model, coefficients, positions="all"):
            moved = capture(model, inputs, *KEY, positions="all")[KEY]
        expected = 4.0 * coefficients @ normalize(V, dim=-1)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            (moved - clean)[real], expected[:, None].expand_as(clean)[real], rtol=1e-3, atol=1e-4
        )

    def test_at_step_ends_only(self, model):
        tokenizer = step_model.tokenizer()
        rows = [tokenizer(t)["input_ids"] for t in ("One.\n\nTwo", "A longer one, then.\n\nB")]
        inputs, control = batch(rows), step_ends(tokenizer)
        clean = capture(model, inputs, *KEY, positions="all")[KEY]
        with MIXTURE.attach(model, torch.ones(2, 3), positions="all", control=control):
            moved = capture(model, inputs, *KEY, positions="all")[KEY]
        for row, ids in enumerate(inputs["input_ids"]):
            changed = (moved[row] != clean[row]).any(-1).nonzero()[:, 0].tolist()
            texts = [tokenizer.decode([ids[i]]) for i in changed]
            assert len(texts) == 1
            assert texts[0].endswith("\n")

    def test_survives_a_file(self, model, tmp_path):
        made = MIXTURE.steerer(model, torch.ones(3, 3))
        again = Steerer.load(made.save(tmp_path / "m"))
        assert torch.equal(again.terms[0].vectors, made.terms[0].vectors)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_pass(self, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("the model ran")

        monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)

    @pytest.mark.parametrize("vectors", [torch.zeros(0, 16), torch.ones(16)])
    def test_no_directions(self, vectors):
        with pytest.raises(InputError, match="one or more directions"):
            Mixture(vectors, KEY, 1.0)

    def test_no_norm(self):
        with pytest.raises(InputError, match="must be positive"):
            Mixture(V, KEY, 0.0)

    @pytest.mark.parametrize("vectors", [torch.ones(2, 8), torch.zeros(1, 16), torch.full((1, 16), torch.nan)])
    def test_directions_that_do_not_fit(self, model, vectors):
        with pytest.raises(InputError, match="16 finite numbers"):
            Mixture(vectors, KEY, 1.0).fit(model, **batch())
        with pytest.raises(InputError, match="16 finite numbers"):
            Mixture(vectors, KEY, 1.0).steerer(model, torch.ones(1, len(vectors)))

    def test_fitting(self, model):
        ids, mask = batch().values()
        for options, message in (
            ({"input_ids": ids, "attention_mask": mask, "tokens": 5}, "from 1 to 4"),
            ({"input_ids": ids, "attention_mask": mask, "tokens": 0}, "from 1 to 4"),
            ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"must both be \[B, T\]"),
            ({"input_ids": ids[0]}, r"must both be \[B, T\]"),
            ({"input_ids": ids, "attention_mask": 0 * mask}, "row 0 holds no token"),
        ):
            with pytest.raises(InputError, match=message):
                MIXTURE.fit(model, **options)
        with pytest.raises(InputError, match="at least 1"):
            Fit(steps=0)
        with pytest.raises(InputError, match="between two blocks"):
            Mixture(V, ("mlp_out", 1), 1.0).fit(model, ids, mask)

    @pytest.mark.parametrize("shape", [(3, 2), (3,), (0, 3)])
    def test_coefficients_of_other_sizes(self, model, shape):
        with pytest.raises(InputError, match=r"\[B, 3\]"):
            MIXTURE.steerer(model, torch.ones(shape))

    def test_coefficients_that_are_no_numbers(self, model):
        with pytest.raises(InputError, match="NaN"):
            MIXTURE.steerer(model, torch.full((1, 3), torch.nan))


@pytest.mark.real_model
def test_on_the_demo_model(demo):
    key, vectors = ("resid_post", 12), torch.randn(3, 640, generator=torch.Generator().manual_seed(0))
    prompts = [demo.tokenizer(t)["input_ids"] for t in ("I lost my dog today, and", "The answer is", "She felt so")]
    mixture = Mixture(vectors, key, 100.0)
    found = mixture.fit(demo.model, **batch(prompts))
    at = [[len(ids) - 1] for ids in prompts]
    upper = UpperLayers.read(demo.model, key, prompts, at)
    torch.testing.assert_close(found, fitted(upper, 100 * normalize(vectors, dim=-1)), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for ids, own in zip(prompts, found):
            before, after = (whole_model(demo.model, ids, c, 1, mixture) for c in (torch.zeros(3), own))
            assert after < before
