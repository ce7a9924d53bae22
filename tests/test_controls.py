"""Schedules, gates and closed loops: each against a loop that sets the strength by hand, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from emocircuits.activations import Add, capture, edit
from emocircuits.errors import ArtefactError, HookError, InputError
from emocircuits.reading import Features
from emocircuits.steering import Both, Hold, Meter, Ramp, Steerer, Tags, Term, Until, Window, tags
from emocircuits.steering.controls import from_data, to_data

LAYERS, STEPS = (1, 2), 6


def steerer(seed: int = 0, strength: float = 2.0, **how) -> Steerer:
    vectors = torch.randn(len(LAYERS), 32, generator=torch.Generator().manual_seed(seed))
    return Steerer((Term("resid_post", LAYERS, vectors, strength, **how),), f"s{seed}")


@pytest.fixture
def llama():
    return zoo.build("llama")


def written(model, inputs, n: int = STEPS, **how) -> Tensor:
    """Logits of every generated token [B, n, vocab]."""
    out = model.generate(
        **inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, **how,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


@torch.no_grad()
def by_hand(model, inputs, pushed: Steerer, factor: Callable[[int, Tensor], float], n: int = STEPS) -> Tensor:
    """The same for one row, by a loop that attaches factor(step, activations so far) x the vectors at each step."""
    ids, cache, found, seen = inputs["input_ids"], None, [], []
    for step in range(n):
        scale = factor(step, torch.stack(seen) if seen else torch.zeros(0, 32))
        edits = [
            Add(site="resid_post", layer=n, vector=scale * pushed.strength * v)
            for n, v in zip(LAYERS, pushed.terms[0].vectors)
        ]
        with edit(model, edits, compile_to="hook"):
            values: list[Tensor] = []
            hook = model.model.layers[2].register_forward_hook(
                lambda _, __, out, kept=values: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            out = model(ids, past_key_values=cache, use_cache=True)
            hook.remove()
        cache = out.past_key_values
        found.append(out.logits[:, -1])
        if step:
            seen.append(values[0][0, -1])
        ids = out.logits[:, -1:].argmax(-1)
    return torch.stack(found, 1)


def one(model, length: int = 5) -> dict[str, Tensor]:
    return zoo.inputs("llama", model, batch=1, length=length)


@pytest.mark.parametrize(
    ("control", "factors"),
    [
        (Ramp(0, 1, 4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (Ramp(1, -1, 2), [1, 0, -1, -1, -1, -1]),
        (Window(2, 4), [0, 0, 1, 1, 0, 0]),
        (Window(3), [0, 0, 0, 1, 1, 1]),
        (Both(Ramp(0, 1, 4), Window(0, 3)), [0, 0.25, 0.5, 0, 0, 0]),
    ],
)
def test_schedules_set_the_strength_of_each_token(llama, control, factors) -> None:
    inputs, pushed = one(llama), steerer(positions="last")  # schedules that are on at the prompt act on all of it
    with pushed.when(control).attach(llama, strict=False):
        found = written(llama, inputs)
    oracle = by_hand_last(llama, inputs, pushed, factors)
    torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def by_hand_last(model, inputs, pushed: Steerer, factors: Sequence[float]) -> Tensor:
    ids, cache, found = inputs["input_ids"], None, []
    for scale in factors:
        edits = [
            Add(site="resid_post", layer=n, vector=scale * pushed.strength * v, positions="last")
            for n, v in zip(LAYERS, pushed.terms[0].vectors)
        ]
        with edit(model, edits, compile_to="hook"):
            out = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}])
def test_schedules_do_not_care_how_text_is_generated(llama, how) -> None:
    inputs, pushed = zoo.inputs("llama", llama, batch=2, length=5), steerer().when(Ramp(0, 1, 3))
    with pushed.attach(llama):
        torch.testing.assert_close(written(llama, inputs, **how), written(llama, inputs), atol=1e-4, rtol=1e-4)


def test_a_sequence_takes_turns(llama) -> None:
    inputs, a, b = one(llama), steerer(1, positions="last"), steerer(2, positions="last")
    with Steerer.sequence([(a, 2), (None, 1), (b, None)]).attach(llama):
        found = written(llama, inputs)
    both = a.when(Window(0, 2)) + b.when(Window(3))
    with both.attach(llama):
        torch.testing.assert_close(found, written(llama, inputs))
    assert torch.allclose(found[:, :2], by_hand_last(llama, inputs, a, [1, 1]), atol=1e-4)
    with pytest.raises(InputError, match="only the last"):
        Steerer.sequence([(a, None), (b, 3)])
    with pytest.raises(InputError, match="at least one"):
        Steerer.sequence([(None, 3)])


def test_tags_steer_inside_or_after_them(llama) -> None:
    ids = torch.tensor([[7, 60, 61, 8, 9, 62, 10, 11], [1, 2, 3, 60, 61, 4, 5, 6]])
    spans = {"inside": [[(2, 5)], [(4, 8)]], "after": [[(5, 8)], [(0, 0)]]}
    pushed = steerer()
    for phase, where in spans.items():
        edits = [
            Add(site="resid_post", layer=n, vector=2.0 * v, positions=where)
            for n, v in zip(LAYERS, pushed.terms[0].vectors)
        ]
        with torch.no_grad(), edit(llama, edits, compile_to="hook"):
            oracle = llama(ids).logits
        with torch.no_grad(), pushed.when(Tags((60, 61), (62,), phase)).attach(llama):
            torch.testing.assert_close(llama(ids).logits, oracle, atol=1e-5, rtol=1e-5)
            cache = llama(ids[:, :4], use_cache=True).past_key_values  # and token by token
            parts = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, 8)]
            torch.testing.assert_close(torch.cat(parts, 1), oracle[:, 4:], atol=1e-4, rtol=1e-4)
    with pytest.raises(HookError, match="input_ids"), pushed.when(Tags((1,), (2,))).attach(llama):
        llama(inputs_embeds=llama.get_input_embeddings()(ids))


def test_tags_survive_what_assisted_decoding_takes_back(llama) -> None:
    helper = zoo.build("llama", seed=5)
    inputs = one(llama)
    token = int(written(llama, inputs)[0, 1].argmax())  # a token that will be written
    pushed = steerer(strength=4.0).when(Tags((token,), (zoo.build("llama").config.vocab_size - 1,)))
    with pushed.attach(llama, strict=False):
        plain = llama.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        helped = llama.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, assistant_model=helper)
    assert torch.equal(plain, helped)


def test_beams_are_refused_by_what_remembers_rows_only(llama) -> None:
    inputs = zoo.inputs("llama", llama, batch=2, length=5)
    with pytest.raises(HookError, match="beam search"), steerer().when(Tags((1,), (2,))).attach(llama):
        llama.generate(**inputs, max_new_tokens=2, num_beams=2, pad_token_id=0)
    with steerer().when(Ramp(0, 1, 2)).attach(llama):
        llama.generate(**inputs, max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_beams_are_noticed_however_they_are_asked_for(llama) -> None:
    ids = zoo.inputs("llama", llama, batch=2, length=5)["input_ids"]
    gated = steerer().when(Tags((1,), (2,)))
    with pytest.raises(HookError, match="beam search"), gated.attach(llama):
        llama.generate(ids, GenerationConfig(num_beams=2, max_new_tokens=2, pad_token_id=0))
    llama.generation_config.num_beams = 2
    with pytest.raises(HookError, match="beam search"), gated.attach(llama):
        llama.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0))


@pytest.mark.parametrize("kind", ["tags", "hold"])
def test_a_filled_cache_begins_a_new_text(llama, kind) -> None:
    inputs = one(llama, 8)
    ids = inputs["input_ids"]
    control = Tags((int(ids[0, 1]),), (int(ids[0, 6]),)) if kind == "tags" else Hold(meter(), "joy", 0.3, 0.4, memory=3)
    pushed = steerer(strength=3.0).at("generated" if kind == "hold" else "all").when(control)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with pushed.attach(llama, strict=False):
        expected = llama.generate(**inputs, **how)
        written(llama, one(llama, 6))  # another text in between
        prefix = DynamicCache()
        llama.model(ids[:, :5], past_key_values=prefix)
        again = llama.generate(**inputs, **how, past_key_values=prefix)
    assert torch.equal(again, expected)


def test_gates_follow_passes_in_which_nothing_is_steered(llama) -> None:
    inputs = one(llama)
    token = int(inputs["input_ids"][0, 2])
    pushed = steerer(strength=3.0).at("generated")
    with pushed.attach(llama):
        expected = written(llama, inputs)
    with pushed.when(Tags((token,), (127,))).attach(llama):  # opened in the prompt, never closed
        torch.testing.assert_close(written(llama, inputs), expected)


def test_equal_controls_are_one() -> None:
    assert Ramp(0, 1, 4) == Ramp(0, 1, 4)
    parts = [steerer(i).when(Ramp(0, 1, 4)) for i in range(3)]
    assert len(Steerer.rows(parts).terms) == len(LAYERS)
    assert len((parts[0] + parts[1]).edits()) == len(LAYERS)


def meter() -> Meter:
    weights = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    return Meter(("joy", "fear", "calm"), "resid_post", 2, weights, torch.zeros(3))


def smoothed(seen: Tensor, memory: int) -> Tensor:
    mean = torch.zeros(32)
    for n, x in enumerate(seen, 1):
        mean = mean + (x - mean) / min(n, memory)
    return mean


@pytest.mark.parametrize("kind", ["until", "hold"])
def test_closed_loops_follow_what_was_written(llama, kind) -> None:
    inputs, pushed, read = one(llama), steerer(strength=1.0), meter()
    control = Until(read, "joy", 0.5, 3) if kind == "until" else Hold(read, "joy", 0.7, 0.4, 0.8, 1.2, 3)
    state = {"f": 0.8}
    used = []

    def factor(step: int, seen: Tensor) -> float:
        if not len(seen):
            used.append(1.0 if kind == "until" else 0.8)
            return used[-1]
        p = float(read.probabilities(smoothed(seen, 3))[0])
        state["f"] = min(max(state["f"] + 0.4 * (0.7 - p), 0.0), 1.2)
        used.append(float(p < 0.5) if kind == "until" else state["f"])
        return used[-1]

    oracle = by_hand(llama, inputs, pushed, factor)
    assert len(set(used)) > 1, "the control should move in this test"
    with pushed.when(control).attach(llama):
        found = written(llama, inputs)
        torch.testing.assert_close(found, oracle, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(written(llama, inputs), found)  # a new text starts anew
    with pytest.raises(HookError, match="one by one"), pushed.when(control).attach(llama):
        written(llama, inputs, use_cache=False)


def test_each_row_has_its_own_control(llama) -> None:
    inputs = zoo.inputs("llama", llama, batch=4, length=5)
    parts = [
        steerer(1).when(Ramp(0, 1, 3)), None, steerer(2, 1.0).when(Hold(meter(), "fear")),
        steerer(1).when(Until(meter(), "joy", 0.3)),
    ]  # fmt: skip
    with Steerer.rows(parts).attach(llama):
        together = written(llama, inputs)
    for i, part in enumerate(parts):
        row = {k: v[i : i + 1] for k, v in inputs.items()}
        if part is None:
            alone = written(llama, row)
        else:
            with part.attach(llama):
                alone = written(llama, row)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_files_keep_controls(llama, tmp_path) -> None:
    inputs = one(llama)
    control = Both(Hold(meter(), "fear", 0.6), Ramp(0, 1, 2))
    made = steerer(1).when(control) + steerer(2).when(Window(1, 3)) + steerer(4).when(Tags((3,), (4,), "after"))
    again = Steerer.load(made.save(tmp_path / "s.safetensors"))
    with made.attach(llama, strict=False):
        before = written(llama, inputs)
    with again.attach(llama, strict=False):
        assert torch.equal(written(llama, inputs), before)

    for own in ("Mine", "Ramp"):
        with pytest.raises(InputError, match="of your own"):
            to_data(type(own, (Ramp,), {})(0, 1, 2), {}, "c")
    with pytest.raises(ArtefactError, match="lacks stop, tokens"):
        from_data({"kind": "Ramp", "start": 0}, {}, "c")
    with pytest.raises(ArtefactError, match="kind 'Later'"):
        from_data({"kind": "Later"}, {}, "c")


def test_a_meter_reads_planted_emotions() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 3, 32, generator=generator)  # layers, emotions
    labels = [e for e in ("joy", "fear", "calm") for _ in range(40)]
    index = torch.tensor([["joy", "fear", "calm"].index(e) for e in labels])
    x = centres[:, index].movedim(0, 1) + 0.3 * torch.randn(120, 2, 32, generator=generator) + 7
    names = [str(i) for i in range(120)]
    features = Features(
        x=x, labels=tuple(labels), groups=tuple(names), themes=tuple(names), clusters=tuple(names), site="resid_post",
        layers=(4, 9), position="response_mean",
    )  # fmt: skip
    made = Meter.fit(features, 9)
    assert (made.probabilities(x[:, 1]).argmax(-1) == index).float().mean() > 0.97
    pair = Features(**{**vars(features), "x": x[:80], "labels": tuple(labels[:80])} | {
        k: tuple(names[:80]) for k in ("groups", "themes", "clusters")})  # fmt: skip
    two = Meter.fit(pair, 4)
    torch.testing.assert_close(two.probabilities(x[:80, 0]).sum(-1), torch.ones(80))
    assert (two.probabilities(x[:80, 0]).argmax(-1) == index[:80]).float().mean() > 0.97
    with pytest.raises(InputError, match="choose from 4, 9"):
        Meter.fit(features, 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ramp(0, 1, 0), "at least one token"),
        (lambda: Tags((), (1,)), "at least one token"),
        (lambda: Tags((1,), (1,), "before"), "choose from inside, after"),
        (lambda: Until(meter(), "anger"), "choose from joy, fear, calm"),
        (lambda: Until(meter(), "joy", 1.0), "between 0 and 1"),
        (lambda: Hold(meter(), "joy", gain=0), "gain > 0"),
        (lambda: Hold(meter(), "joy", memory=0), "1 or more"),
    ],
)
def test_bad_controls_are_refused(make, words) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_tags_come_from_a_tokenizer() -> None:
    made = tags(lambda text, add_special_tokens: {"input_ids": [ord(c) for c in text]}, "after", "<a>", "</a>")
    assert (made.opening, made.closing[0], made.phase) == ((60, 97, 62), 60, "after")
    merges = lambda text, add_special_tokens: {"input_ids": [len(w) for w in text.split("<")]}  # noqa: E731
    with pytest.raises(InputError, match="merges"):
        tags(merges)


def test_unsteered_capture_is_clean_after_a_failed_control(llama) -> None:
    inputs = one(llama)
    clean = capture(llama, inputs["input_ids"], "resid_post", 2)["resid_post", 2]

    class Broken(Ramp):
        def factor(self, view, state):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError), steerer().when(Broken(0, 1, 2)).attach(llama):
        written(llama, inputs)
    assert torch.equal(capture(llama, inputs["input_ids"], "resid_post", 2)["resid_post", 2], clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
