"""Attention to constraints equals sums over matrices written out, and uniform attention lifts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from attention_oracle import Largest, explicit
from hypothesis import assume, given
from hypothesis import strategies as st

from emocircuits.activations import attention, rows
from emocircuits.errors import InputError
from emocircuits.reasoning.constraints import MEASURES, constraint_attention, control_spans, drop
from emocircuits.reasoning.tokens import token_spans

PROMPT, SPANS = 14, [(2, 4), (9, 12)]
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mixtral"]


def text(name: str, length: int = 26) -> torch.Tensor:
    return zoo.inputs(name, zoo.build(name), batch=1, length=length)["input_ids"]


@pytest.mark.parametrize("align", ["predict", "compat"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_measure_equals_written_out_attention(name: str, align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CELLS", 4 * 26 * 5)  # a few rows at a time
    model, ids = zoo.build(name), text(name)
    found = constraint_attention(model, ids, PROMPT, SPANS, controls=2, align=align)
    shift = int(align == "predict")
    matrices = torch.stack(explicit(model, ids)[1])[:, :, PROMPT - shift : 26 - shift].float()  # [L, H, T, K]
    for spans, kept in ((SPANS, found.constraints), *((c.spans, c) for c in found.controls)):
        chosen = [j for a, b in spans for j in range(a, b)]
        mass = matrices[..., chosen].sum(-1)
        seen, keys = (matrices[:, 0] > 0)[..., chosen].sum(-1), (matrices[:, 0] > 0).sum(-1)
        first = (matrices[:, 0, :, 0] > 0).int()
        bare = mass / matrices[..., 1:].sum(-1)
        expected = {
            ("mass", True): mass, ("alpha", True): mass / 5, ("lift", True): mass * (keys / seen)[:, None],
            ("mass", False): bare, ("alpha", False): bare / 5, ("lift", False): bare * ((keys - first) / seen)[:, None],
        }  # fmt: skip
        assert len(kept) == 12
        for (measure, sink), values in expected.items():
            values = values.masked_fill((seen == 0)[:, None], torch.nan) if measure == "lift" else values
            for per_head, wanted in ((True, values), (False, values.mean(1))):
                got = kept.measure(measure, sink=sink, per_head=per_head)
                torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
        whole = matrices[..., 1:PROMPT].sum(-1)
        share = mass.mean(1) / whole.mean(1)
        torch.testing.assert_close(kept.measure("share"), share, atol=1e-5, rtol=1e-4, equal_nan=True)


def uniform(name: str) -> Any:
    """The model with queries of zero, which attends to every visible token alike."""
    model = zoo.build(name)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_uniform_attention_has_lift_one_at_every_token(name: str) -> None:
    found = constraint_attention(uniform(name), text(name), PROMPT, SPANS)
    for sink in (True, False):
        lift = found.constraints.measure("lift", sink=sink)
        torch.testing.assert_close(lift.nan_to_num(1.0), torch.ones(4, 12))
    full = 0 if name == "llama" else 1  # a layer without a window, if there is one
    if name != "mistral":
        length = torch.arange(PROMPT, 26).float()  # tokens the row sees
        torch.testing.assert_close(found.constraints.measure("alpha")[full], 1 / length)
        torch.testing.assert_close(found.constraints.measure("share")[full], torch.full((12,), 5 / 13))
        torch.testing.assert_close(found.excess("mass")[full], torch.zeros(12), atol=1e-6, rtol=0)
    if name != "llama":  # windows of 5 tokens leave the prompt behind
        assert found.constraints.measure("lift")[0, -1].isnan()
        assert float(found.constraints.measure("mass")[0, -1]) == 0


def test_a_longer_context_drops_alpha_but_not_lift() -> None:
    """The published measure alone would call this losing sight of the constraints."""
    model = uniform("llama")
    short = constraint_attention(model, text("llama"), PROMPT, SPANS).constraints.phase(0, 6)
    long = constraint_attention(model, text("llama", 60), PROMPT, SPANS).constraints.phase(40)
    assert float(drop(short, long).min()) > 0.03
    torch.testing.assert_close(drop(short, long, "lift"), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(drop(short, long, "share"), torch.zeros(4), atol=1e-5, rtol=0)
    for name in MEASURES:
        torch.testing.assert_close(drop(short, short, name), torch.zeros(4))


def test_phases_cut_the_generated_tokens() -> None:
    found = constraint_attention(zoo.build("llama"), text("llama"), PROMPT, SPANS).constraints
    answer = found.phase(7, 12)
    assert len(answer) == 5
    torch.testing.assert_close(answer.measure("lift"), found.measure("lift")[:, 7:12])
    torch.testing.assert_close(answer.by_layer(per_head=True), found.measure(per_head=True)[..., 7:].mean(-1))
    with pytest.raises(InputError, match="hold none of the 12"):
        found.phase(12)


def test_a_head_that_looks_at_the_constraint_stands_out_from_the_controls() -> None:
    from organisms import CONSTANT, EMOTION, HEAD_DIM, planted

    model = planted().model
    attend: Any = model.model.layers[2].self_attn
    feature = 1 * HEAD_DIM + HEAD_DIM // 2 - 1  # a slow rotary pair of head 1
    with torch.no_grad():
        attend.q_proj.weight[feature, CONSTANT], attend.k_proj.weight[feature, 0] = 2.0, 8.0
    ids = torch.arange(3, 33)
    ids[5:8] = EMOTION
    excess = constraint_attention(model, ids, 20, [(5, 8)]).excess("mass", per_head=True).mean(-1)
    assert float(excess[2, 1]) > 0.5
    excess[2, 1] = 0
    assert float(excess.abs().max()) < 0.05


def test_a_hybrid_model_has_nan_where_it_has_no_softmax_attention() -> None:
    found = constraint_attention(zoo.build("minicpmv4_6"), text("minicpmv4_6"), PROMPT, SPANS)
    for name in MEASURES:
        assert found.constraints.measure(name)[0].isnan().all()
        assert not found.constraints.measure(name)[3].isnan().any()


def test_no_matrix_of_all_heads_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CELLS", 4 * 200 * 10)
    with Largest() as largest:
        constraint_attention(zoo.build("llama"), text("llama", 200), 20, SPANS, controls=3)
    assert largest.numel <= 7 * 4 * 4 * 180  # what is returned: sets x layers x heads x rows


# ---------------------------------------------------------------- spans


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=4), st.integers(10, 60),
    st.integers(0, 9),
)  # fmt: skip
def test_control_spans_are_as_long_and_elsewhere(given_: list[tuple[int, int]], length: int, seed: int) -> None:
    spans = [(a, a + size) for a, size in given_]
    taken = {j for a, b in spans for j in range(a, b)}
    assume(max(taken) < length and len(taken) == sum(size for _, size in given_))
    try:
        draws = control_spans(spans, length, 4, seed)
    except InputError:
        assert length - 1 < 4 * len(taken) + sum(size for _, size in given_)  # only a crowded prompt has no room
        return
    for chosen in draws:
        tokens = [j for a, b in chosen for j in range(a, b)]
        assert sorted(b - a for a, b in chosen) == sorted(b - a for a, b in spans)
        assert len(set(tokens)) == len(tokens)
        assert not set(tokens) & (taken | {0})
        assert max(tokens) < length
    assert draws == control_spans(spans, length, 4, seed)


def test_overlapping_constraints_count_once() -> None:
    model, ids = zoo.build("llama"), text("llama")
    joined = constraint_attention(model, ids, PROMPT, [(2, 5), (3, 4), (4, 7)], controls=0).constraints
    assert joined.spans == ((2, 7),)
    plain = constraint_attention(model, ids, PROMPT, [(2, 7)], controls=0).constraints
    torch.testing.assert_close(joined.measure(), plain.measure())


def test_phrases_become_the_tokens_that_hold_them() -> None:
    words = "Answer in two lines . Do not use commas ."
    offsets, at = [(0, 0)], 0
    for word in words.split():
        offsets.append((at, at + len(word)))
        at += len(word) + 1
    assert token_spans(words, ["two lines", "not use comm"], offsets) == [(3, 5), (7, 10)]
    with pytest.raises(InputError, match="2 times"):
        token_spans(words, ["."], offsets)
    with pytest.raises(InputError, match="0 times"):
        token_spans(words, ["three"], offsets)
    with pytest.raises(InputError, match="no token covers"):
        token_spans(words, ["commas"], offsets[:3])


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("prompt", "spans", "options", "message"),
    [
        (26, SPANS, {}, "none was generated"),
        (PROMPT, [], {}, "no constraint span"),
        (PROMPT, [(0, 3)], {}, "sink"),
        (PROMPT, [(10, 15)], {}, "within tokens 1 to 14"),
        (PROMPT, [(4, 4)], {}, "hold a token"),
        (PROMPT, [(1, 9)], {}, "no room .* controls=0"),
        (PROMPT, SPANS, {"align": "next"}, "predict, compat"),
    ],
)
def test_bad_input_is_refused(prompt: int, spans: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        constraint_attention(zoo.build("llama"), text("llama"), prompt, spans, **options)


def test_without_controls_there_is_no_excess() -> None:
    found = constraint_attention(zoo.build("llama"), text("llama"), PROMPT, [(1, 9)], controls=0)
    with pytest.raises(InputError, match="controls=10"):
        found.excess()
    with pytest.raises(InputError, match="unknown measure 'weight'"):
        found.constraints.measure("weight")


def test_nothing_is_left_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = zoo.build("llama"), text("llama")
    before = model(input_ids=ids).logits

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emocircuits.reasoning.constraints.visible", broken)
    with pytest.raises(KeyboardInterrupt):
        constraint_attention(model, ids, PROMPT, SPANS)
    assert attention._HANDLERS == {}
    assert torch.equal(model(input_ids=ids).logits, before)
