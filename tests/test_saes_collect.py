"""Step vectors are the model's own hidden states at the right tokens, whatever the batch, and survive interruption."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import step_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_model import TEXTS
from transformers import LlamaForCausalLM

from emocircuits.activations.store import ActivationStore
from emocircuits.errors import ArtefactError, InputError
from emocircuits.reasoning.traces import Steps, Trace
from saes.collect import collect, scalings
from saes.tokens import closing_tokens, paragraphs
from saes.vectors import stored


@pytest.fixture(scope="module")
def tokenizer():
    return step_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return step_model.model()


def traces():
    steps = [paragraphs(text) for text in TEXTS]
    labels = [tuple(f"{i}.{j}" for j in range(len(s))) for i, s in enumerate(steps)]
    return [Trace("Question?\n\n", s, "</think>", labels=n, id=f"t{i}") for i, (s, n) in enumerate(zip(steps, labels))]


def by_place(store):
    """{(trace, step): record with its vectors}"""
    return {(r["trace"], r["step"]): (r, {key: store[key][i] for key in store.keys}) for i, r in enumerate(store.meta)}


@torch.no_grad()
def hidden(model, tokenizer, trace):
    """Hidden states of the whole trace alone, by transformers, and the tokenizer's own account of its characters."""
    encoded = tokenizer(trace.prompt + trace.steps.text + trace.ending, return_tensors="pt")
    states = model(encoded["input_ids"], output_hidden_states=True).hidden_states
    return [state[0] for state in states], encoded


class TestVectors:
    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_closing(self, tmp_path, model, tokenizer, batch_size):
        store = collect(model, tokenizer, traces(), tmp_path / "s", layers=[0, 1], batch_size=batch_size)
        found = by_place(store)
        assert len(found) == sum(len(t) for t in traces())
        for trace in traces():
            states, encoded = hidden(model, tokenizer, trace)
            for step, bound in enumerate(trace.steps.bounds[1:]):
                token = encoded.char_to_token(len(trace.prompt) + bound - 1)
                record, vectors = found[trace.id, step]
                assert record["token"] == token
                for layer in (0, 1):
                    torch.testing.assert_close(vectors["resid_post", layer], states[layer + 1][token])

    def test_the_delimiter_may_be_part_of_a_token(self, model, tokenizer, tmp_path):
        ids = tokenizer(TEXTS[0])["input_ids"]
        assert any(tokenizer.decode([i]).endswith(".\n\n") for i in ids)  # what the fixture is for
        store = collect(model, tokenizer, TEXTS, tmp_path / "s", layers=0)
        first = by_place(store)["0", 0][0]
        assert tokenizer.decode(ids[: first["token"] + 1]).endswith("Let me think.\n\n")

    def test_mean_and_all(self, tmp_path, model, tokenizer):
        means = by_place(collect(model, tokenizer, traces(), tmp_path / "m", layers=1, reduce="mean"))
        store = collect(model, tokenizer, traces(), tmp_path / "a", layers=1, reduce="all")
        key = ("resid_post", 1)
        for trace in traces():
            states, encoded = hidden(model, tokenizer, trace)
            bounds = trace.steps.token_bounds(
                [encoded.token_to_chars(i) or (0, 0) for i in range(len(encoded["input_ids"][0]))], len(trace.prompt)
            )
            for step, (a, b) in enumerate(pairwise(bounds)):
                rows = [i for i, r in enumerate(store.meta) if (r["trace"], r["step"]) == (trace.id, step)]
                torch.testing.assert_close(store[key][rows], states[2][a:b], rtol=1e-4, atol=1e-5)
                record, vectors = means[trace.id, step]
                torch.testing.assert_close(vectors[key], states[2][a:b].mean(0), rtol=1e-4, atol=1e-5)
                assert record["tokens"] == b - a == len(rows)

    def test_records(self, tmp_path, model, tokenizer):
        store = collect(model, tokenizer, traces(), tmp_path / "s", layers=0)
        first, last = by_place(store)["t0", 0][0], by_place(store)["t0", 4][0]
        assert (first["text"], last["text"]) == ("Let me think.", "So 13.")
        assert (first["relative"], last["relative"], first["n_steps"]) == (0.0, 1.0, 5)
        assert last["label"] == "0.4"
        assert by_place(store)["t2", 0][0]["relative"] == 0.0
        assert store.header["model"]["architecture"] == "LlamaForCausalLM"

    def test_scalings(self, tmp_path, model, tokenizer):
        store = collect(model, tokenizer, [*TEXTS, "Let me think.\n\nLet me"], tmp_path / "s", layers=[1])
        scaling = scalings(store)["resid_post", 1]
        z = scaling(store["resid_post", 1][:])
        torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
        assert float(z.norm(dim=1).mean()) == pytest.approx(4)
        one = collect(model, tokenizer, TEXTS[2:], tmp_path / "one", layers=[1])
        assert math.isnan(scalings(one)["resid_post", 1].factor)

    def test_other_sites(self, tmp_path, model, tokenizer):
        store = collect(model, tokenizer, TEXTS, tmp_path / "s", sites={"z": [1], "mlp_out": [0, 2]})
        assert store.width(("z", 1)) == store.width(("mlp_out", 2)) == 16
        assert [v.key for v in stored(store)] == [("z", 1), ("mlp_out", 0), ("mlp_out", 2)]


