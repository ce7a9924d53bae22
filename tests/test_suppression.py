"""Hiding a step: equal to attention written out, whatever is shared, packed or cut into pieces."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from attention_oracle import Largest, explicit
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from emocircuits.activations import attention, rows
from emocircuits.activations.knockout import knockout
from emocircuits.activations.restart import logits_of
from emocircuits.errors import HookError, InputError
from emocircuits.reasoning import suppression
from emocircuits.reasoning.suppression import SuppressionMatrix, outgoing, suppression_matrix, token_kl
from emocircuits.reasoning.traces import Steps

BOUNDS = (4, 9, 9, 15, 22, 23, 31)  # step 1 has no token, step 4 has one
STEPS = [0, 2, 3, 4, 5]
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox", "mixtral"]


def text(name: str, length: int = 33) -> torch.Tensor:
    return zoo.inputs(name, zoo.build(name), batch=1, length=length)["input_ids"]


def kl_of(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """[T] in float64, as the formula stands."""
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(-1)


def written_out(
    model: Any, ids: torch.Tensor, shift: int = 1, temperature: float = 0.6, layers: Any = range(4), first: int = 99
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kl, log_kl) [6, 6] with a whole forward pass for every source."""
    base = explicit(model, ids)[0]
    kl, log_kl = (torch.full((6, 6), torch.nan, dtype=torch.float64) for _ in range(2))
    for s in STEPS[:-1]:

        def hidden(layer: int, length: int, s: int = s) -> torch.Tensor:
            mask = torch.zeros(length, length, dtype=torch.bool)
            mask[:, BOUNDS[s] : BOUNDS[s + 1]] = layer in layers
            return mask

        values = kl_of(base, explicit(model, ids, hidden)[0], temperature)
        for t in (t for t in STEPS if t > s):
            part = values[BOUNDS[t] - shift : min(BOUNDS[t + 1], BOUNDS[t] + first) - shift]
            kl[t, s], log_kl[t, s] = part.mean(), (part + 1e-9).log().mean()
    return kl, log_kl


def assert_equal(found: SuppressionMatrix, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found.kl.double(), expected[0], atol=1e-7, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(found.log_kl.double(), expected[1], atol=1e-3, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_matrix_equals_a_whole_pass_for_every_source(name: str) -> None:
    model, ids = zoo.build(name), text(name)
    found = suppression_matrix(model, ids, BOUNDS)
    assert_equal(found, written_out(model, ids))
    assert found.noise < 1e-10


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"align": "compat", "temperature": 1.0}, {"shift": 0, "temperature": 1.0}),
        ({"first_k": 2}, {"first": 2}),
        ({"layers": [1, 3]}, {"layers": (1, 3)}),
        ({"layers": 2, "align": "compat", "batch": 2}, {"layers": (2,), "shift": 0}),
    ],
)
def test_options_equal_a_whole_pass_too(options: dict[str, Any], oracle: dict[str, Any], kernel: str) -> None:
    model, ids = zoo.build("gemma3_text"), text("gemma3_text")
    model.set_attn_implementation(kernel)
    assert_equal(suppression_matrix(model, ids, BOUNDS, **options), written_out(model, ids, **oracle))


def test_the_text_may_begin_with_the_source() -> None:
    """Then the source's own rows see no key but, by the guard, themselves."""
    model, ids = zoo.build("qwen3"), text("qwen3", 12)
    found = suppression_matrix(model, ids, (0, 5, 12))
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:, :5] = True
    values = kl_of(explicit(model, ids)[0], explicit(model, ids, lambda *_: mask)[0], 0.6)
    assert float(found.kl[1, 0]) == pytest.approx(float(values[4:11].mean()), rel=1e-4)


def test_hiding_a_step_is_going_on_from_a_cache_without_it() -> None:
    model, ids = zoo.build("llama"), text("llama")
    start, stop = BOUNDS[2:4]
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=ids[:, :start], past_key_values=cache, use_cache=True)
        positions = torch.arange(stop, 31)[None]
        q = model(input_ids=ids[:, stop:31], position_ids=positions, past_key_values=cache).logits[0]
        values = kl_of(model(input_ids=ids).logits[0, stop:31], q, 0.6)
    found = suppression_matrix(model, ids, BOUNDS, align="compat")
    assert float(found.kl[5, 2]) == pytest.approx(float(values[-8:].mean()), rel=1e-4)


