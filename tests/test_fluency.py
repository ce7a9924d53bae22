"""Fluency measures: text-only values known by hand, model values against a brute-force oracle."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from emocircuits.errors import HookError, InputError
from emocircuits.evaluation import fluency, likelihood
from emocircuits.evaluation.fluency import FluencyThresholds, degenerate, fit_thresholds

PROSE = "The meeting moved to Tuesday because the projector in the small room had failed again that morning."
LOOP = "I was walking home. " + "I am so angry. " * 6
ALPHABET = "abcdefghijklmnopqrstuvwxyz ."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, one merged pair "ab", and a BOS: small, but a real fast tokenizer."""
    letters = {char: 4 + i for i, char in enumerate(ALPHABET)}
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **letters, "ab": 40}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.build("llama")


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Next-token log probabilities [T, V] of one unpadded sequence, by the model's own full forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)


def brute_perplexity(model: Any, context: list[int], target: list[int]) -> float:
    logp = log_probs(model, context + target)
    nll = [-logp[len(context) + i - 1, token].item() for i, token in enumerate(target)]
    return math.exp(sum(nll) / len(nll))


# ---------------------------------------------------------------- text only


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        (LOOP, True),
        ("no no no", True),
        ("tick tock " * 2 + "and then the clock went quiet for good", False),  # two repeats are not a loop
        (
            "so so so happy that the long summer holiday had finally come to our street",
            False,
        ),  # 3 of 14 words
        ("one two three four five six seven eight nine " * 4, False),  # the unit is longer than 8 words
        ("a b c d e f g h " * 3, True),
        ("Help! help, HELP. me", True),
        ("", False),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert fluency.loops(text) is expected


def test_a_loop_counts_its_unfinished_last_unit() -> None:
    assert fluency.repetition("x y z x y z x y z x y q").loop == 11 / 12


def test_repetition_by_hand() -> None:
    found = fluency.repetition("the cat saw the cat")
    assert found.ngrams == pytest.approx((2 / 5, 1 / 4, 0, 0))
    assert found.loop == 0
    assert fluency.repetition_rate("the cat saw the cat") == pytest.approx(0.65 / 4)
    assert fluency.repetition_rate("a b c d e f g h i") == 0
    assert fluency.repetition_rate(PROSE) < 0.3 < fluency.repetition_rate(LOOP)
    assert math.isnan(fluency.repetition_rate("  ... "))


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=30))
def test_repetition_is_a_share_and_three_times_the_same_is_a_loop(found: list[str]) -> None:
    assert all(0 <= fluency.repetition_rate(" ".join(found * n)) <= 1 for n in (1, 3))
    assert fluency.loops(" ".join(found * 3)) or len(found) > 8


def test_set_measures_by_hand() -> None:
    texts = ["I am here", "I am not", "We are here"]
    assert fluency.distinct_n(texts, 1) == 6 / 9
    assert fluency.distinct_n(texts, 2) == 5 / 6
    assert math.isnan(fluency.distinct_n(["hi"], 2))
    assert fluency.opener_concentration([*texts, ""]) == 2 / 3
    assert math.isnan(fluency.opener_concentration([]))
    assert fluency.length_words("Don't stop — it’s 9 o'clock!") == 5
    with pytest.raises(InputError, match="n-gram length"):
        fluency.distinct_n(texts, 0)


def test_alphabetic_share_knows_other_scripts() -> None:
    assert fluency.alphabetic_share("ab 12") == 0.5
    assert fluency.alphabetic_share("हिन्दी привет 你好") == 1
    assert math.isnan(fluency.alphabetic_share(" "))


def test_content_similarity_pairs_rows() -> None:
    table = {"a": [2.0, 0.0], "b": [0.0, 1.0], "c": [1.0, 1.0], "": [5.0, 5.0]}
    found = fluency.content_similarity(
        ["a", "a", "a", ""], ["a", "b", "c", "a"], lambda t: np.array([table[x] for x in t])
    )
    np.testing.assert_allclose(found, [1, 0, math.sqrt(0.5), math.nan])
    with pytest.raises(InputError, match="give one for each"):
        fluency.content_similarity(["a"], [], lambda t: np.zeros((len(t), 2)))


