"""What a page says of a latent is what a plain forward pass says, and both file forms hold it as others read it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import step_model
import torch

from emocircuits.errors import InputError

pytest.importorskip("sae_lens", reason="sae-lens is not installed: emocircuits[sae]")

from saes.metrics import random_sae
from saes.pages import Bars, latent_pages
from saes.publish import html_page, neuronpedia

KEY = ("resid_post", 1)
TEXTS = [*step_model.TEXTS, "Wait, is it 12? No.\n\nIt is 13, I think, because the sum of the two is odd.\n\nSo 13."]


@pytest.fixture(scope="module")
def made():
    """A tiny model, its tokenizer, an SAE of random rows, and the residual stream [T, 16] of each text."""
    model, tokenizer = step_model.model(), step_model.tokenizer()
    with torch.no_grad():
        streams = [
            model(torch.tensor([tokenizer(t)["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
            for t in TEXTS
        ]
    return model, tokenizer, random_sae(torch.cat([s[1:] for s in streams]), 24, 3), streams


@pytest.fixture(scope="module")
def pages(made):
    model, tokenizer, sae, _ = made
    return latent_pages(model, tokenizer, sae, KEY, TEXTS, range(24), top=6, before=5, after=3, batch_size=2)


class TestPages:
    def test_counts_are_those_of_a_plain_forward(self, made, pages):
        _, _, sae, streams = made
        codes = torch.cat([sae.encode(s[1:]) for s in streams])  # the begin token is no part of a step
        assert any(p.maximum > 0 for p in pages)
        for page in pages:
            column = codes[:, page.latent].clamp_min(0)
            assert (page.n_texts, page.n_tokens) == (len(TEXTS), len(codes))
            assert page.density == pytest.approx(float((column > 0).double().mean()))
            assert page.maximum == pytest.approx(float(column.max()), abs=1e-5)
            assert sum(page.activations.counts) == int((column > 0).sum())

    def test_contexts_show_tokens_with_their_activation(self, made, pages):
        _, tokenizer, sae, streams = made
        for page in pages:
            for context in (c for g in page.groups for c in g.contexts):
                text, values = int(context.trace), sae.encode(streams[int(context.trace)][1:])[:, page.latent]
                words = [tokenizer.decode([t]) for t in tokenizer(TEXTS[text])["input_ids"][1:]]
                starts = [i for i in range(len(words)) if tuple(words[i : i + len(context.tokens)]) == context.tokens]
                at = [
                    i for i in starts
                    if np.allclose(values[i : i + len(context.tokens)].clamp_min(0), context.values, atol=1e-5)
                ]  # fmt: skip
                assert at, "the tokens stand in their text, with these activations"
                assert context.peak <= 5
                assert len(context.tokens) <= 9

    def test_strongest_first_and_intervals_cover_what_fires(self, pages):
        for page in pages:
            if not page.groups:
                assert page.maximum == 0
                continue
            first, *others = page.groups
            peaks = [c.values[c.peak] for c in first.contexts]
            assert peaks == sorted(peaks, reverse=True)
            assert peaks[0] == pytest.approx(page.maximum)
            assert sum(g.share for g in others if g.share is not None) == pytest.approx(1)
            for group in others:
                assert all(group.low - 1e-6 <= c.values[c.peak] <= group.high + 1e-6 for c in group.contexts)

    def test_words_are_those_of_the_direct_path(self, made, pages):
        model, tokenizer, sae, _ = made
        row = sae.W_dec[3]
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(row[None]))[0]
        assert [w for w, _ in pages[3].promoted] == [tokenizer.decode([i]) for i in logits.topk(10).indices.tolist()]
        lowest = (-logits).topk(10).indices
        assert np.allclose([v for _, v in pages[3].suppressed], logits[lowest].numpy(), atol=1e-5)

    def test_the_same_seed_draws_the_same_contexts(self, made, pages):
        model, tokenizer, sae, _ = made
        again = latent_pages(model, tokenizer, sae, KEY, TEXTS, [4, 2], top=6, before=5, after=3, batch_size=1)
        assert [p.latent for p in again] == [4, 2]
        for page in again:
            assert [c.tokens for g in page.groups for c in g.contexts] == [
                c.tokens for g in pages[page.latent].groups for c in g.contexts
            ]

    def test_latents_that_do_not_exist(self, made):
        model, tokenizer, sae, _ = made
        for latents in ([], [24], [-1]):
            with pytest.raises(InputError, match="0 to 23"):
                latent_pages(model, tokenizer, sae, KEY, TEXTS, latents)


# What SAEDashboard 0.8 reads back into its own classes: it refuses any other name.
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt",
    "dataset", "decoder_weights_dist", "vector", "activations",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


class TestNeuronpedia:
    def test_batches_hold_every_page(self, pages, tmp_path):
        many = [replace(page, latent=i) for i in range(130) for page in pages[:1]]
        files = neuronpedia(many, tmp_path, model_id="tiny", key=KEY, name="steps", dataset="ours")
        assert [f.name for f in files] == ["batch-0.json", "batch-1.json"]
        found = [json.loads(f.read_text()) for f in files]
        assert [x["feature_index"] for b in found for x in b["features"]] == list(range(130))
        assert (found[0]["model_id"], found[0]["layer"], found[0]["sae_set"]) == ("tiny", 1, "steps")

    def test_fields_are_those_that_are_read_back(self, pages, tmp_path):
        (file,) = neuronpedia(pages, tmp_path, model_id="tiny", key=KEY, name="steps")
        for feature, page in zip(json.loads(file.read_text())["features"], pages):
            assert set(feature) == FEATURE
            assert len(feature["pos_str"]) == len(feature["pos_values"]) == 10
            assert len(feature["correlated_features_indices"]) == len(feature["correlated_features_pearson"])
            assert sum(feature["freq_hist_data_bar_heights"]) == round(page.density * page.n_tokens)
            for activation in feature["activations"]:
                assert set(activation) == ACTIVATION
                assert len(activation["tokens"]) == len(activation["values"])
                peak = activation["values"][activation["qualifying_token_index"]]
                assert peak <= activation["bin_max"] + 1e-3
                assert (activation["bin_min"] == -1) == (activation["bin_contains"] == -1)

    def test_nothing_to_write(self, tmp_path):
        with pytest.raises(InputError, match="no pages"):
            neuronpedia([], tmp_path, model_id="tiny", key=KEY, name="steps")


class TestHtml:
    def test_one_page_that_loads_nothing(self, pages, tmp_path):
        text = html_page(pages, tmp_path / "latents.html", "Latents").read_text("utf-8")
        assert not re.search(r"""(src|href)=["']https?:""", text.split("<script", 1)[0])
        for page in pages:
            assert f'id="latent-{page.latent}"' in text

    def test_tokens_are_text(self, pages, tmp_path):
        page = next(p for p in pages if p.groups)
        evil = replace(
            page.groups[0].contexts[0], tokens=("<img src=x onerror=alert(1)>",) * 2, values=(1.0, 0.0), peak=0
        )
        hostile = replace(
            page, name="<b>x</b>", promoted=(("<i>", 1.0),), groups=(replace(page.groups[0], contexts=(evil,)),)
        )
        text = html_page([hostile], tmp_path / "latents.html", "<u>").read_text("utf-8")
        assert "<img src=x" not in text
        assert "<b>x" not in text
        assert "<i>" not in text
        assert "<u>" not in text
        assert "&lt;img src=x" in text

    def test_a_latent_that_never_fires_says_so(self, pages, tmp_path):
        silent = replace(pages[0], density=0.0, maximum=0.0, activations=Bars((), ()), groups=(), beside=())
        assert "Never fires" in html_page([silent], tmp_path / "latents.html", "L").read_text("utf-8")
        with pytest.raises(InputError, match="no pages"):
            html_page([], tmp_path / "latents.html", "L")
