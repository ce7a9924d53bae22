"""MoSE against its formula written token by token, against the base model, and against every trap on the way."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import zoo

pytest.importorskip("peft")

from experts_cases import (
    GREEDY,
    NAME,
    OUTPUT,
    SMALL,
    by_hand,
    labelled,
    layers_of,
    logits,
    n_hooks,
    randomise,
    seen,
    wrapped,
)

from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.models.spans import ModalitySpans, placeholders
from emocircuits.steering import Steerer, Term, experts
from emocircuits.steering.experts import MoSEConfig
from emocircuits.steering.policies import SetPoint
from emocircuits.steering.reallocation import Reallocation

# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("name", list(zoo.MULTIMODAL))
def test_it_starts_as_the_base_model_and_off_is_the_base_model(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.multimodal_inputs(name, model)
    clean, blocks = logits(model, inputs), resolve(model).blocks
    hooks = n_hooks(model)
    next(model.parameters()).requires_grad_(False)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    made = experts.wrap(model, MoSEConfig(r=2, n_experts=2, target_modules=(OUTPUT.get(name, "v_proj"),)))
    assert torch.equal(logits(made, inputs), clean)
    randomise(made)
    assert float((logits(made, inputs) - clean).abs().max()) > 1e-2
    with experts.off(made):
        assert torch.equal(logits(made, inputs), clean)
    with made.disable_adapter():
        assert torch.equal(logits(made, inputs), clean)
    paths = [path.removeprefix("base_model.model.") for path in layers_of(made)]
    assert len(paths) == len(blocks), "the language model's layers and nothing of the towers"
    assert all(path.startswith(f"{block}.") for path, block in zip(paths, blocks))
    changed = logits(made, inputs)
    back = made.unload()
    assert torch.equal(logits(back, inputs), clean)
    assert n_hooks(back) == hooks
    assert [n for n, p in back.named_parameters() if p.requires_grad] == trainable
    again = randomise(experts.wrap(back, MoSEConfig(r=2, n_experts=2, target_modules=(OUTPUT.get(name, "v_proj"),))))
    assert torch.equal(logits(again, inputs), changed)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "llava", "qwen3_omni_moe", "gemma3"])
def test_every_layer_is_the_formula(name: str) -> None:
    config = MoSEConfig(r=3, alpha=5.0, n_experts=3, target_modules=("q_proj", "o_proj"), layers=(0, 2))
    made, inputs = wrapped(config, name=name)
    tokens = placeholders(made)
    layers = layers_of(made)
    assert len(layers) == 4
    for layer in layers.values():
        with seen(layer) as found:
            logits(made, inputs)
        ((x, out),) = found
        with torch.no_grad():
            expected = by_hand(layer, x, inputs["input_ids"], config, tokens)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_dropout_changes_what_experts_read_but_not_the_gates() -> None:
    made, inputs = wrapped(MoSEConfig(r=3, n_experts=3, dropout=0.9, layers=(0,), target_modules=("q_proj",)))
    assert not any(module.training for module in made.modules())
    made.train()
    first, second = experts.gates(made, inputs), experts.gates(made, inputs)
    assert all(torch.equal(first[0, "self_attn.q_proj"][n], second[0, "self_attn.q_proj"][n]) for n in ("audio",))
    assert not torch.equal(logits(made, inputs), logits(made, inputs))
    made.eval()
    assert torch.equal(logits(made, inputs), logits(made, inputs))


def test_half_precision_models_keep_experts_in_float32() -> None:
    model = zoo.build(NAME).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in zoo.multimodal_inputs(NAME, model).items()}
    clean = logits(model, inputs)
    made = experts.wrap(model, SMALL)
    assert torch.equal(logits(made, inputs), clean)
    randomise(made)
    assert {p.dtype for _, p in made.tensors()} == {torch.float32}
    changed = logits(made, inputs)
    assert changed.dtype == torch.bfloat16
    assert float((changed - clean).abs().max()) > 1e-2
    with experts.off(made):
        assert torch.equal(logits(made, inputs), clean)
    made.train()
    with torch.autocast("cpu", torch.bfloat16):
        made(**labelled(inputs)).loss.backward()
    assert [n for n, p in made.tensors() if "gate" in n and p.grad is None] == []


# ---------------------------------------------------------------- generation


def recomputed(model: Any, inputs: dict[str, Any], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Next-token logits of each step of a finished generation, every prefix in one pass without a cache."""
    n, found = inputs["input_ids"].shape[1], []
    for stop in range(n, tokens.shape[1]):
        grown = {**inputs, "input_ids": tokens[:, :stop], "attention_mask": torch.ones_like(tokens[:, :stop])}
        found.append(logits(model, grown)[:, -1])
    return found


