"""SAEs in a model: what they cost it, whether they stand where they say, and what of others can be loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import step_model
import torch
from step_model import TEXTS
from torch.nn.functional import log_softmax, nll_loss

pytest.importorskip("sae_lens")

from emocircuits.errors import ArtefactError, InputError
from saes.collect import collect
from saes.interop import check_hook, check_on_model, export, load_sae, neighbours, stated_place
from saes.lens import hook_name, parse_hook
from saes.metrics import LinearCoder, explained_variance
from saes.recipe import Recipe
from saes.splice import recovery, spliced
from saes.tokens import place_steps
from saes.train import train
from saes.vectors import stored

KEY = ("resid_post", 1)
WORDS = ["sum", "is", "I", "so", "Wait", "no", "the", "step", "First", "12", "13", "think", "Let", "me", "believe"]


@pytest.fixture(scope="module")
def lm():
    return step_model.model(), step_model.tokenizer()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(WORDS), (60, 30), generator=generator).tolist()
    return [".\n\n".join(" ".join(WORDS[i] for i in row[j : j + 6]) for j in range(0, 30, 6)) for row in pick]


@pytest.fixture(scope="module")
def trained(lm, texts, tmp_path_factory):
    """An SAE on all tokens of resid_post 1."""
    folder = tmp_path_factory.mktemp("sae")
    store = collect(*lm, texts, folder / "store", layers=1, reduce="all")
    recipe = Recipe("topk", width=64, k=6, batch_size=500, epochs=30, lr=1e-2)
    return train(stored(store), recipe, folder / "run", progress=False)[KEY]


def exact(d=16):
    return LinearCoder(torch.zeros(d), torch.eye(d), lambda codes: codes)


def nothing(d=16):
    return LinearCoder(torch.zeros(d), torch.eye(d), torch.zeros_like)


class TestRecovery:
    @pytest.mark.parametrize("at", ["closing", "all"])
    def test_ends_of_the_scale(self, lm, at):
        """An exact code costs nothing, and an empty one is the same as zeros."""
        all_of_it = recovery(*lm, TEXTS, exact(), KEY, at=at)
        assert all_of_it.loss_sae == pytest.approx(all_of_it.loss, abs=1e-5)
        assert all_of_it.kl == pytest.approx(0, abs=1e-5)
        assert all_of_it.kl_recovered == pytest.approx(1, abs=1e-4)
        none_of_it = recovery(*lm, TEXTS, nothing(), KEY, at=at)
        assert none_of_it.loss_sae == pytest.approx(none_of_it.loss_zero)
        assert none_of_it.kl == pytest.approx(none_of_it.kl_zero)
        assert none_of_it.kl > 0.01
        assert none_of_it.recovered == pytest.approx(0) or math.isnan(none_of_it.recovered)

    def test_against_a_hook_of_one_s_own(self, lm):
        model, tokenizer = lm
        coder = replace(exact(), keep=lambda codes: codes * (codes > 0.5))
        found = recovery(model, tokenizer, TEXTS, coder, KEY)
        loss, kl, n, spliced_tokens = 0.0, 0.0, 0, 0
        for item in place_steps(model, tokenizer, TEXTS, "closing"):
            ids, where = torch.tensor([item.ids]), [a for a, _ in item.read]

            def replaced(_, __, output, where=where):
                new = output.clone()
                new[0, where] = coder.decode(coder.encode(output[0, where]))
                return new

            with torch.no_grad():
                clean = log_softmax(model(ids).logits[0], -1)
                handle = model.model.layers[1].register_forward_hook(replaced)
                moved = log_softmax(model(ids).logits[0], -1)
                handle.remove()
            scored = slice(where[0], -1)
            loss += float(nll_loss(moved[scored], ids[0, where[0] + 1 :], reduction="sum"))
            kl += float((clean.exp() * (clean - moved))[scored].sum())
            n += ids.shape[1] - 1 - where[0]
            spliced_tokens += len(where) * (ids.shape[1] - 1 > where[0])
        assert (found.n, found.spliced) == (n, spliced_tokens)
        assert found.loss_sae == pytest.approx(loss / n, rel=1e-4)
        assert found.kl == pytest.approx(kl / n, rel=1e-3)

    def test_a_trained_sae_recovers_most(self, lm, texts, trained):
        found = recovery(*lm, texts[:8], trained.sae, KEY, at="all")
        assert found.kl_recovered > 0.7

    def test_the_model_is_left_as_it_was(self, lm):
        ids = torch.arange(10)[None]
        before = lm[0](ids).logits
        with spliced(lm[0], nothing(), KEY):
            assert not torch.equal(lm[0](ids).logits, before)
        assert torch.equal(lm[0](ids).logits, before)

    def test_heads_are_put_side_by_side(self, lm):
        ids = torch.arange(10)[None]
        with spliced(lm[0], exact(), ("z", 1)):
            torch.testing.assert_close(lm[0](ids).logits, lm[0](ids).logits)

    def test_bad_input(self, lm, trained):
        with pytest.raises(InputError, match="size 8, and resid_post of this model has 16"):
            recovery(*lm, TEXTS, exact(8), KEY)
        with pytest.raises(InputError, match="no token follows"):
            recovery(*lm, ["one step"], exact(), KEY)
        other = step_model.model()
        with torch.no_grad():
            other.lm_head.weight += 1
            other.model.embed_tokens.weight += 1
        with pytest.raises(ArtefactError, match="other weights"):
            recovery(other, lm[1], TEXTS, trained.sae, KEY)


class TestHooks:
    def test_the_right_hook_is_confirmed(self, lm, texts, trained):
        report = check_on_model(trained.sae, *lm, texts)
        assert report.as_stated
        assert "the stated hook resid_post 1 fits" in report.verdict

    def test_a_wrong_hook_is_named(self, lm, texts, trained):
        sae = trained.sae
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
        report = check_on_model(sae, *lm, texts)
        assert (report.stated, report.place, report.factor) == (("resid_pre", 1), KEY, 1)
        assert "the stated hook resid_pre 1 looks wrong" in report.verdict
        assert "use resid_post 1" in report.verdict

    def test_a_missing_scale_is_found_and_folded_on_export(self, lm, texts, trained, tmp_path):
        sae = trained.sae
        sae.fold_activation_norm_scaling_factor(1 / 16)  # now it wants vectors times 16
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
        report = check_on_model(sae, *lm, texts)
        assert (report.place, report.factor) == (KEY, 16)
        assert "times 16" in report.verdict
        fixed = load_sae(export(sae, tmp_path / "fixed", place=report.place, factor=report.factor))
        assert check_on_model(fixed, *lm, texts).as_stated
        x = torch.randn(50, 16)
        torch.testing.assert_close(fixed(x), trained.sae(x), rtol=1e-4, atol=1e-4)

    def test_a_stranger_is_told_so(self, lm, texts):
        torch.manual_seed(0)
        stranger = LinearCoder(torch.zeros(16), torch.linalg.qr(torch.randn(16, 16))[0], lambda c: c * (c > 3))
        x = torch.randn(100, 16)
        report = check_hook(stranger, {KEY: x}, KEY)
        assert "belongs to another model" in report.verdict

    def test_vectors_without_a_stated_hook(self, trained, texts, lm):
        x = torch.randn(64, 16)
        report = check_hook(exact(), {("resid_pre", 0): x, KEY: 2 * x}, None)
        assert "no hook is stated" in report.verdict
        with pytest.raises(InputError, match="vectors of the stated place"):
            check_hook(exact(), {KEY: x}, ("mlp_out", 0))

    @pytest.mark.parametrize(
        ("key", "around"),
        [
            (("resid_post", 1), [("resid_pre", 1), ("resid_post", 2)]),
            (("resid_pre", 1), [("resid_pre", 0), ("resid_post", 1)]),
            (("resid_pre", 0), [("resid_post", 0)]),
            (("resid_post", 2), [("resid_pre", 2)]),
            (("resid_mid", 1), [("resid_pre", 1), ("resid_post", 1)]),
            (("mlp_out", 0), [("mlp_out", 1), ("resid_pre", 0), ("resid_post", 0)]),
        ],
    )
    def test_neighbours(self, key, around):
        assert neighbours(key, 3) == [key, *around]

    @pytest.mark.parametrize("key", [("resid_mid", 0), ("z", 11), ("mlp_post", 3), KEY])
    def test_names(self, key):
        assert parse_hook(hook_name(key)) == key

    @pytest.mark.parametrize("name", [None, "", "ln_final.hook_normalized", "blocks.1.hook_out"])
    def test_names_of_other_places(self, trained, name):
        with pytest.raises(InputError, match="names no place"):
            parse_hook(name)
        sae = trained.sae
        sae.cfg.metadata.hook_name = name
        assert stated_place(sae) is None


class TestFiles:
    def test_what_is_no_sae(self, tmp_path, trained):
        with pytest.raises(InputError, match="no folder with an SAE"):
            load_sae(tmp_path)
        (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk"}))
        with pytest.raises(ArtefactError, match="cannot load"):
            load_sae(tmp_path)
        with pytest.raises(InputError, match="holds an SAE already"):
            export(trained.sae, tmp_path)

    def test_a_hub_that_does_not_have_it(self):
        with pytest.raises(ArtefactError, match="cannot load nothing of gpt2-small-res-jb: ID nothing not found"):
            load_sae("gpt2-small-res-jb", "nothing")

    def test_round_trip(self, trained, tmp_path):
        export(trained.sae, tmp_path / "copy")
        x = torch.randn(20, 16)
        again = load_sae(tmp_path / "copy")
        assert torch.equal(again(x), trained.sae(x))
        assert again.cfg.metadata.emocircuits == trained.sae.cfg.metadata.emocircuits
        assert explained_variance(x, x) == 1
