"""Rollouts of a model here: equal to plain recomputation and to generate(), alone or in company, on any cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from served import hooks, tiny
from served import tokenizer as letters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from emocircuits.errors import InputError
from emocircuits.reasoning.engines import Completion, Job, LocalEngine, Sampling, draw
from emocircuits.reasoning.prefixes import SEAM, Prefixes
from emocircuits.serving.batch import Decoder

TEXT = "We know that 2 + 2 is four. Then the other thing is that the rest of them are there. So it is then."
CUTS = (0, 12, 28, 41, 44, 70, len(TEXT))
ARCHITECTURES = ("llama", "gemma3_text", "mistral", "gemma2", "gpt2", "gpt_neox", "qwen3_moe", "qwen2_5_vl")
RECURRENT = "minicpmv4_6"
BROKEN = "\N{REPLACEMENT CHARACTER}"


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens cross the cuts, and whose decoder drops the space that a text begins with."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    core.decoder = decoders.Metaspace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False)
    core.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def jobs(per_cut: int = 2) -> list[Job]:
    return [Job("Q: " + TEXT[:cut], k, i) for k, cut in enumerate(CUTS) for i in range(per_cut)]


@torch.no_grad()
def plain(
    model: Any, tokenizer: Any, job: Job, sampling: Sampling, finished: Callable[[str], bool] = lambda _: False
) -> Completion:
    """One rollout with the whole text read anew for every token."""
    ids, new, stream = list(tokenizer(job.prefix)["input_ids"]), [], sampling.stream(job.boundary, job.index)
    start, text, finish = len(tokenizer.decode(ids, skip_special_tokens=True)), "", "length"
    ends = model.generation_config.eos_token_id
    while len(new) < sampling.max_new_tokens:
        logits = model(input_ids=torch.tensor([ids + new])).logits[:, -1]
        new += draw(logits, [stream.random()], sampling)
        ended = new[-1] == ends
        text = tokenizer.decode(ids + new[: len(new) - ended], skip_special_tokens=True)[start:]
        stops = [text.find(s) for s in sampling.stop if s in text]
        if ended or stops:
            text, finish = text[: min(stops, default=None)], "stop"
            break
        if finished(text):
            finish = "answer"
            break
    return Completion(job.boundary, job.index, text, finish, len(new))


def named(completions: Any) -> dict[tuple[int, int], Completion]:
    found = list(completions)
    by_name = {(c.boundary, c.index): c for c in found}
    assert len(by_name) == len(found), "no job is answered twice"
    return by_name


# ---------------------------------------------------------------- equal to plain recomputation


@pytest.mark.parametrize("name", [*ARCHITECTURES, RECURRENT])
def test_rollouts_are_those_of_plain_recomputation(name: str) -> None:
    """Token for token, with cuts inside of tokens, rows that end at different times, and windows of 5 tokens."""
    model, tokenizer = zoo.build(name), words()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 40
    sampling = Sampling(14, temperature=6.0, top_p=0.9, top_k=60, seed=3)
    found = named(LocalEngine(model, tokenizer, batch_size=3).complete(jobs(), sampling))
    assert found == {(j.boundary, j.index): plain(model, tokenizer, j, sampling) for j in jobs()}
    assert len({c.text for c in found.values()}) > 10
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3_text", RECURRENT])
def test_greedy_rollouts_are_those_of_generate(name: str) -> None:
    loaded = tiny(name)
    (found,) = [named(LocalEngine(*loaded).complete(jobs(1), Sampling(12, temperature=0)))]
    for job in jobs(1):
        ids = torch.tensor([loaded.tokenizer(job.prefix)["input_ids"]])
        new = loaded.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = loaded.tokenizer.decode(new, skip_special_tokens=True).rstrip(BROKEN)
        assert found[job.boundary, 0] == Completion(job.boundary, 0, text, "length", 12)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_rollout_depends_on_its_name_only(batch_size: int) -> None:
    """Not on the size of the batch, the order of the jobs, the other jobs, or what the engine did before."""
    loaded, sampling = tiny("gemma3_text"), Sampling(9, temperature=6.0, seed=5)
    expected = named(LocalEngine(*loaded, batch_size=3).complete(jobs(3), sampling))
    engine, order = LocalEngine(*loaded, batch_size=batch_size), jobs(3)
    random.Random(batch_size).shuffle(order)
    first, rest = order[:8], order[8:]
    assert named(engine.complete(rest, sampling)) | named(engine.complete(first, sampling)) == expected
    assert len({c.text for c in expected.values()}) == len(expected), "each has a random stream of its own"
    other = named(engine.complete(first, Sampling(9, temperature=6.0, seed=6)))
    assert all(other[name].text != expected[name].text for name in other)


def test_rollouts_end_at_stop_strings_and_where_the_answer_is_complete() -> None:
    model, tokenizer = zoo.build("llama"), words()
    sampling = Sampling(20, temperature=3.0, stop=("er", "n th"))

    def finished(text: str) -> bool:
        return text.count("o") > 1

    found = named(LocalEngine(model, tokenizer, batch_size=5).complete(jobs(4), sampling, finished))
    assert found == {(j.boundary, j.index): plain(model, tokenizer, j, sampling, finished) for j in jobs(4)}
    finishes = [c.finish for c in found.values()]
    assert min(map(finishes.count, ("stop", "answer", "length"))) > 2
    assert not any(stop in c.text for c in found.values() for stop in sampling.stop)


# ---------------------------------------------------------------- nothing is computed twice


def test_computed_tokens_are_the_longest_prefix_and_one_per_row_and_step() -> None:
    loaded = tiny("gemma3_text")
    engine, sampling = LocalEngine(*loaded, batch_size=4), Sampling(6)
    found = named(engine.complete(jobs(5), sampling))
    prefix = len(loaded.tokenizer(jobs()[-1].prefix)["input_ids"])
    sampled = sum(c.n_tokens - 1 for c in found.values())  # the first token comes with the prefix
    assert engine.computed_tokens == prefix + sampled
    list(engine.complete(jobs(5), sampling))
    again = engine.computed_tokens - prefix - sampled
    assert again == sampled + len(CUTS) - 1, "a prefix that is known costs its last token, the longest one nothing"


@settings(max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("name", ["llama", "gemma3_text", RECURRENT])
def test_any_order_of_reading_gives_the_logits_of_a_fresh_pass(name: str, data: st.DataObject) -> None:
    """Longer, shorter, other texts, and texts that differ in their last tokens only."""
    model = zoo.build(name)
    reader, atol = Prefixes(Decoder(model)), 5e-4 if name == RECURRENT else 1e-4
    base = data.draw(st.lists(st.integers(3, 109), min_size=30, max_size=40))
    with torch.no_grad():
        for _ in range(data.draw(st.integers(2, 5))):
            cut = data.draw(st.integers(1, len(base)))
            ids = base[:cut] + data.draw(st.lists(st.integers(3, 109), max_size=3))
            keep, before = data.draw(st.booleans()), reader.computed
            read = reader.read(ids, keep=keep)
            torch.testing.assert_close(read.logits, model(torch.tensor([ids])).logits[0, -1], rtol=0, atol=atol)
            assert reader.computed - before <= len(ids)
            twice = reader.rows(read, 2)
            next_logits, _ = Decoder(model)(torch.tensor([[7], [8]]), torch.ones(2, len(ids) + 1).long(), twice)
            for row, token in enumerate((7, 8)):
                whole = model(torch.tensor([[*ids, token]])).logits[0, -1]
                torch.testing.assert_close(next_logits[row], whole, rtol=0, atol=atol)


def test_reading_goes_back_to_the_last_common_token_only() -> None:
    reader = Prefixes(Decoder(zoo.build("gemma3_text")))
    base = list(range(3, 73))
    costs = []
    with torch.no_grad():
        for ids in (base[:40], base[:40] + base[41:], base, base[:20], [*base[:20], 90], base, base[:5] + [80] * 20):
            before = reader.computed
            reader.read(ids)
            costs.append(reader.computed - before)
    assert costs == [40, 29, 30, 1, 1, 0, 20]
    assert SEAM < 20, "the last one is another text and takes the place of the first"


# ---------------------------------------------------------------- drawing


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), size=st.sampled_from([2, 7, 1500]), temperature=st.floats(0.2, 3),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]), top_k=st.sampled_from([None, 1, 5, 1200]),
)  # fmt: skip
def test_drawing_is_the_inverse_of_transformers_own_distribution(
    seed: int, size: int, temperature: float, top_p: float, top_k: int | None
) -> None:
    logits = 3 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    warped = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped  # type: ignore[arg-type]
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped  # type: ignore[arg-type]
    expected = warped.double().softmax(-1)[0]
    n = 1000
    uniforms = [(i + 0.5) / n for i in range(n)]
    tokens = draw(logits.expand(n, -1), uniforms, Sampling(1, temperature, top_p, top_k))
    shares = torch.bincount(torch.tensor(tokens), minlength=size) / n
    assert float((shares - expected).abs().max()) <= 1.01 / n + 1e-5
    assert tokens == sorted(tokens)
    assert draw(logits, [1 - 2**-53], Sampling(1, temperature, top_p, top_k))[0] in warped.isfinite()[0].nonzero()
    assert draw(logits, [0.7], Sampling(1, temperature=0)) == [int(logits.argmax())]


# ---------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("name", ["llama", "gemma3_text", RECURRENT])
@pytest.mark.parametrize("tokenizer", [letters(), words()], ids=["letters", "words"])
@pytest.mark.parametrize("keep", [True, False])
def test_likelihoods_are_those_of_the_labels_tokens(name: str, tokenizer: Any, keep: bool) -> None:
    """Labels of several lengths, read after a text whose last token the tokenizer merges with some of them."""
    model, labels = zoo.build(name), ("four", "fo", "the rest", "t")
    engine = LocalEngine(model, tokenizer)
    for text in ("Q: We know that 2 + 2 is ", "Q: We know that 2 + 2 is"):
        found = engine.likelihoods(text, labels, keep=keep)
        rows = [list(tokenizer(text + label)["input_ids"]) for label in labels]
        same = next(i for i in range(99) if len({tuple(r[: i + 1]) for r in rows}) > 1 or i + 1 == min(map(len, rows)))
        with torch.no_grad():
            logs = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
        scores = [sum(x[i - 1, r[i]] for i in range(same, len(r))) for x, r in zip(logs, rows)]
        expected = torch.tensor(scores).double().softmax(0).tolist()
        assert found == pytest.approx(dict(zip(labels, expected)), abs=1e-5)


# ---------------------------------------------------------------- failures


def test_rows_with_nan_logits_fail_alone() -> None:
    loaded = tiny("llama")
    loaded.model.model.embed_tokens.weight.data[loaded.tokenizer.convert_tokens_to_ids("7")] = float("nan")
    work = [Job("He said", 0, 0), Job("He said 7", 1, 0), Job("She said", 2, 0)]
    found = named(LocalEngine(*loaded).complete(work, Sampling(5, temperature=0)))
    assert found[1, 0] == Completion(1, 0, "", "error", 0, "the model's logits are NaN")
    with pytest.raises(InputError, match="logits are NaN"):
        LocalEngine(*loaded).likelihoods("He said 7", ("a", "b"))
    loaded = tiny("llama")
    clean = named(LocalEngine(*loaded).complete([work[0], work[2]], Sampling(5, temperature=0)))
    assert {name: c for name, c in found.items() if name != (1, 0)} == clean


def test_what_cannot_work_is_said_before_anything_is_computed() -> None:
    loaded = tiny("llama")
    engine = LocalEngine(*loaded)
    for work, sampling, message in (
        ([Job("a" * 200, 0, 0)], Sampling(100), "a prefix has 201 tokens; with max_new_tokens=100 it exceeds"),
        ([Job("a", 0, 0), Job("a" * 400, 1, 0)], Sampling(1), "context of 256"),
    ):
        with pytest.raises(InputError, match=message):
            next(engine.complete(work, sampling))
    assert engine.computed_tokens == 0
    with pytest.raises(InputError, match="give it some more context"):
        LocalEngine(loaded.model, words()).likelihoods("", ("the", "rest"))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        LocalEngine(*loaded, batch_size=0)
    with pytest.raises(InputError, match="model.eval"):
        LocalEngine(loaded.model.train(), loaded.tokenizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1}, "temperature must be 0 or a positive number"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be at least 1, or None"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"stop": ("",)}, "stop must be a tuple of texts"),
    ],
)
def test_impossible_sampling_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**{"max_new_tokens": 5, **values})


def test_an_abandoned_generation_leaves_the_model_and_the_engine_usable() -> None:
    loaded, sampling = tiny("llama"), Sampling(8)
    engine = LocalEngine(*loaded, batch_size=2)
    expected = named(LocalEngine(*loaded).complete(jobs(), sampling))
    half = engine.complete(jobs(), sampling)
    next(half)
    assert torch.is_grad_enabled(), "between two rollouts the caller's own settings hold"
    half.close()  # type: ignore[attr-defined]
    assert named(engine.complete(jobs(), sampling)) == expected
