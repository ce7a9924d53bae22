"""Steerers in other people's code: decorators, pipelines, streamers, threads, compiled models, placed models."""

from __future__ import annotations

import asyncio
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
import zoo
from test_fluency import tokenizer as tokenizer  # a word-level tokenizer of the zoo's vocabulary
from transformers import TextIteratorStreamer

from emocircuits.errors import HookError
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Ramp, Steerer, Term

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def steerer(seed: int, strength: float = 4.0) -> Steerer:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    return Steerer((Term("resid_post", (1, 2), vectors, strength),), f"s{seed}")


@pytest.fixture
def llama():
    return zoo.build("llama")


def inputs(model) -> dict[str, Any]:
    return zoo.inputs("llama", model, batch=1, length=5)


def steered(model, one: Steerer) -> torch.Tensor:
    with one.attach(model):
        return model.generate(**inputs(model), **GREEDY)


def test_attach_decorates_a_function(llama) -> None:
    one = steerer(1)

    @one.attach(llama)
    def answer() -> torch.Tensor:
        return llama.generate(**inputs(llama), **GREEDY)

    expected, clean = steered(llama, one), llama.generate(**inputs(llama), **GREEDY)
    assert torch.equal(answer(), expected)
    assert torch.equal(answer(), expected)
    assert not torch.equal(expected, clean)
    assert torch.equal(llama.generate(**inputs(llama), **GREEDY), clean)


def test_a_transformers_pipeline_is_steered(llama, tokenizer) -> None:
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    prompt = tokenizer.decode([5, 6, 7])
    ask = lambda: pipe(prompt, max_new_tokens=6, do_sample=False, return_tensors=True)[0]["generated_token_ids"]  # noqa: E731
    clean = ask()
    for target in (llama, pipe):
        with steerer(1).attach(target):
            assert ask() != clean
    assert ask() == clean