@given(
    st.integers(1, 5) | st.none(), st.sampled_from([1, 40, 10_000]), st.sampled_from([1, 600, 10**6]),
    st.sampled_from([1, 1000, 10**6]), st.sampled_from([1, 400, 10**6]), st.sampled_from([3, 256]),
)  # fmt: skip
@settings(max_examples=20)
def test_pieces_change_nothing(batch: int | None, tokens: int, kept: int, logits: int, tile: int, block: int) -> None:
    model, ids = zoo.build("gemma3_text"), text("gemma3_text")
    whole = suppression_matrix(model, ids, BOUNDS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PASS_TOKENS", tokens), ("KEPT", kept), ("LOGITS", logits), ("TILE", tile)):
            patch.setattr(suppression, name, value)
        patch.setattr(rows, "BLOCK", block)
        found = suppression_matrix(model, ids, BOUNDS, batch=batch)
    torch.testing.assert_close(found.kl, whole.kl, atol=1e-9, rtol=1e-4, equal_nan=True)


def test_each_source_costs_the_tokens_after_it_and_the_head_runs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("llama"), text("llama", 120)
    bounds = tuple(range(20, 121, 10))
    monkeypatch.setattr(suppression, "LOGITS", 128 * 10)
    computed: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, __: computed.append(args[0].shape[1]))
    with Largest() as largest:
        suppression_matrix(model, ids, bounds)
    after = [120 - (stop - 1) for stop in bounds[1:-1]]
    assert sum(computed) == 120 + sum(after) + 11  # the clean pass, the sources, and the control
    assert largest.numel < 120 * 128


# ---------------------------------------------------------------- what must hold of any matrix


def test_a_step_that_nobody_reads_has_no_effect() -> None:
    """Windows of 5 tokens over 4 layers reach 16 tokens back, so nothing of step 0 gets to the last step."""
    model, ids = zoo.build("mistral"), text("mistral", 50)
    found = suppression_matrix(model, ids, (4, 9, 15, 30, 50))
    assert float(found.kl[3, 0]) < 1e-12
    assert float(found.log_kl[3, 0]) == pytest.approx(float(torch.tensor(1e-9).log()), abs=1e-3)
    assert float(found.kl[1, 0]) > 1e-3


def test_a_model_whose_attention_says_nothing_has_no_effects_at_all() -> None:
    model = zoo.build("qwen2")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert float(suppression_matrix(model, text("qwen2"), BOUNDS).kl.nan_to_num().max()) == 0


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_properties_of_a_matrix(name: str) -> None:
    found = suppression_matrix(zoo.build(name), text(name), BOUNDS)
    defined = torch.tensor([[t > s and t in STEPS and s in STEPS for s in range(6)] for t in range(6)])
    for matrix in (found.kl, found.log_kl, found.centred):
        assert torch.equal(~matrix.isnan(), defined)
    assert float(found.kl[defined].min()) > 0
    targets = found.centred[defined.any(1)]
    torch.testing.assert_close(targets.nanmean(1), torch.zeros(len(targets)), atol=1e-6, rtol=0)
    assert float(found.centred[2, 0]) == 0  # a target with one source
    assert len(found) == 6


def test_outgoing_effects_equal_loops() -> None:
    matrix = suppression_matrix(zoo.build("llama"), text("llama"), BOUNDS).centred
    for distance in (1, 2, 4):
        for s, value in enumerate(outgoing(matrix, distance)):
            later = [float(matrix[t, s]) for t in range(s + distance, 6) if not matrix[t, s].isnan()]
            assert float(value) == pytest.approx(sum(later) / len(later) if later else torch.nan, nan_ok=True, abs=1e-6)
    with pytest.raises(InputError, match="min_distance"):
        outgoing(matrix, 0)


@given(st.integers(0, 999), st.sampled_from([1e-4, 1e-2, 1.0, 30.0, 200.0]))
@settings(max_examples=40)
def test_kl_is_exact_from_tiny_to_extreme(seed: int, size: float) -> None:
    """In float32, against float64: also where a plain sum of p (log p - log q) would be noise."""
    model = zoo.build("llama")
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(3, 32, generator=generator) * max(size, 1)
    moved = clean + size * torch.randn(3, 32, generator=generator)
    p, q = (logits_of(model, x) for x in (clean, moved))
    found = token_kl(model, clean, [moved, moved[1:]])
    expected = kl_of(p, q, 1.0)
    rounding = 16 * torch.finfo(torch.float32).eps * float(p.abs().max())  # of logits, against changes of this size
    torch.testing.assert_close(found[0].double(), expected, rtol=rounding * (1 + 1 / size), atol=1e-13)
    torch.testing.assert_close(found[1, 1:], found[0, 1:])
    assert found[1, 0].isnan()


def test_half_precision_reports_its_noise() -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    found = suppression_matrix(model, text("llama"), BOUNDS)
    assert 0 <= found.noise < float(found.kl.nan_to_num().max()) / 10
    assert found.kl.dtype == torch.float32


