"""Reading with a shared prompt equals reading every text whole; generation is per row; runs resume."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import zoo

from emocircuits.data.prompts import chat_messages, encode_prompt, once_bos, wordings_for
from emocircuits.data.scenarios import Group, heldout
from emocircuits.errors import InputError
from emocircuits.examples import prompt_examples, reply_examples
from emocircuits.generation import Decoding, RowSampler, generate
from emocircuits.reading import Example, read
from emocircuits.runs import Run
from emocircuits.steering import Steerer, Term


class Words:
    """A tokenizer with one token per word, for models with a vocabulary of 128."""

    pad_token_id, bos_token_id, eos_token_id, chat_template = 0, 1, 2, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [3 + sum(map(ord, word)) % 120 for word in text.split()]
        return {"input_ids": [self.bos_token_id] * add_special_tokens + ids}

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(str(int(t)) for t in row) for row in rows]


def examples() -> list[Example]:
    texts = ["the door opened slowly", "a much longer prompt that has many more words than that", "short one"]
    return [
        Example(prompt=p, continuation=" he said :", label=e, group=p, response=f"{e} {r} and more" * (1 + i % 2))
        for i, (p, r) in enumerate(zip(texts, ("no", "yes", "why")))
        for e in ("anger", "fear")
    ]


@pytest.mark.parametrize("position", ["last_prompt", "response_mean", "response_tokens"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_shared_prompts_change_nothing(name: str, position: str) -> None:
    model, tokenizer = zoo.build(name), Words()
    together = read(model, tokenizer, examples(), position=position, batch_size=3)
    rows = []
    for e in examples():
        ids = tokenizer(e.prompt)["input_ids"] + tokenizer(e.continuation, False)["input_ids"]
        start = len(ids)
        ids += tokenizer(e.response, False)["input_ids"]
        with torch.no_grad():
            hidden = [h for h in _block_outputs(model, torch.tensor([ids]))]
        stack = torch.stack(hidden)[:, 0].transpose(0, 1)
        part = {"last_prompt": stack[start - 1 : start], "response_mean": stack[start:].mean(0, keepdim=True)}
        rows.append(part.get(position, stack[start:]))
    torch.testing.assert_close(together.x, torch.cat(rows), atol=2e-5, rtol=1e-4)
    assert together.labels[0] == "anger"


def _block_outputs(model, ids):
    """The oracle: plain hooks on the blocks of a single, unpadded text."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    found, handles = [], []
    for block in blocks:
        handles.append(
            block.register_forward_hook(lambda _m, _i, out: found.append(out if torch.is_tensor(out) else out[0]))
        )
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def test_nothing_to_read_or_too_long_is_refused_before_any_work() -> None:
    model = zoo.build("llama")
    with pytest.raises(InputError, match="no texts to read"):
        read(model, Words(), [])
    with pytest.raises(InputError, match="some examples have none"):
        read(model, Words(), [Example("a b", "anger", "g")])
    limit = model.config.max_position_embeddings
    with pytest.raises(InputError, match="longer than the model's context"):
        read(model, Words(), [Example("w " * (limit + 1), "anger", "g", response="x")])
    with pytest.raises(InputError, match="choose from last_prompt"):
        read(model, Words(), examples(), position="middle")


def test_rows_of_a_batch_do_not_depend_on_each_other() -> None:
    model, tokenizer = zoo.build("llama"), Words()
    prompts = ["one two three", "four five six seven eight", "nine"]
    push = Steerer((Term("resid_post", (1,), torch.randn(1, 32)),), "push")
    decoding = Decoding(max_new_tokens=5, min_new_tokens=5)
    together = generate(model, tokenizer, prompts, [push, None, push], decoding=decoding, seed=3)
    split = generate(model, tokenizer, prompts, [push, None, push], decoding=decoding, seed=3, batch_size=1)
    assert together == split
    assert together != generate(model, tokenizer, prompts, [push, None, push], decoding=decoding, seed=4)
    with pytest.raises(InputError, match="must pair up"):
        generate(model, tokenizer, prompts, [push])
    with pytest.raises(InputError, match="exceeds the context"):
        generate(model, tokenizer, ["w " * model.config.max_position_embeddings])