def test_a_streamer_in_another_thread_is_steered(llama, tokenizer) -> None:
    one = steerer(1)
    expected = tokenizer.decode(steered(llama, one)[0, 5:], skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with one.attach(llama):
        worker = threading.Thread(target=llama.generate, kwargs={**inputs(llama), **GREEDY, "streamer": streamer})
        worker.start()
        text = "".join(streamer)
        worker.join()
    assert text.split() == expected.split()


def test_threads_with_their_own_steerers_do_not_mix(llama) -> None:
    parts = [steerer(1), steerer(2), steerer(3).when(Ramp(0, 1, 3)), None]
    clean = llama.generate(**inputs(llama), **GREEDY)
    expected = [clean if p is None else steered(llama, p) for p in parts]
    assert len({tuple(e[0].tolist()) for e in expected}) == 4, "the steerers should differ in this test"
    start = threading.Barrier(4)

    def work(number: int) -> list[torch.Tensor]:
        start.wait()
        found, part = [], parts[number]
        for _ in range(5):
            if part is None:
                found.append(llama.generate(**inputs(llama), **GREEDY))
            else:
                with part.attach(llama, this_thread=True):
                    found.append(llama.generate(**inputs(llama), **GREEDY))
        return found

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    for found, one in zip(results, expected):
        assert all(torch.equal(f, one) for f in found)
    assert torch.equal(llama.generate(**inputs(llama), **GREEDY), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


@pytest.mark.parametrize(("first", "second"), [(False, False), (True, False), (False, True)])
def test_a_second_thread_is_refused_when_edits_would_mix(llama, first, second) -> None:
    clean = llama.generate(**inputs(llama), **GREEDY)

    def other() -> None:
        with steerer(2).attach(llama, this_thread=second):
            pass

    with steerer(1).attach(llama, this_thread=first, strict=False), ThreadPoolExecutor(1) as pool:
        with pytest.raises(HookError, match="another thread"):
            pool.submit(other).result()
        with steerer(3).attach(llama, strict=False):  # the same thread may nest
            pass
    with ThreadPoolExecutor(1) as pool, pytest.raises(HookError, match="never fired"):  # free again
        pool.submit(other).result()
    assert torch.equal(llama.generate(**inputs(llama), **GREEDY), clean)


def test_a_bias_cannot_keep_to_one_thread(llama) -> None:
    with (
        pytest.raises(HookError, match="every thread"),
        steerer(1).attach(llama, this_thread=True, compile_to="bias"),
    ):
        pass


@pytest.mark.parametrize("control", [None, Ramp(0, 1, 3)])
def test_compiled_models_are_steered(llama, control) -> None:
    one = steerer(1) if control is None else steerer(1).when(control)
    expected, clean = steered(llama, one), llama.generate(**inputs(llama), **GREEDY)
    compiled = torch.compile(llama, backend="eager")
    assert torch.equal(compiled.generate(**inputs(llama), **GREEDY), clean)
    with one.attach(compiled):
        assert torch.equal(compiled.generate(**inputs(llama), **GREEDY), expected)
    assert torch.equal(compiled.generate(**inputs(llama), **GREEDY), clean)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_in_a_compiled_model_too_other_threads_are_left_alone(llama) -> None:
    one = steerer(1)
    with one.attach(llama):
        expected = llama(**inputs(llama)).logits
    clean, compiled = llama(**inputs(llama)).logits, torch.compile(llama, backend="eager")
    with one.attach(compiled, this_thread=True), ThreadPoolExecutor(1) as other:
        for _ in range(2):
            assert torch.equal(compiled(**inputs(llama)).logits, expected)
            assert torch.equal(other.submit(lambda: compiled(**inputs(llama)).logits).result(), clean)
    assert torch.equal(compiled(**inputs(llama)).logits, clean)


def test_a_static_cache_is_steered(llama) -> None:
    one = steerer(1).when(Ramp(0.5, 1, 3))
    expected = steered(llama, one)
    with one.attach(llama):
        assert torch.equal(llama.generate(**inputs(llama), **GREEDY, cache_implementation="static"), expected)


def test_models_placed_by_accelerate_are_steered(tmp_path, llama) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    llama.save_pretrained(tmp_path / "model")
    placed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    one = steerer(1).when(Ramp(0, 1, 3))
    assert torch.equal(steered(placed, one), steered(llama, one))


@pytest.mark.parametrize("kind", ["constant", "generated", "last", "ramp"])
def test_install_serves_every_thread(llama, kind) -> None:
    one = (
        steerer(1).when(Ramp(0, 1, 3)) if kind == "ramp" else steerer(1) if kind == "constant" else steerer(1).at(kind)
    )
    prompts = [zoo.inputs("llama", llama, batch=1, length=n) for n in (3, 5, 7, 9)]

    def answer(given) -> list[int]:
        return llama.generate(**given, **GREEDY)[0].tolist()

    with one.attach(llama):
        expected = [answer(p) for p in prompts]
    one.install(llama)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert list(pool.map(answer, prompts)) == expected
        with steerer(2).attach(llama, strict=False):  # the thread that installed may add to it
            pass
        with ThreadPoolExecutor(1) as pool, pytest.raises(HookError, match="another thread"):
            pool.submit(lambda: steerer(2).attach(llama).__enter__()).result()
    finally:
        one.remove()


def test_asyncio_tasks_do_not_mix_either(llama) -> None:
    async def request(number: int) -> bool:
        try:
            with steerer(number).attach(llama, strict=False):
                await asyncio.sleep(0.01)
        except HookError:
            return False
        return True

    async def both() -> list[bool]:
        return await asyncio.gather(request(1), request(2))

    assert sorted(asyncio.run(both())) == [False, True]


def test_a_change_of_weights_is_warned_of(llama) -> None:
    made = replace(steerer(1), fingerprint=fingerprint(zoo.build("llama", seed=4)))
    with pytest.warns(UserWarning, match="other weights"), made.attach(llama, strict=False):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with replace(made, fingerprint=fingerprint(llama)).attach(llama, strict=False):
            pass