def test_round_trip(tmp_path: Path) -> None:
    for options in ({}, {"layers": [1], "first_k": 3, "align": "compat"}):
        made = suppression_matrix(zoo.build("llama"), text("llama"), BOUNDS, **options)
        read = SuppressionMatrix.load(made.save(tmp_path / "matrix"))
        for name in ("kl", "log_kl", "centred"):
            torch.testing.assert_close(getattr(read, name), getattr(made, name), rtol=0, atol=0, equal_nan=True)
        for name in ("noise", "bounds", "temperature", "align", "first_k", "layers"):
            assert getattr(read, name) == getattr(made, name)


@pytest.mark.real_model
def test_the_real_model_misses_the_sentence_that_holds_the_answer(demo: Any) -> None:
    sentences = (
        "The password of the red door is 7381.", " It was raining all day in the old town.",
        " Nobody had seen the cat since Monday.", " To open the red door, you must type the password 7381.",
    )  # fmt: skip
    steps = Steps("".join(sentences), tuple(len("".join(sentences[:i])) for i in range(5)))
    encoded = demo.tokenizer(steps.text, return_offsets_mapping=True)
    found = suppression_matrix(demo.model, encoded["input_ids"], steps.token_bounds(encoded["offset_mapping"]))
    assert float(found.kl[3, 0]) > 5 * float(found.kl[3, 1:3].max())
    assert found.noise < 1e-9


# ---------------------------------------------------------------- the general tool, and failures


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_knockout_of_single_edges_equals_written_out_attention(name: str) -> None:
    model, ids = zoo.build(name), text(name)
    edges = [((10, 20), (2, 6)), ((25, 99), (0, 33))]  # the second leaves its queries nothing but themselves

    def hidden(layer: int, length: int) -> torch.Tensor:
        mask = torch.zeros(length, length, dtype=torch.bool)
        for (a, b), (c, d) in edges if layer in (0, 2) else []:
            mask[a:b, c:d] = True
        return mask

    with torch.no_grad(), knockout(model, edges, layers=[0, 2]):
        found = model(input_ids=ids).logits[0]
    torch.testing.assert_close(found.double(), explicit(model, ids, hidden)[0].double(), atol=1e-4, rtol=1e-4)


def test_knockout_holds_while_a_text_is_generated() -> None:
    model, ids = zoo.build("llama"), text("llama", 12)
    with knockout(model, [((0, 99), (3, 6))]):
        written = model.generate(ids, max_new_tokens=6, do_sample=False)
        whole = model(input_ids=written).logits[0, 11:-1].argmax(-1)
    assert torch.equal(written[0, 12:], whole)
    assert not torch.equal(written, model.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("pass_", [0, 1])
def test_nothing_is_left_after_an_exception(pass_: int) -> None:
    model, ids = zoo.build("gemma3_text"), text("gemma3_text")
    before, count = model(input_ids=ids).logits, 0

    def broken(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > pass_:
            raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        suppression_matrix(model, ids, BOUNDS)
    handle.remove()
    assert attention._HANDLERS == {}
    assert "forward" not in vars(model.model)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("bounds", "options", "message"),
    [
        ((4, 20), {}, "at least 2"),
        ((4, 20, 40), {}, "33 tokens"),
        ((4, 4, 20), {}, "1 step.s. have tokens"),
        (BOUNDS, {"align": "shifted"}, "predict, compat"),
        (BOUNDS, {"temperature": 0.0}, "temperature must be above 0"),
        (BOUNDS, {"batch": 0}, "batch must be at least 1"),
        (BOUNDS, {"first_k": 0}, "first_k must be at least 1"),
        (BOUNDS, {"layers": 9}, "layers 0 to 3"),
    ],
)
def test_bad_input_is_refused(bounds: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        suppression_matrix(zoo.build("llama"), text("llama"), bounds, **options)


def test_models_it_cannot_serve_are_refused() -> None:
    ids = text("llama")
    with pytest.raises(HookError, match="no softmax attention"):
        suppression_matrix(zoo.build("minicpmv4_6"), ids, BOUNDS)
    with pytest.raises(HookError, match="no LM head"):
        suppression_matrix(zoo.build("llama").model, ids, BOUNDS)
    with pytest.raises(InputError, match="0 <= start < stop"), knockout(zoo.build("llama"), [((3, 3), (0, 1))]):
        pass


def test_a_model_without_position_ids_recomputes_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("llama"), text("llama")
    expected = suppression_matrix(model, ids, BOUNDS).kl
    plain = inspect.signature

    def without(function: Any) -> Any:
        found = plain(function)
        return found.replace(parameters=[p for p in found.parameters.values() if p.name != "position_ids"])

    monkeypatch.setattr(suppression.inspect, "signature", without)
    found = suppression_matrix(model, ids, BOUNDS).kl
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-4, equal_nan=True)