@pytest.mark.parametrize("name", ["qwen2_5_omni", "llava", "voxtral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_full_recomputation(name: str, cache: str) -> None:
    made, inputs = wrapped(MoSEConfig(r=3, n_experts=3), name=name)
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    done = made.generate(**inputs, **how, cache_implementation="static" if cache == "static" else None)
    for step, (found, expected) in enumerate(zip(done.logits, recomputed(made, inputs, done.sequences))):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=f"step {step}")
    with experts.off(made):
        clean = made.generate(**inputs, **how)
    assert float((torch.stack(clean.logits) - torch.stack(done.logits)).abs().max()) > 1e-2


def test_beams_keep_their_rows_modalities() -> None:
    """The score of each beam is that of its tokens, recomputed without a cache."""
    made, inputs = wrapped()
    how = {**GREEDY, "num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    done = made.generate(**inputs, **how)
    n = inputs["input_ids"].shape[1]
    steps = torch.stack(recomputed(made, inputs, done.sequences), dim=1).log_softmax(-1)
    chosen = steps.gather(-1, done.sequences[:, n:, None])[..., 0].sum(-1)
    torch.testing.assert_close(done.sequences_scores * 5, chosen, rtol=1e-3, atol=1e-3)
    assert torch.equal(done.sequences, made.generate(**inputs, **how, use_cache=False).sequences)
    with experts.off(made):
        assert not torch.equal(done.sequences, made.generate(**inputs, **how).sequences)


def test_left_padded_rows_equal_themselves_alone() -> None:
    made, inputs = wrapped()
    short = {k: v[:1] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    long = {k: torch.cat([v[1:, :1]] * 3 + [v[1:]], dim=1) for k, v in inputs.items() if k in short}
    n = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    both = {k: torch.cat([torch.nn.functional.pad(short[k], (n, 0)), long[k]]) for k in short}
    features = {k: v for k, v in inputs.items() if k not in short}
    first = {k: v[: len(v) // 2] for k, v in features.items()}
    found, alone = logits(made, {**both, **features}), logits(made, {**short, **first})
    torch.testing.assert_close(found[0, n:], alone[0], rtol=1e-3, atol=2e-4)
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    batch, single = (made.generate(**i, **how) for i in ({**both, **features}, {**short, **first}))
    assert torch.equal(batch.sequences[0, -5:], single.sequences[0, -5:])
    for a, b in zip(batch.logits, single.logits):
        torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=2e-4)


def test_it_composes_with_reallocation_and_steerers() -> None:
    """Both at once: the same in either order of attaching, through either model, with and without a cache."""
    model = zoo.build(NAME)
    inputs = zoo.multimodal_inputs(NAME, model)
    bound = Reallocation(SetPoint("audio", "image", 2.0), queries="all").of(model)
    pushed = torch.randn(1, resolve(model).d_model, generator=torch.Generator().manual_seed(0))
    steerer = Steerer((Term("attn_out", (1,), pushed, 3.0),), "push")
    made = randomise(experts.wrap(model, MoSEConfig(r=3, n_experts=3, target_modules=("q_proj", "o_proj"))))
    clean, results = logits(made, inputs), []
    for target in (made, made.get_base_model()):
        for first, second in ((bound, steerer), (steerer, bound)):
            with first.attach(target), second.attach(target):
                results.append(logits(made, inputs))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
    for alone in (bound, steerer):
        with alone.attach(made):
            assert float((logits(made, inputs) - results[0]).abs().max()) > 1e-3
    assert torch.equal(logits(made, inputs), clean)
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with bound.attach(made), steerer.attach(made):
        done = made.generate(**inputs, **how)
        for found, expected in zip(done.logits, recomputed(made, inputs, done.sequences)):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        with experts.off(made):
            without = logits(made, inputs)
    made.unload()
    with bound.attach(model), steerer.attach(model):
        torch.testing.assert_close(logits(model, inputs), without, rtol=1e-4, atol=1e-5)


def test_spans_by_hand_stand_in_for_ids() -> None:
    made, inputs = wrapped()
    expected = logits(made, inputs)
    found = placeholders(made)
    spans = ModalitySpans.of_ids(inputs["input_ids"], {n: found[n] for n in ("audio", "image")})
    with experts.spans_of(made, spans):
        torch.testing.assert_close(logits(made, inputs), expected, rtol=0, atol=0)
    swapped = ModalitySpans(("text", "image", "audio"), spans.labels)
    with experts.spans_of(made, swapped):
        assert float((logits(made, inputs) - expected).abs().max()) > 1e-2
    text = zoo.inputs(NAME, made)["input_ids"]
    embedded = {"inputs_embeds": made.get_base_model().get_input_embeddings()(text)}
    with pytest.raises(InputError, match="input_ids"):
        logits(made, embedded)
    with experts.spans_of(made, ModalitySpans.of_positions({}, tuple(text.shape))):
        torch.testing.assert_close(logits(made, embedded), logits(made, {"input_ids": text}))


def test_spans_by_hand_hold_in_chunks_and_while_a_text_grows() -> None:
    made, _ = wrapped()
    text = zoo.inputs(NAME, made)["input_ids"]
    spans = ModalitySpans.of_positions({"audio": [(0, 2)], "image": [(5, 8)]}, tuple(text.shape))
    with experts.spans_of(made, spans):
        whole = logits(made, {"input_ids": text})
        with torch.no_grad():
            first = made(input_ids=text[:, :6], use_cache=True)
            second = made(input_ids=text[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-3, atol=2e-4)
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        done = made.generate(**inputs, **how)
        for found, expected in zip(done.logits, recomputed(made, inputs, done.sequences)):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert float((logits(made, {"input_ids": text}) - whole).abs().max()) > 1e-2


def test_caches_of_other_batches_may_take_turns() -> None:
    made, inputs = wrapped(MoSEConfig(r=3, n_experts=3), name="llava")  # keeps no positions of its own, as Qwen does
    text = zoo.inputs("llava", made, batch=3)
    expected = made.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        first = made(**inputs, use_cache=True)
        second = made(**text, use_cache=True)
        token = first.logits[:, -1:, : zoo.LAST_TEXT].argmax(-1)
        assert torch.equal(token[:, 0], expected.sequences[:, inputs["input_ids"].shape[1]])
        step = made(input_ids=token, past_key_values=first.past_key_values).logits[:, -1]
        made(input_ids=torch.full((3, 1), 9), past_key_values=second.past_key_values)
    torch.testing.assert_close(step, expected.logits[1], rtol=1e-3, atol=2e-4)


# ---------------------------------------------------------------- reading and control


def test_gates_are_the_mean_gates_of_each_modality() -> None:
    made, inputs = wrapped()
    found = experts.gates(made, inputs)
    assert set(found) == {(n, f"self_attn.{p}") for n in range(4) for p in ("q_proj", "v_proj")}
    tokens = placeholders(made)
    layer = made.get_base_model().model.language_model.layers[2].self_attn.v_proj
    with seen(layer) as passes:
        logits(made, inputs)
    for number, name in enumerate(("audio", "image")):
        rows = passes[0][0][inputs["input_ids"] == tokens[name]]
        expected = torch.stack([(layer.lora_gate["default"][number] @ x).softmax(0) for x in rows]).mean(0)
        torch.testing.assert_close(found[2, "self_attn.v_proj"][name], expected.detach(), rtol=1e-5, atol=1e-6)
    assert experts.gates(made, zoo.inputs(NAME, made)) == {}
    with experts.clamp(made, {"audio": 1, "image": "uniform"}, layers=(2,)):
        held = experts.gates(made, inputs)
    assert held[2, "self_attn.q_proj"]["audio"].tolist() == [0, 1, 0]
    assert held[2, "self_attn.q_proj"]["image"].tolist() == pytest.approx([1 / 3] * 3)
    assert held[1, "self_attn.q_proj"]["audio"].tolist() != [0, 1, 0]


def test_clamping_and_rebalancing_equal_other_weights() -> None:
    """Each control is the same as a model whose own tensors say it."""
    made, inputs = wrapped()
    clean = logits(made, inputs)
    forced = copy.deepcopy(made)
    with torch.no_grad():
        for name, parameter in forced.tensors():
            if "lora_experts" in name:
                parameter[0] = parameter[0, 2]  # whichever expert the gate picks is expert 2
                parameter[1] = parameter[1].mean(0)
    with experts.clamp(made, {"audio": 2, "image": "uniform"}):
        torch.testing.assert_close(logits(made, inputs), logits(forced, inputs), rtol=1e-4, atol=1e-4)
    with experts.clamp(made, {"audio": [0, 0, 1], "image": [1 / 3] * 3}):
        torch.testing.assert_close(logits(made, inputs), logits(forced, inputs), rtol=1e-4, atol=1e-4)
    scaled = copy.deepcopy(made)
    with torch.no_grad():
        for name, parameter in scaled.tensors():
            if "lora_experts" in name and "layers.1" in name:
                parameter.mul_(torch.tensor([0.5, 1.5])[:, None, None, None])
    with experts.rebalance(made, {"audio": 0.5, "image": 1.5}, layers=1):
        torch.testing.assert_close(logits(made, inputs), logits(scaled, inputs), rtol=1e-4, atol=1e-4)
    with experts.rebalance(made, {"audio": 0.5}), experts.rebalance(made, {"audio": 2.0, "image": 1.0}):
        assert torch.equal(logits(made, inputs), clean)
    assert torch.equal(logits(made, inputs), clean)


def test_controls_end_with_exceptions_and_refuse_other_threads() -> None:
    made, inputs = wrapped()
    clean, errors = logits(made, inputs), []

    def elsewhere() -> None:
        try:
            with experts.off(made):
                pass
        except HookError as error:
            errors.append(error)

    def fail() -> None:
        with experts.clamp(made, {"audio": 0}), experts.off(made), experts.rebalance(made, {"image": 0.0}):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert len(errors) == 1
    assert torch.equal(logits(made, inputs), clean)
    with pytest.raises(IndexError):
        logits(made, {"input_ids": torch.full((1, 4), 10_000)})
    with pytest.raises(HookError, match="outside the decoder"):
        next(iter(layers_of(made).values()))(torch.randn(1, 2, 32))
    assert torch.equal(logits(made, inputs), clean)


def test_live_models_do_not_mix() -> None:
    """Other modalities, other shapes, a copy, interleaved steps, and a pass in the middle of another thread's."""
    one, inputs = wrapped(seed=1)
    two, others = wrapped(MoSEConfig(r=2, n_experts=2, target_modules=("v_proj",)), seed=2, name="llava")
    three = copy.deepcopy(one)
    alone = [logits(m, i) for m, i in ((one, inputs), (two, others), (three, inputs))]
    assert torch.equal(alone[0], alone[2])
    with torch.no_grad():
        first = one(**inputs, use_cache=True)
        second = two(**others, use_cache=True)
        token = {"input_ids": torch.tensor([[7], [8]])}
        stepped = one(**token, past_key_values=first.past_key_values).logits
        two(**token, past_key_values=second.past_key_values)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token["input_ids"]], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    torch.testing.assert_close(stepped[:, -1], logits(one, whole)[:, -1], rtol=1e-3, atol=2e-4)
    with experts.clamp(one, {"audio": 0}), experts.rebalance(one, {"image": 0.0}):
        assert torch.equal(logits(three, inputs), alone[2])
        assert torch.equal(logits(two, others), alone[1])
    results: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            results[number] = logits(one, inputs if number else zoo.inputs(NAME, one))

    expected = [logits(one, zoo.inputs(NAME, one)), alone[0]]
    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in (0, 1))
    randomise(three, seed=5)
    assert torch.equal(logits(one, inputs), alone[0])