# ---------------------------------------------------------------- perplexity


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_neox", "qwen3_moe", "qwen2_5_omni", "llava"]
)
def test_perplexity_equals_brute_force_under_padding(name: str, tokenizer: Any) -> None:
    model = zoo.build(name)
    prompts = ["hello there. ", "oh ", "a very long prompt with many words. ", "", "x"]
    texts = ["good day", "z", "so it goes. so it goes. so it goes.", "no prompt here", " y"]
    found = fluency.perplexity(model, tokenizer, prompts, texts, batch_size=3)
    for prompt, text, value in zip(prompts, texts, found):
        target = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(brute_perplexity(model, tokenizer(prompt)["input_ids"], target), rel=1e-4)
    np.testing.assert_allclose(found, fluency.perplexity(model, tokenizer, prompts, texts, batch_size=1), rtol=1e-4)


def test_the_boundary_keeps_the_tokens_of_the_prompt(llama: Any, tokenizer: Any) -> None:
    a, b, ab = (tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ("a", "b", "ab"))
    assert tokenizer("ab")["input_ids"] == [1, ab]
    found = fluency.perplexity(llama, tokenizer, ["xa", "x"], ["b", "ab"])
    x = tokenizer("x")["input_ids"]
    np.testing.assert_allclose(
        found, [brute_perplexity(llama, [*x, a], [b]), brute_perplexity(llama, x, [ab])], rtol=1e-4
    )