def test_bos_is_there_exactly_once() -> None:
    tokenizer = Words()
    assert encode_prompt(tokenizer, "a b")[:2].count(1) == 1
    assert once_bos(tokenizer, [1, 1, 1, 5]) == [1, 5]
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(tokenizer, chat_messages(Group("a", "t", "neutral", "I wait.", "It rains.")))


def test_examples_are_balanced_within_groups() -> None:
    emotions = ("anger", "fear", "disgust")
    for made in (reply_examples(heldout(), emotions), prompt_examples(heldout(), emotions)):
        groups: dict[str, list[str]] = {}
        for e in made:
            groups.setdefault(e.group, []).append(e.label)
        assert all(tuple(labels) == emotions for labels in groups.values())
    assert {e.wording for e in prompt_examples(heldout(), emotions)} == {w.name for w in wordings_for(emotions)}
    assert wordings_for(("pride", "shame"))[0].text("pride") == "I was filled with pride."


def test_a_run_resumes_and_refuses_other_settings(tmp_path) -> None:
    calls = []

    def make() -> dict[str, int]:
        calls.append(1)
        return {"x": 1}

    run = Run(tmp_path / "run", {"seed": 1})
    assert run.json_stage("a", make) == {"x": 1}
    assert Run(tmp_path / "run", {"seed": 1}).json_stage("a", make) == {"x": 1}
    assert len(calls) == 1
    (tmp_path / "run" / "a.json").unlink()
    Run(tmp_path / "run", {"seed": 1}).json_stage("a", make)
    assert len(calls) == 2, "a stage whose file is gone is made again"
    with pytest.raises(InputError, match="other settings .seed."):
        Run(tmp_path / "run", {"seed": 2})
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Run(tmp_path / "run", {"seed": 1})
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not a run folder"):
        Run(other, {})
    assert json.loads((tmp_path / "run" / "a.json").read_text()) == {"x": 1}


def test_an_interrupted_stage_leaves_the_run_as_it_was(tmp_path) -> None:
    run = Run(tmp_path / "run", {})

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.json_stage("a", stop)
    assert not Run(tmp_path / "run", {}).done("a")


def test_a_stages_seconds_are_its_own(tmp_path, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("emocircuits.runs.time.monotonic", lambda: clock[0])
    run = Run(tmp_path / "run", {})

    def work(seconds: float, *first: tuple[str, Any]) -> Any:
        def make() -> dict[str, int]:
            for name, inner in first:
                run.json_stage(name, inner)
            clock[0] += seconds
            return {}

        return make

    run.json_stage("whole", work(5, ("middle", work(3, ("a", work(1)), ("b", work(2)))), ("c", work(4))))
    run.json_stage("after", work(7))
    own = {name: stage["seconds"] for name, stage in run.stages.items()}
    assert own == {"a": 1, "b": 2, "middle": 3, "c": 4, "whole": 5, "after": 7}


@pytest.mark.parametrize("length", [4, 9])
def test_penalties_of_the_sampler_equal_those_of_transformers(length: int) -> None:
    from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(length)
    scores = 3 * torch.randn(3, 50, generator=generator)
    ids = torch.randint(0, 50, (3, length), generator=generator)
    decoding = Decoding(max_new_tokens=9, min_new_tokens=4, repetition_penalty=1.3)
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), MinNewTokensLengthLogitsProcessor(4, 4, [7, 11], device="cpu")]
    )(ids, scores.clone())
    ours = scores.clone()
    RowSampler([0, 1, 2], decoding, torch.ones(3, 4), [7, 11]).penalise(ids, ours)
    assert torch.equal(ours, theirs)
    assert ours[:, 7].isinf().all() == (length < 8)