class TestPlaces:
    @given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=20), st.data())
    def test_closing_token_holds_the_last_character(self, tokens, data):
        """Of tokens that tile a text, empty ones among them, it is the one that covers the character before."""
        offsets, at = [], 0
        for size, empty in tokens:
            offsets += [(at, at + size)] + [(0, 0)] * empty
            at += size
        bound = data.draw(st.integers(1, at))
        start, end = offsets[closing_tokens(offsets, [bound])[0]]
        assert start <= bound - 1 < end

    def test_bytes_of_one_character(self):
        """The tokens of an emoji's bytes all span it; the last of them closes the step."""
        assert closing_tokens([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [2, 3]) == [3, 4]

    @given(st.text("ab.\n ", min_size=1, max_size=40).filter(str.strip))
    def test_paragraphs_tile_the_text_and_hold_words(self, text):
        steps = paragraphs(text)
        assert "".join(text[a:b] for a, b in pairwise(steps.bounds)) == text
        assert all(steps.texts)
        assert not any("\n\n" in step for step in steps.texts)


class TestResume:
    @pytest.mark.parametrize("shard_rows", [2, 3, 100])
    def test_goes_on_after_an_interruption(self, tmp_path, model, tokenizer, monkeypatch, shard_rows):
        whole = collect(model, tokenizer, traces(), tmp_path / "whole", batch_size=1)
        create, append = ActivationStore.create, ActivationStore.append
        small = classmethod(lambda _, *args, **kwargs: create(*args, shard_rows=shard_rows, **kwargs))
        monkeypatch.setattr(ActivationStore, "create", small)
        calls = []

        def interrupted(self, *args):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            append(self, *args)

        monkeypatch.setattr(ActivationStore, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(model, tokenizer, traces(), tmp_path / "parts", batch_size=1)
        assert 0 < len(ActivationStore.open(tmp_path / "parts")) < len(whole)
        parts = collect(model, tokenizer, traces(), tmp_path / "parts", batch_size=1, resume=True)
        assert parts.meta == whole.meta
        for key in whole.keys:
            assert torch.equal(parts[key][:], whole[key][:])

    def test_only_the_same_model_and_traces(self, tmp_path, model, tokenizer):
        collect(model, tokenizer, TEXTS, tmp_path / "s", layers=0)
        other = LlamaForCausalLM(model.config).eval()
        with pytest.raises(ArtefactError, match="other weights"):
            collect(other, tokenizer, TEXTS, tmp_path / "s", layers=0, resume=True)
        with pytest.raises(InputError, match="another header"):
            collect(model, tokenizer, TEXTS[:2], tmp_path / "s", layers=0, resume=True)
        with pytest.raises(InputError, match="stores the keys"):
            collect(model, tokenizer, TEXTS, tmp_path / "s", layers=1, resume=True)
        with pytest.raises(ArtefactError, match="other weights"):
            stored(ActivationStore.open(tmp_path / "s"), model=other)


class TestBadInput:
    @pytest.mark.parametrize(
        ("texts", "options", "message"),
        [
            ([], {}, "no steps to read"),
            (["a b", " \n"], {}, "is empty"),
            (TEXTS, {"reduce": "last"}, "unknown reduction"),
            (["word " * 300], {}, "this model reads 256"),
            ([Trace("", Steps("a", (0, 1)), id="x"), Trace("", Steps("b", (0, 1)), id="x")], {}, "called 'x'"),
            (TEXTS, {"layers": 7}, "layer 7 does not exist"),
        ],
    )
    def test_before_any_forward_pass(self, tmp_path, model, tokenizer, texts, options, message):
        with pytest.raises(InputError, match=message):
            collect(model, tokenizer, texts, tmp_path / "s", **options)
        assert not (tmp_path / "s").exists()


@pytest.mark.real_model
def test_gemma_reads_the_line_breaks(demo, tmp_path):
    store = collect(demo.model, demo.tokenizer, [TEXTS[0]], tmp_path / "s", layers=[2])
    ids = demo.tokenizer(TEXTS[0])["input_ids"]
    closing = [demo.tokenizer.decode([ids[record["token"]]]) for record in store.meta]
    assert all(token.endswith("\n\n") for token in closing[:-1])
    assert store.meta[-1]["token"] == len(ids) - 1