def test_bos_is_never_doubled_and_an_appended_eos_never_scored(llama: Any, tokenizer: Any) -> None:
    plain = fluency.perplexity(llama, tokenizer, ["hi "], ["there"])
    np.testing.assert_array_equal(plain, fluency.perplexity(llama, tokenizer, ["<bos>hi "], ["there"]))

    def with_eos(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return {"input_ids": [*ids, 2] if add_special_tokens else ids}

    with_eos.bos_token, with_eos.eos_token, with_eos.eos_token_id = "<bos>", "<eos>", 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(plain, fluency.perplexity(llama, with_eos, ["hi "], ["there"]))


def test_undefined_perplexity_is_nan(llama: Any, tokenizer: Any) -> None:
    found = fluency.perplexity(llama, tokenizer, ["hi", "hi "], ["", "you"])
    assert np.isnan(found).tolist() == [True, False]

    def without_bos(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    found = fluency.perplexity(llama, without_bos, ["", ""], ["z", "zy"])  # nothing comes before the first token
    assert np.isnan(found).tolist() == [True, False]
    assert fluency.perplexity(llama, tokenizer, [], []).shape == (0,)


def test_the_head_only_sees_scored_positions_in_chunks(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, texts = ["a long long prompt. " * 3, "short "], ["some words that go on", "and more"]
    whole = fluency.perplexity(llama, tokenizer, prompts, texts)
    monkeypatch.setattr(likelihood, "_CHUNK_LOGITS", 4 * 128)
    rows: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda m, a, out: rows.append(out.numel() // out.shape[-1]))
    chunked = fluency.perplexity(llama, tokenizer, prompts, texts)
    handle.remove()
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    assert max(rows) <= 4
    checks = 2 * len(texts)  # one position per row, by the model and by us
    assert sum(rows) == checks + sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)


def test_scoring_leaves_the_model_as_it_was(llama: Any, tokenizer: Any) -> None:
    before = log_probs(llama, [1, 5, 6, 7])
    fluency.perplexity(llama, tokenizer, ["hi"], [" there"])
    with pytest.raises(RuntimeError, match="boom"):
        fluency.kl_on_neutral(llama, tokenizer, ["hi"], failing)
    assert torch.equal(log_probs(llama, [1, 5, 6, 7]), before)
    assert not llama.lm_head._forward_pre_hooks


@contextlib.contextmanager
def failing() -> Iterator[None]:
    raise RuntimeError("boom")
    yield


def test_bad_input_is_refused_in_words(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="2 prompts but 1 texts"):
        fluency.perplexity(llama, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(InputError, match="lists of texts"):
        fluency.perplexity(llama, tokenizer, "a", ["c"])
    with pytest.raises(InputError, match="at most 256"):
        fluency.perplexity(llama, tokenizer, ["a"], ["z" * 300])
    with pytest.raises(InputError, match="batch_size"):
        fluency.perplexity(llama, tokenizer, ["a"], ["c"], batch_size=0)
    training = zoo.build("llama").train()
    with pytest.raises(InputError, match="eval"):
        fluency.perplexity(training, tokenizer, ["a"], ["c"])


def test_logits_changed_after_the_head_are_not_scored_silently(tokenizer: Any) -> None:
    model = zoo.build("gemma2")
    model.config.final_logit_softcapping = None  # the model now applies no cap, and neither do we
    fluency.perplexity(model, tokenizer, ["a"], ["b"])

    def double(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(double)
    with pytest.raises(HookError, match="after the LM head"):
        fluency.perplexity(model, tokenizer, ["a"], ["b"])


# ---------------------------------------------------------------- KL


def steering(layer: torch.nn.Module, vector: torch.Tensor) -> Any:
    def add(_module: Any, _args: Any, output: Any) -> torch.Tensor:
        return output + vector

    @contextlib.contextmanager
    def steered() -> Iterator[None]:
        handle = layer.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    return steered


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kl_equals_brute_force(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_CHUNK_LOGITS", 5 * 128)
    model: Any = zoo.build(name)
    texts = ["the train is late.", "tea", "", "rain fell on the roof"]
    steered = steering(model.model.layers[1], torch.linspace(-1, 1, 32))
    total, tokens = 0.0, 0
    for ids in [tokenizer(text)["input_ids"] for text in texts if text]:
        p = log_probs(model, ids)
        with steered():
            q = log_probs(model, ids)
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(ids)
    assert total / tokens > 0.01
    found = fluency.kl_on_neutral(model, tokenizer, texts, steered, batch_size=2)
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_kl_is_zero_without_steering_and_nan_without_text(llama: Any, tokenizer: Any) -> None:
    assert fluency.kl_on_neutral(llama, tokenizer, ["some text", "more"], contextlib.nullcontext) == 0
    assert math.isnan(fluency.kl_on_neutral(llama, tokenizer, ["", " "], contextlib.nullcontext))


def test_kl_sees_steering_of_the_head_itself(llama: Any, tokenizer: Any) -> None:
    bias = torch.linspace(-1, 1, 128)
    found = fluency.kl_on_neutral(llama, tokenizer, ["some text"], steering(llama.lm_head, bias))
    p = log_probs(llama, tokenizer("some text")["input_ids"])
    q = (p + bias).log_softmax(dim=-1)
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(dim=-1).mean()), rel=1e-4)


# ---------------------------------------------------------------- degenerate


def test_thresholds_come_from_unsteered_text() -> None:
    texts = [PROSE] * 20
    fitted = fit_thresholds(texts, [*range(1, 20), math.nan], quantile=0.5, factor=2)
    assert fitted.perplexity == 20
    assert fitted.repetition == fitted.floor == 0.3
    assert (fitted.quantile, fitted.factor, fitted.n_texts) == (0.5, 2, 20)
    repetitive = "we walk and we talk and we walk and we talk and then we rest and we walk"
    assert fit_thresholds([repetitive], [5.0]).repetition == fluency.repetition_rate(repetitive) > 0.3


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        (PROSE, 9.0, ""),
        (PROSE, 11.0, "perplexity 11"),
        (PROSE, math.inf, "perplexity inf"),
        (PROSE, math.nan, "perplexity undefined"),
        ("I am sad", 9.0, "3 words"),
        ("", math.nan, "0 words; perplexity undefined"),
        ("I am fine %% $$ ## @@ !! && now ok", 9.0, "50% letters"),
        (LOOP, 9.0, "loop; repetition 0.86"),
    ],
)
def test_degenerate_names_its_reasons(text: str, score: float, reason: str) -> None:
    limits = FluencyThresholds(perplexity=10.0, repetition=0.4)
    flags, reasons = degenerate([text], [score], limits)
    assert reasons == [reason]
    assert flags.tolist() == [bool(reason)]


def test_bad_thresholds_are_refused() -> None:
    with pytest.raises(InputError, match="quantile"):
        fit_thresholds([PROSE], [1.0], quantile=1.0)
    with pytest.raises(InputError, match="finite perplexity"):
        fit_thresholds([PROSE], [math.nan])
    with pytest.raises(InputError, match="one for each text"):
        degenerate([PROSE], [1.0, 2.0], FluencyThresholds(1.0, 1.0))
