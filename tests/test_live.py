"""Live reading and writing: equal to the batch functions and to plain forward passes, and stopped without a trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from test_fluency import tokenizer as tokenizer  # a small but real fast tokenizer with a BOS

from emocircuits import live
from emocircuits.activations import capture
from emocircuits.circuits.sublayers import attention_side, head_writes, mlp_side
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.evaluation.fluency import perplexity
from emocircuits.generation import Decoding, generate
from emocircuits.live_plots import along_lines, layer_map, pattern_map, promoted_bars, token_strip
from emocircuits.models.anatomy import resolve
from emocircuits.reading import Example, read

PROMPT, TEXT = "the dog ran", " to a cab and back"
DECODING = Decoding(max_new_tokens=12, min_new_tokens=2)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.build("llama")


def directions(width: int = 32, site: str = "resid_post") -> DirectionSet:
    made = torch.Generator().manual_seed(0)
    vectors, center = torch.randn(2, 4, width, generator=made), torch.randn(4, width, generator=made)
    return DirectionSet(("anger", "fear"), site, (0, 1, 2, 3), vectors, torch.rand(4) + 1, center)


# ------------------------------------------------------------------------------------------------------- writing


def test_what_is_streamed_is_what_generate_returns(llama: Any, tokenizer: Any) -> None:
    fear = directions().steerer("fear", 2.0)
    seen: dict[int, list[str]] = {0: [], 1: []}
    texts = live.write(llama, tokenizer, PROMPT, [None, fear], lambda row, t: seen[row].append(t), decoding=DECODING)
    assert [grown[-1] for grown in seen.values()] == texts
    assert all(later.startswith(earlier) for grown in seen.values() for earlier, later in zip(grown, grown[1:]))
    assert texts[0] != texts[1]
    # Row 0 of `generate` with seed 0 draws from stream 0, as every row of `write` does.
    assert texts[0] == generate(llama, tokenizer, [PROMPT], decoding=DECODING, seed=0)[0]
    assert texts[1] == generate(llama, tokenizer, [PROMPT], fear, decoding=DECODING, seed=0)[0]


def test_equal_steerers_write_equal_texts(llama: Any, tokenizer: Any) -> None:
    off = directions().steerer("fear", 0.0)
    texts = live.write(llama, tokenizer, PROMPT, [None, off, None], decoding=DECODING, seed=3)
    assert len(set(texts)) == 1


def test_an_exception_from_the_page_stops_the_writing_and_leaves_a_clean_model(llama: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        before = llama(ids).logits
    calls = []

    class TabClosed(BaseException):
        pass

    def closing(row: int, text: str) -> None:
        calls.append(text)
        raise TabClosed

    with pytest.raises(TabClosed):
        live.write(llama, tokenizer, PROMPT, [directions().steerer("fear", 2.0)], closing, decoding=DECODING)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, before)


def test_a_blend_is_the_sum_of_its_parts(llama: Any, tokenizer: Any) -> None:
    anger, fear = (directions().steerer(e, 1.0) for e in ("anger", "fear"))
    mixed = live.blend([(anger, 0.5), (fear, -1.0)])
    assert mixed is not None
    assert mixed.provenance["mix"] == {"anger": 0.5, "fear": -1.0}
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        with mixed.attach(llama):
            found = llama(ids).logits
        with (0.5 * anger).attach(llama), (-fear).attach(llama):
            assert torch.allclose(llama(ids).logits, found, atol=1e-5)
    assert live.blend([(anger, 0.0), (fear, 0.0)]) is None


def test_bad_requests_are_refused_before_any_work(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="nothing to write"):
        live.write(llama, tokenizer, PROMPT, [])
    with pytest.raises(InputError, match="is empty"):
        live.write(llama, tokenizer, "  ", [None])
    with pytest.raises(InputError, match="exceeds the context"):
        live.write(llama, tokenizer, PROMPT, [None], decoding=Decoding(max_new_tokens=100_000))
    with pytest.raises(InputError, match="no text"):
        live.along(llama, tokenizer, directions(), "")
    with pytest.raises(InputError, match="at most"):
        live.along(llama, tokenizer, directions(), "a b " * 4000)
    with pytest.raises(InputError, match="head 1.99 does not exist"):
        live.contexts(llama, tokenizer, [TEXT], "heads", 1, 99, direction=torch.ones(32))
    with pytest.raises(InputError, match="head 9.0 does not exist"):
        live.pattern(llama, tokenizer, TEXT, 9, 0)
    with pytest.raises(InputError, match="no text"):
        live.pattern(llama, tokenizer, "  ", 1, 0)
    with pytest.raises(InputError, match="needs a direction"):
        live.contexts(llama, tokenizer, [TEXT], "heads", 1, 0)
    with pytest.raises(InputError, match="no texts"):
        live.contexts(llama, tokenizer, [], "neurons", 1, 0)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_reading_along_equals_reading_and_perplexity(model: Any, tokenizer: Any, prompt: str) -> None:
    made = directions()
    found = live.along(model, tokenizer, made, TEXT, prompt)
    example = Example(prompt=prompt, label="", group="", response=TEXT)
    features = read(model, tokenizer, [example], position="response_tokens")
    assert torch.allclose(found.scores, made.scores(features, centred=False), atol=1e-4)
    assert found.perplexity == pytest.approx(perplexity(model, tokenizer, [prompt], [TEXT])[0], rel=1e-4)
    assert "".join(found.pieces) == tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert found.at(2).shape == (len(found.pieces), 2)


def test_a_pattern_is_what_the_models_own_eager_attention_does(model: Any, tokenizer: Any) -> None:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids = tokenizer(PROMPT + TEXT)["input_ids"]
    with torch.no_grad():
        wanted = eager(torch.tensor([ids]), output_attentions=True).attentions
    for layer, head in ((0, 1), (3, 2)):
        found = live.pattern(model, tokenizer, PROMPT + TEXT, layer, head)
        assert torch.allclose(found.weights, wanted[layer][0, head], atol=1e-5)
        assert found.pieces == live.pieces(tokenizer, ids)
        assert found.left_off == 0
    cut = live.pattern(model, tokenizer, PROMPT + TEXT, 1, 0, longest=5)
    assert torch.allclose(cut.weights, wanted[1][0, 0, :5, :5], atol=1e-5)
    assert (len(cut.pieces), cut.left_off) == (5, len(ids) - 5)


def test_promoted_tokens_are_those_whose_logits_a_push_raises_most(model: Any, tokenizer: Any) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    found = live.promoted(model, tokenizer, vector, top=3)
    norm = model.get_submodule(resolve(model).point("final_norm", 0).module)
    with norm.register_forward_pre_hook(lambda _module, args: (vector.expand_as(args[0]),)), torch.no_grad():
        pushed = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    bias = norm(torch.zeros(1, 1, 32))[0, 0]  # what a LayerNorm adds to any input is not the push's doing
    order = (pushed - model.get_output_embeddings()(bias)).argsort(descending=True)
    assert [t for t, _ in found["up"]] == [tokenizer.decode([int(i)]) for i in order[:3]]
    assert [t for t, _ in found["down"]] == [tokenizer.decode([int(i)]) for i in order.flip(0)[:3]]


# ------------------------------------------------------------------------------------------------------- units


TEXTS = ["the cat sat on a mat and ran", "a dog", "one more time we ran back to the old house and hid in it"]


def test_contexts_of_a_neuron_are_its_largest_activations(model: Any, tokenizer: Any) -> None:
    best = {}
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        values = capture(model, ids, "mlp_post", 2, positions="all")["mlp_post", 2][0, 1:, 5]
        best[text] = float(values.max())
    found = live.contexts(model, tokenizer, [*TEXTS, TEXTS[0]], "neurons", 2, 5, top=3, width=6)
    assert [c.value for c in found] == pytest.approx(sorted(best.values(), reverse=True), abs=1e-5)
    assert all(c.value == max(c.values) and len(c.pieces) == len(c.values) for c in found)


def test_what_heads_and_neurons_add_along_a_direction_sums_to_what_the_sublayer_adds(
    model: Any, tokenizer: Any
) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    added = capture(model, ids, "attn_out", 1, positions="all")["attn_out", 1][0, 1:] @ direction
    heads = [live._unit_value(model, "heads", 1, h, direction) for h in range(model.config.num_attention_heads)]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    total = torch.stack([next(value(inputs)) for value in heads]).sum(0)[1:]
    side = attention_side(model, 1)
    bias = side.project.bias if side.project.bias is not None else torch.zeros(32)
    z = capture(model, ids, "z", 1, positions="all")["z", 1][0]
    scale = side.scale(head_writes(side, z).sum(1) + bias)[1:]
    assert torch.allclose(total + scale * ((side.gain() * bias) @ direction), added, atol=1e-4)


def test_a_neuron_writes_its_column(llama: Any) -> None:
    assert torch.equal(live.written_by(llama, 2, 7), mlp_side(llama, 2).weight[:, 7])


# ------------------------------------------------------------------------------------------------------- figures


@given(st.lists(st.text(min_size=0, max_size=12), min_size=1, max_size=60))
def test_a_strip_shows_every_token_once_and_never_as_markup(pieces: list[str]) -> None:
    fig = token_strip(pieces, [float(i) for i in range(len(pieces))], columns=30)
    bar = fig.data[0]
    assert len(bar.text) == len(pieces)
    assert not any("<" in shown or ">" in shown for shown in bar.text)
    ends: dict[int, int] = {}
    for line, start, width in zip(bar.y, bar.base, bar.x):
        assert start == ends.get(line, 0)  # tokens of a line touch and never overlap
        ends[line] = start + width


def test_figures_hold_their_numbers_and_gaps() -> None:
    lines = along_lines(["a", "b", "c"], [[0.0, 1.0], [math.nan, 2.0], [2.0, 3.0]], ["anger", "<b>"], smooth=2)
    assert list(lines.data[0].y) == [0.0, 0.0, 2.0]
    assert lines.data[1].name == "&lt;b&gt;"
    assert along_lines(["a"], [[0.0, 1.0]], ["anger", "fear"], only=["fear"]).data[0].visible == "legendonly"
    assert len(layer_map([[0.1, math.nan]], [0, 1], ["<a>"]).data[0].y) == 1
    shown = pattern_map(["<b>", "a", "a"], [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.6, 0.2, 0.2]])
    assert [list(row) for row in shown.data[0].z] == [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.6, 0.2, 0.2]]
    assert len(set(shown.data[0].y)) == 3
    assert shown.data[0].zmax == 0.2  # not of the first token
    assert "<b>" not in str(shown.data[0].text) + str(shown.layout.xaxis.ticktext) + str(shown.data[0].y)
    assert pattern_map(["a"], [[1.0]]).data[0].zmax == 1.0
    bars = promoted_bars({"up": [("<s>", 2.0)], "down": [("x", -1.0)]})
    assert list(bars.data[0].x) == [2.0, -1.0]
    assert "<s>" not in str(bars.layout.yaxis.ticktext)
