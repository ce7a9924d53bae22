"""What drives the answer: attention masses equal the patterns, ablations equal replaced embeddings, silence is zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from test_reallocation import case, logits

from emocircuits.activations import Patch, capture, edit
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.models.spans import ModalitySpans
from emocircuits.multimodal.balance import Answers, attention_mass, measure, without

ANSWERS = Answers(("anger", "fear", "joy"), (20, 31, 47))


@pytest.mark.parametrize("queries", ["last", "all"])
@pytest.mark.parametrize("name", list(zoo.MULTIMODAL))
def test_masses_are_sums_of_the_patterns(name: str, queries: str) -> None:
    model, inputs, spans, a, b = case(name)
    found = attention_mass(model, inputs, spans, queries=queries)
    covered = [n for n, path in enumerate(resolve(model).attention) if path]
    patterns = capture(model, inputs, "pattern", covered, positions="all")
    for layer in covered:
        p = patterns["pattern", layer][:, :, -1:] if queries == "last" else patterns["pattern", layer]
        for span in (a, b, "text"):
            expected = (p * spans.mask(span)[:, None, None]).sum(-1).mean(-1)
            torch.testing.assert_close(found[span][:, layer], expected, rtol=1e-4, atol=1e-5)
    total = torch.stack(list(found.values())).sum(0)
    torch.testing.assert_close(total[:, covered], torch.ones_like(total[:, covered]), rtol=1e-4, atol=1e-4)


def test_masses_of_padded_rows_are_their_own() -> None:
    model, inputs, spans, _, _ = case("qwen2_5_vl")
    n = 4
    ids = torch.nn.functional.pad(inputs["input_ids"], (n, 0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (n, 0))
    kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (n, 0))
    padded = {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    labels = ModalitySpans(spans.names, torch.nn.functional.pad(spans.labels, (n, 0)))
    for queries in ("last", "all"):
        alone, found = (attention_mass(model, x, s, queries=queries) for x, s in ((inputs, spans), (padded, labels)))
        for name in alone:
            torch.testing.assert_close(found[name], alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "llava", "gemma3"])
def test_effects_equal_replaced_embeddings(name: str) -> None:
    model, inputs, spans, _, _ = case(name)
    modality = spans.present()[0]
    rows = torch.tensor([1, 2])
    found = measure(model, inputs, ANSWERS, ["fear", "joy"], spans)
    assert found.answers == ANSWERS.labels
    x = capture(model, inputs, "resid_pre", 0, positions="all")["resid_pre", 0]
    mask = spans.mask(modality)
    clean = ANSWERS.odds(ANSWERS.scores(model, inputs), rows)

    def odds(values: torch.Tensor) -> torch.Tensor:
        with edit(model, Patch(site="resid_pre", layer=0, value=values), compile_to="hook"):
            return ANSWERS.odds(ANSWERS.scores(model, inputs), rows)

    by_mean, swapped = x.clone(), x.clone()
    by_mean[mask] = x[mask].mean(0)
    swapped[0, mask[0]], swapped[1, mask[1]] = x[1, mask[1]], x[0, mask[0]]
    column = found.modalities.index(modality)
    torch.testing.assert_close(found.effects["mean"][:, column], clean - odds(by_mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.effects["resample"][:, column], clean - odds(swapped), rtol=1e-4, atol=1e-5)
    more, less = (x + sign * 1e-3 * (x - by_mean) for sign in (1, -1))
    slope = (odds(more) - odds(less)) / 2e-3
    torch.testing.assert_close(found.gradient[:, column], slope, rtol=2e-2, atol=2e-3)


def test_a_modality_that_says_nothing_has_no_effect() -> None:
    """The picture's projector is silenced, so that every picture gives the same tokens."""
    model, inputs, spans, _, _ = case("qwen2_5_omni")
    merger = next(module for path, module in model.named_modules() if path.endswith("merger"))
    for parameter in merger.parameters():
        parameter.data.zero_()
    found = measure(model, inputs, ANSWERS, spans=spans)
    audio, image = (found.modalities.index(n) for n in ("audio", "image"))
    for mode in ("mean", "resample"):
        assert float(found.effects[mode][:, image].abs().max()) == 0
        assert float(found.effects[mode][:, audio].abs().max()) > 1e-4
        assert not bool(found.changed[mode][:, image].any())
    assert float(found.gradient[:, image].abs().max()) == 0
    assert float(found.gradient[:, audio].abs().max()) > 1e-4
    assert 0 <= found.text_reliance() <= 1
    agreement = found.agreement()
    assert agreement["ablation (mean) vs ablation (resample)"] > 0
    assert all(-1 <= v <= 1 for v in agreement.values())


def test_what_is_measured_leaves_no_trace() -> None:
    model, inputs, spans, a, _ = case("qwen2_5_omni")
    clean = logits(model, inputs)
    measure(model, inputs, ANSWERS, spans=spans)
    with pytest.raises(RuntimeError, match="on purpose"), without(model, spans, [a], "mean"):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, inputs), clean)
    assert all(p.grad is None for p in model.parameters())


def test_bad_requests_are_one_sentence() -> None:
    model, inputs, spans, a, _ = case("qwen2_5_omni")
    text_only = zoo.inputs("qwen2_5_omni", model)
    with pytest.raises(InputError, match="belongs to a modality"):
        attention_mass(model, text_only)
    with pytest.raises(InputError, match="answer"):
        measure(model, inputs, ANSWERS, ["rage", "joy"], spans)
    with pytest.raises(InputError, match="queries"):
        attention_mass(model, inputs, queries="some")
    with pytest.raises(InputError, match="mode"), without(model, spans, [a], "zero"):
        pass
    one = ModalitySpans(spans.names, spans.labels[:1])
    with pytest.raises(InputError, match="two rows"), without(model, one, [a], "resample"):
        pass
    deep = zoo.build("qwen3_vl")
    found = ModalitySpans.of_positions({"image": [(2, 4)]}, (1, 9))
    with pytest.raises(HookError, match="knockout"), without(deep, found, ["image"], "mean"):
        pass


def test_roles_and_positions_give_spans() -> None:
    spans = ModalitySpans.of_positions({"cue": [[(0, 2)], [(1, 2), (4, 5)]], "rest": [(2, 4)]}, (2, 6))
    assert spans.mask("cue").int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0]]
    assert spans.count("rest").tolist() == [2, 2]
    for wrong in ({"x": [(3, 9)]}, {"x": [(2, 2)]}, {"x": [(0, 3)], "y": [(2, 4)]}, {"x": [[(0, 1)]]}):
        with pytest.raises(InputError):
            ModalitySpans.of_positions(wrong, (2, 6))

    class Chat:
        chat_template = "yes"

        def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
            return [i for m in messages for i in (1, *range(10, 10 + len(m["content"])), 2)]

    talk = [{"role": r, "content": "x" * n} for r, n in (("system", 2), ("user", 3), ("assistant", 1), ("user", 1))]
    roles = ModalitySpans.of_roles(Chat(), talk)
    assert roles.names == ("text", "system", "user", "assistant")
    assert roles.labels.tolist() == [[1] * 4 + [2] * 5 + [3] * 3 + [2] * 3]
