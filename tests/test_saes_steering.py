"""Steering by latents does what the formula says, at the tokens it says, and its controls are matched."""

from __future__ import annotations

import pytest
import step_model
import torch
from torch.nn.functional import normalize
from transformers import DynamicCache

from emocircuits.activations import capture, record
from emocircuits.errors import InputError
from emocircuits.steering import Steerer, StepEnds, step_ends
from saes.features import Activity
from saes.metrics import LinearCoder
from saes.steering import component_steerer, latent_steerer, matched_latents
from saes.tokens import place_steps

KEY = ("resid_post", 1)
ROWS = normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
SAE = LinearCoder(torch.zeros(16), ROWS, lambda codes: codes)


@pytest.fixture(scope="module")
def lm():
    return step_model.model(), step_model.tokenizer()


def activity(maximum=None, density=None):
    maximum = torch.arange(20.0) if maximum is None else maximum
    return Activity(torch.full((20,), 0.1) if density is None else density, maximum, maximum / 2)


def residual(model, ids):
    return capture(model, ids, *KEY, positions="all")[KEY][0]


class TestLatent:
    @pytest.mark.parametrize("dose", [-2.0, 0.5, 1.0])
    def test_dose_is_in_maxima(self, lm, dose):
        ids = torch.arange(12)[None]
        clean = residual(lm[0], ids)
        with latent_steerer(lm[0], SAE, KEY, 3, activity(), dose=dose, positions="all").attach(lm[0]):
            torch.testing.assert_close(residual(lm[0], ids), clean + dose * 3.0 * ROWS[3])

    def test_composes_and_survives_a_file(self, lm, tmp_path):
        a, b = (latent_steerer(lm[0], SAE, KEY, i, activity(), positions="all") for i in (3, 4))
        both = (a + 0.5 * b).save(tmp_path / "both")
        ids = torch.arange(12)[None]
        clean = residual(lm[0], ids)
        with Steerer.load(both).attach(lm[0]):
            torch.testing.assert_close(residual(lm[0], ids), clean + 3 * ROWS[3] + 2 * ROWS[4])
        assert a.provenance["unit"] == "maximum activation"

    def test_bad_input(self, lm):
        with pytest.raises(InputError, match="latent 20 does not exist"):
            latent_steerer(lm[0], SAE, KEY, 20, activity())
        with pytest.raises(InputError, match="fires nowhere"):
            latent_steerer(lm[0], SAE, KEY, 0, activity())
        with pytest.raises(InputError, match="reads vectors of size 8"):
            latent_steerer(lm[0], LinearCoder(torch.zeros(8), torch.eye(8), lambda c: c), KEY, 1, activity())


class TestComponent:
    @pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.0, 2.0])
    def test_scales_the_component_at_step_ends_only(self, lm, scale):
        model, tokenizer = lm
        ids = torch.tensor([tokenizer(step_model.TEXTS[0])["input_ids"]])
        ends = {a for a, _ in place_steps(model, tokenizer, [step_model.TEXTS[0]], "closing")[0].read[:-1]}
        clean, w = residual(model, ids), ROWS[5]
        steerer = component_steerer(model, KEY, 7 * w, scale, control=step_ends(tokenizer), positions="all")
        with steerer.attach(model, strict=scale != 1):
            moved = residual(model, ids)
        for token in range(ids.shape[1]):
            own = clean[token] @ w
            expected = clean[token] + (scale - 1) * own * w if token in ends else clean[token]
            torch.testing.assert_close(moved[token], expected, rtol=1e-4, atol=1e-5)

    def test_prompts_are_left_alone_while_generating(self, lm):
        model, tokenizer = lm
        ids = torch.tensor([tokenizer("First.\n\nSecond.\n\n")["input_ids"]])
        steerer = component_steerer(model, KEY, ROWS[5], 0.0, control=step_ends(tokenizer))
        clean = model(ids).logits
        with steerer.attach(model, strict=False):
            assert torch.equal(model(ids).logits, clean)

    @pytest.mark.parametrize("direction", [torch.zeros(16), torch.ones(8), torch.full((16,), torch.nan)])
    def test_bad_directions(self, lm, direction):
        with pytest.raises(InputError, match="16 finite numbers"):
            component_steerer(lm[0], KEY, direction, 0.0)


class TestStepEnds:
    @pytest.mark.parametrize("text", [*step_model.TEXTS, "a\n\nb", "a\n \n b", "one\ntwo\nthree", "x\n\n\n\ny"])
    def test_are_where_blank_lines_end(self, lm, text):
        """In one pass and token by token through the cache: where a token's last line break is the second of two."""
        model, tokenizer = lm
        ids = tokenizer(text)["input_ids"]
        pieces = [tokenizer.decode([i]) for i in ids]
        expected = set()
        for i, piece in enumerate(pieces):
            before, line_break, _ = ("".join(pieces[:i]) + piece).rpartition("\n")
            if "\n" in piece and line_break and before.rstrip(" ").endswith("\n"):
                expected.add(i)
        steerer = component_steerer(model, KEY, ROWS[5], 0.0, control=step_ends(tokenizer), positions="all")
        clean = residual(model, torch.tensor([ids]))
        with steerer.attach(model, strict=False):
            whole = residual(model, torch.tensor([ids]))
            assert {i for i in range(len(ids)) if not torch.equal(whole[i], clean[i])} == expected
            cache = DynamicCache()
            with record(model, *KEY, positions="all") as passes:
                for token in ids:
                    model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows = torch.cat([one[KEY][0] for one in passes])
        torch.testing.assert_close(rows, whole, rtol=1e-4, atol=1e-4)
        placed = place_steps(model, tokenizer, [text], "closing")[0]
        assert {a for a, _ in placed.read[:-1]} <= expected

    def test_survives_a_file(self, lm, tmp_path):
        control = step_ends(lm[1])
        saved = component_steerer(lm[0], KEY, ROWS[0], 0.0, control=control).save(tmp_path / "s")
        assert Steerer.load(saved).terms[0].control == control

    def test_a_tokenizer_without_line_breaks(self):
        with pytest.raises(InputError, match="blank line"):
            StepEnds(())


class TestMatched:
    def test_controls_are_like_the_latent(self):
        density = torch.full((20,), 0.3)
        density[:10] = 0.01
        maximum = torch.full((20,), 100.0)
        maximum[:10] = 2.0
        found = matched_latents(SAE, activity(maximum, density), 3, n=2, exclude=[4], max_cosine=0.9)
        assert set(found) <= {0, 1, 2, 5, 6, 7, 8, 9}
        assert len(found) == 2
        assert matched_latents(SAE, activity(maximum, density), 3, n=2, exclude=[4], max_cosine=0.9) == found

    def test_like_directions_are_no_control(self):
        rows = torch.cat([ROWS[:1].repeat(5, 1), torch.eye(16)])
        coder = LinearCoder(torch.zeros(16), rows, lambda c: c)
        ones = torch.ones(21)
        found = matched_latents(coder, Activity(ones, ones, ones), 0, n=3, max_cosine=0.5)
        assert min(found) >= 5

    def test_not_enough(self):
        with pytest.raises(InputError, match="can stand beside"):
            matched_latents(SAE, activity(), 3, n=20)
