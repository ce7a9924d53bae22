"""The batching engine without HTTP: rows do not feel their neighbours, nothing leaks, failures stay where they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from served import EURO, POLICIES, hooks, registry, tiny, tokenizer

from emocircuits.data.prompts import plain_chat
from emocircuits.errors import ArtefactError, EmocircuitsError, InputError
from emocircuits.generation import Decoding, generate
from emocircuits.models.load import Loaded
from emocircuits.serving import batch
from emocircuits.serving.engine import Answer, Done, Engine, Event, Failed, Limits, Piece, QueueFullError, StoppedError
from emocircuits.serving.registry import Registry
from emocircuits.serving.sampling import Sampler, nucleus
from emocircuits.serving.text import BROKEN, TextStream
from emocircuits.steering import Ramp, SkipFirst, Steerer, Term

PROMPTS = ("They gave my seat away again.", "Hi", "What a long day that was", "Qwerty?", "The end of the world")
WISHES = ({}, *({policy: 1.0} for policy in POLICIES))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(tiny(), registry(), Limits(max_batch=3, max_queue=8))
    yield made
    made.close()


def together(engine: Engine, requests: list[Any], pause: float = 0.003) -> list[Answer]:
    """Every request from its own thread, a little apart, so that they join a running batch."""
    found: list[Any] = [None] * len(requests)

    def ask(i: int) -> None:
        found[i] = engine.run(requests[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return found


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "gpt2", "gpt_neox", "qwen3_moe", "qwen2_5_vl"])
def test_a_shared_batch_equals_single_requests_and_generate(name: str) -> None:
    """Greedy, one steerer per positions policy, lengths that make rows come and go, also beyond sliding windows."""
    loaded = tiny(name)
    engine = Engine(loaded, registry(), Limits(max_batch=3))
    try:
        requests = [
            engine.request(prompt, max_tokens=6 + 5 * i, temperature=0, steering=wish)
            for i, (prompt, wish) in enumerate(zip(PROMPTS, WISHES))
        ]
        shared, alone = together(engine, requests), [engine.run(request) for request in requests]
        assert shared == alone
        changed = []
        for i, (answer, wish) in enumerate(zip(alone, WISHES)):
            steerer = engine.registry.steerers[next(iter(wish))] if wish else None
            decoding = Decoding(6 + 5 * i, 0, 0.0, repetition_penalty=1.0)
            (whole,) = generate(loaded.model, loaded.tokenizer, [PROMPTS[i]], steerer, decoding=decoding)
            assert answer.text == whole.rstrip("\N{REPLACEMENT CHARACTER}")
            assert answer.completion_tokens == 6 + 5 * i
            plain = engine.run(engine.request(PROMPTS[i], max_tokens=6 + 5 * i, temperature=0))
            changed.append(plain.text != answer.text)
        assert not changed[0]
        assert sum(changed) >= 3, "steerers change texts"
        assert engine.batch_size == hooks(loaded.model) == 0
    finally:
        engine.close()


def test_rows_join_and_leave_a_running_batch(engine: Engine) -> None:
    long = engine.request("A", max_tokens=200, temperature=0, steering={"all": 1})
    done = threading.Event()
    job = engine.submit(long, lambda event: done.set() if isinstance(event, Done) else None)
    wait(lambda: job.count > 5)
    short = engine.request(PROMPTS[0] * 3, max_tokens=4, temperature=0)
    answer = engine.run(short)
    assert not done.is_set(), "the short request was answered while the long one ran"
    assert done.wait(30)
    assert engine.run(short) == answer


def test_caches_that_cannot_be_padded_are_filled_in_waves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [engine.request(p, max_tokens=9 + 3 * i, temperature=0) for i, p in enumerate(PROMPTS)]
    alone = [engine.run(request) for request in requests]
    monkeypatch.setattr(batch, "DynamicLayer", type("NoSuchLayer", (), {}))
    join, sizes = engine.batch.join, []
    monkeypatch.setattr(engine.batch, "join", lambda rows: (sizes.append(engine.batch_size), join(rows))[1])
    assert together(engine, requests) == alone
    assert set(sizes) == {0}


def test_the_cache_holds_no_more_columns_than_its_longest_row(engine: Engine) -> None:
    columns = []
    step = engine.batch.step
    engine.batch.step = lambda: (columns.append(engine.batch._mask.shape[1]), step())[1]  # type: ignore[method-assign]
    jobs = [engine.request("ab", max_tokens=20 + 7 * (i % 3), temperature=0) for i in range(12)]
    together(engine, jobs[:8], pause=0)
    together(engine, jobs[8:], pause=0)
    assert max(columns) <= 3 + 34


def test_samples_depend_on_their_seed_only(engine: Engine) -> None:
    requests = [engine.request(p, max_tokens=12, top_p=0.9, seed=5 + i) for i, p in enumerate(PROMPTS)]
    assert together(engine, requests) == [engine.run(r) for r in reversed(requests)][::-1]
    other = engine.request(PROMPTS[0], max_tokens=12, top_p=0.9, seed=77)
    assert engine.run(other).text != engine.run(requests[0]).text
    assert engine.request("a").seed != engine.request("a").seed


def test_strength_zero_is_unsteered_and_strengths_add_up(engine: Engine) -> None:
    def text(**steering: float) -> str:
        return engine.run(engine.request(PROMPTS[0], max_tokens=12, temperature=0, steering=steering)).text

    assert text(all=0.0) == text()
    assert text(all=1.0) != text(all=-1.0)
    vectors = engine.registry.combined((("all", 2.0), ("last", -1.0)))
    assert vectors is not None
    assert [t.strength for t in vectors.terms] == [1.0, -0.5]
    assert engine.registry.combined((("all", 2.0), ("last", -1.0))) is vectors, "sums are made once"


# ---------------------------------------------------------------- ends and limits


def test_stop_strings_and_end_tokens_end_a_text(engine: Engine) -> None:
    whole = engine.run(engine.request("Go", max_tokens=30, temperature=0))
    assert whole.finish_reason == "length"
    stop = whole.text[10:13]
    cut = engine.run(engine.request("Go", max_tokens=30, temperature=0, stop=["never", stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < 30
    engine._ends.update(range(128))
    assert engine.run(engine.request("Go", max_tokens=30, temperature=0)) == Answer("", "stop", 1)


def test_bad_requests_are_one_sentence(engine: Engine) -> None:
    for message, options in {
        "unknown steerer 'love'; choose from all, generated": {"steering": {"love": 1.0}},
        "unknown steerer '/etc/passwd'": {"steering": {"/etc/passwd": 1.0}},
        "must be a finite number": {"steering": {"all": float("nan")}},
        "beyond this server's limit of 4 times": {"steering": {"all": -4.5}},
        "max_tokens 513 is beyond": {"max_tokens": 513},
        "exceeds the context of 256": {"max_tokens": 255},
    }.items():
        with pytest.raises(InputError, match=message):
            engine.request("Hi", **options)
    for message, prompt in {
        "exceeds the context": "a" * 256,
        "between 0 and 127": [5, 128],
        "is empty": [],
    }.items():
        with pytest.raises(InputError, match=message):
            engine.request(prompt)
    assert engine.request("Hi").max_tokens == 256 - 3


def test_chats_without_a_template_are_plain_text_and_templates_may_refuse() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert plain_chat(messages) == "Be kind.\nUser: Hi\nAssistant:"
    loaded = tiny()
    engine = Engine(loaded)
    try:
        request = engine.request(messages)
        assert request.ids == engine.request("Be kind.\nUser: Hi\nAssistant:").ids
        assert request.stop == ("\nUser:",)
        loaded.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}!"
        assert engine.request(messages).ids == engine.request("Be kind.Hi!").ids
        loaded.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="does not take these messages.*roles must alternate"):
            engine.request(messages)
    finally:
        engine.close()


def test_a_steerer_of_another_model_is_refused_at_the_start() -> None:
    narrow = Registry({"a": Steerer.rows([registry().steerers["all"]])})
    narrow.steerers["a"].terms[0].vectors.resize_(1, 1, 8)
    with pytest.raises(ArtefactError, match="has width 8"):
        Engine(tiny(), narrow)
    with pytest.raises(InputError, match="at least 1"):
        Limits(max_batch=0)


# ---------------------------------------------------------------- the queue


def test_limits_are_served_and_schedules_are_refused() -> None:
    cap = Steerer((Term("resid_post", (1, 2), torch.ones(2, 32), mode="remove", control=SkipFirst()),), "calm")
    engine = Engine(tiny(), Registry({"calm": cap}))
    try:
        requests = [
            engine.request([5 + i, 6, 7, 8][: 3 + i], max_tokens=6, temperature=0, steering={"calm": 1.0})
            for i in range(2)
        ]
        alone = [engine.run(request).text for request in requests]
        assert [a.text for a in together(engine, requests)] == alone
        plain = engine.request([5, 6, 7], max_tokens=6, temperature=0)
        assert engine.run(plain).text != alone[0]
    finally:
        engine.close()
    with pytest.raises(InputError, match="changes its strength"):
        Engine(tiny(), Registry({"ramp": cap.when(Ramp(0, 1, 5))}))


def test_full_queues_cancelled_requests_and_shutdown() -> None:
    engine = Engine(tiny(), registry(), Limits(max_batch=1, max_queue=2))
    events: dict[str, list[Event]] = {name: [] for name in "abcd"}
    long = engine.request("Hi", max_tokens=250, temperature=0, steering={"all": 1})
    running = engine.submit(long, events["a"].append)
    wait(lambda: running.count > 0)
    waiting, other = (engine.submit(long, events[name].append) for name in "bc")
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit(long, events["d"].append)
    engine.cancel(waiting)
    assert engine.queue_length == 1, "a cancelled request frees its place at once"
    engine.cancel(running)
    wait(lambda: other.count > 0)
    assert running.count < 250
    engine.close()
    engine.close()
    assert [type(e) for e in events["b"]] == []
    assert events["c"][-1] == Failed("this server is shutting down", 503)
    assert not any(isinstance(e, (Done, Failed)) for e in events["a"])
    with pytest.raises(StoppedError):
        engine.submit(long, events["d"].append)
    assert engine.metrics.requests["cancelled"] == 2
    assert hooks(engine.batch.module) == 0


def test_a_failing_pass_fails_its_requests_and_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = engine.request("Hi", max_tokens=40, temperature=0, steering={"all": 1})
    whole = engine.run(request)
    forward = engine.batch._forward
    calls = [0]

    def failing(tokens: Any, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("out of memory")
        return forward(tokens, *rest)

    monkeypatch.setattr(engine.batch, "_forward", failing)
    with pytest.raises(EmocircuitsError, match="generation failed"):
        engine.run(request)
    assert hooks(engine.batch.module) == 0
    assert engine.run(request) == whole

    job_done = threading.Event()
    said: list[str] = []
    job = engine.submit(request, lambda e: said.append(e.text) if isinstance(e, Piece) else job_done.set())
    wait(lambda: job.count > 2)
    monkeypatch.setattr(engine.batch, "_forward", lambda t, *rest: 1 / 0 if t.shape[1] > 1 else forward(t, *rest))
    with pytest.raises(EmocircuitsError, match="generation failed"):
        engine.run(request)
    assert job_done.wait(30)
    assert "".join(said) == whole.text, "a prompt that cannot be read leaves running rows alone"


def test_nan_logits_end_one_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.batch._forward

    def poisoned(tokens: Any, *rest: Any) -> Any:
        logits, cache = forward(tokens, *rest)
        steered = torch.tensor([row.steerer is not None for row in engine.batch.rows])
        return (torch.where(steered[:, None], torch.nan, logits) if tokens.shape[1] == 1 else logits), cache

    fine, bad = (engine.request("Hi", max_tokens=9, temperature=0, steering=w) for w in ({}, {"all": 1}))
    whole = engine.run(fine)
    monkeypatch.setattr(engine.batch, "_forward", poisoned)
    with pytest.raises(EmocircuitsError, match="logits are NaN"):
        engine.run(bad)
    assert engine.run(fine) == whole


def test_a_listener_that_is_gone_cancels_its_row(engine: Engine) -> None:
    def gone(_: Event) -> None:
        raise RuntimeError("event loop is closed")

    job = engine.submit(engine.request("Hi", max_tokens=250, temperature=0), gone)
    wait(lambda: job.cancelled and engine.batch_size == 0)
    assert job.count < 250


# ---------------------------------------------------------------- text and sampling


@example("ba", ["a", "baa"], False, 1)
@example("ba", ["a", "baa"], False, 5)
@given(
    st.text(st.characters(exclude_characters=BROKEN, codec="utf-8"), max_size=12),  # decoders say it of half characters
    st.lists(st.text("abc€", min_size=1, max_size=3), max_size=2), st.booleans(), st.integers(1, 5),
)  # fmt: skip
def test_pieces_add_up_to_the_text_before_the_first_stop_to_be_complete(
    text: str, stops: list[str], cut: bool, size: int
) -> None:
    text = text + "ab€c" + text
    data = text.encode()[: -1 if cut else None]
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), stops)
    pieces = []
    for token in range(len(tokens)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    whole = data.decode(errors="ignore")
    first = next((n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stops))), None) if stops else None
    longest = max((len(s) for s in stops if first is not None and whole[:first].endswith(s)), default=0)
    assert "".join(pieces) == (whole if first is None else whole[: first - longest])
    assert not any(BROKEN in piece for piece in pieces)


def test_characters_of_several_tokens_come_whole() -> None:
    decode = tokenizer().decode
    stream = TextStream(lambda ids: str(decode(ids)))
    assert [stream.push(token) for token in [*EURO, EURO[0]]] == ["", "", "€", ""]
    assert stream.flush() == ""


def test_the_nucleus_is_the_fewest_tokens_and_greedy_is_the_limit() -> None:
    chances = torch.tensor([0.1, 0.5, 0.05, 0.35])
    for top_p, ids in {0.01: [1], 0.5: [1], 0.6: [1, 3], 0.9: [1, 3, 0], 1.0: [1, 3, 0, 2]}.items():
        assert nucleus(chances, top_p)[1].tolist() == ids
    wide = torch.full((5000,), 1 / 5000)
    assert len(nucleus(wide, 0.9)[1]) == pytest.approx(4500, abs=2)
    logits = chances.log()
    assert {Sampler(1e-12, 1.0, seed)(logits) for seed in range(20)} == {1}
    assert {Sampler(1.0, 0.6, seed)(logits) for seed in range(60)} == {1, 3}
    counts = torch.bincount(torch.tensor([Sampler(1.0, 1.0, seed)(logits) for seed in range(2000)]), minlength=4)
    assert torch.allclose(counts / 2000, chances, atol=0.04)


def test_models_that_cannot_be_served_are_refused() -> None:
    loaded = tiny()
    with pytest.raises(InputError, match="Linear"):
        Engine(Loaded(torch.nn.Linear(2, 2), loaded.tokenizer, "linear"))
