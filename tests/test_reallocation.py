"""Every policy equals attention written out by hand: on every multimodal architecture, with caches, beams, padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from emocircuits.activations import capture
from emocircuits.activations.pattern import watch_patterns
from emocircuits.errors import ArtefactError, HookError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.models.spans import ModalitySpans, placeholders
from emocircuits.steering import Steerer, Term
from emocircuits.steering.policies import Boost, Multiply, SetPoint, Sinks, Transfer
from emocircuits.steering.reallocation import Reallocation

NAMES = list(zoo.MULTIMODAL)
TEXT = "others"  # a span of ordinary tokens stands in where a model has one modality only
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def case(name: str, sharp: float = 3.0) -> tuple[Any, dict[str, Any], ModalitySpans, str, str]:
    """A model with peaky attention, inputs, and spans of two names that policies can move attention between."""
    model = zoo.build(name)
    anatomy = resolve(model)
    for path in filter(None, anatomy.attention):
        attention = model.get_submodule(path)
        fused = getattr(attention, "qkv_proj", None)
        weight = attention.q_proj.weight if fused is None else fused.weight[: anatomy.n_heads * anatomy.head_dim]
        with torch.no_grad():
            weight.mul_(sharp)
    inputs = zoo.multimodal_inputs(name, model)
    found = placeholders(model)
    names = [n for n in ("audio", "image") if n in zoo.modalities(name)]
    spans = ModalitySpans.of_ids(inputs["input_ids"], {n: found[n] for n in names})
    if len(names) == 1:
        labels = spans.labels.clone()
        labels[:, :2] = 2
        spans, names = ModalitySpans((*spans.names, TEXT), labels), [*names, TEXT]
    return model, inputs, spans, names[0], names[1]


def policies(a: str, b: str) -> dict[str, Any]:
    return {
        "multiply": Multiply({a: 0.25, b: 3.0}), "hide": Multiply({a: 0.0}), "transfer": Transfer(a, b, 0.6),
        "threshold": Transfer(a, b, 0.6, threshold=0.7), "set point": SetPoint(a, b, 0.5),
        "boost": Boost(b, 0.7),
    }  # fmt: skip


class ByHand:
    """Attention with the policy's definition written over the whole matrix, one row at a time."""

    def __init__(self, made: Reallocation, spans: ModalitySpans, model: Any) -> None:
        self.policy, self.queries, self.spans = made.policy, made.queries, spans
        anatomy = resolve(model)
        covered = made.covered(model)
        self.layers = {id(model.get_submodule(anatomy.attention[n])): heads for n, heads in covered.items()}
        self.seen, self.first = 0, next(iter(self.layers))
        """Tokens so far; a sliding layer holds the last of them only."""

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        n_rows, n_heads, q_len, _d = query.shape
        k_len = key.shape[2]
        if id(module) == self.first:
            self.seen = q_len if q_len > 1 else self.seen + 1
        key, value = (x.repeat_interleave(n_heads // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        seen = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)[None, None]
        if attention_mask is not None:
            mask = attention_mask[..., :k_len]
            seen = mask if mask.dtype == torch.bool else mask > -1e30
        elif not getattr(module, "is_causal", True):
            seen = torch.ones_like(seen)
        if id(module) in self.layers and isinstance(self.policy, Boost):
            target = self._columns(self.policy.target, n_rows, k_len)
            lifted = scores + self.policy.alpha * scores.abs() * target[:, None, None]
            for h in self.layers[id(module)]:
                scores[:, h, -1] = lifted[:, h, -1]
        p = scores.masked_fill(~seen, -1e30).softmax(-1)
        if id(module) in self.layers and not isinstance(self.policy, Boost):
            p = self._changed(p, self.layers[id(module)], k_len - q_len if q_len < k_len else 0)
        return (p @ value).transpose(1, 2), None

    def _columns(self, name: str, n_rows: int, width: int) -> torch.Tensor:
        found = self.spans.mask(name).repeat_interleave(n_rows // len(self.spans.labels), 0)
        found = torch.nn.functional.pad(found, (0, max(0, self.seen - found.shape[1])))[:, : self.seen]
        return found[:, -width:] if width < self.seen else torch.nn.functional.pad(found, (0, width - self.seen))

    def _changed(self, p: torch.Tensor, heads: Any, past: int) -> torch.Tensor:
        policy, p = self.policy, p.clone()
        masks = {n: self._columns(n, len(p), p.shape[-1]) for n in policy.spans()}
        for b in range(len(p)):
            last = max((int(m[b].nonzero().max()) for m in masks.values() if m[b].any()), default=-1)
            for q in range(p.shape[2]):
                if (self.queries == "after" and past + q <= last) or (self.queries == "last" and q != p.shape[2] - 1):
                    continue
                for h in heads:
                    row = p[b, h, q]
                    inside = {n: m[b] for n, m in masks.items()}
                    p[b, h, q] = _row(policy, row, inside)
        return p


def _row(policy: Any, row: torch.Tensor, inside: dict[str, torch.Tensor]) -> torch.Tensor:
    row = row.clone()
    if isinstance(policy, Multiply):
        for n, factor in policy.factors.items():
            row[inside[n]] *= factor
        return row / row.sum()
    a, b = inside[policy.source], inside[policy.target]
    heard, shown = float(row[a].sum()), float(row[b].sum())
    if heard < 1e-9 or shown < 1e-9:
        return row
    if isinstance(policy, Transfer):
        if heard > policy.threshold * (heard + shown):
            row[a] *= 1 - policy.share
            row[b] *= 1 + policy.share * heard / shown
        return row
    wanted = (heard + shown) * policy.ratio / (1 + policy.ratio)
    row[b] *= (shown + policy.strength * (heard - wanted)) / shown
    row[a] *= (heard - policy.strength * (heard - wanted)) / heard
    return row


@contextlib.contextmanager
def by_hand(model: Any, made: Reallocation, spans: ModalitySpans) -> Iterator[None]:
    AttentionInterface.register("by_hand", ByHand(made, spans, model))
    AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    configs = {id(c): c for c in (model.get_submodule(p).config for p in resolve(model).attention if p)}.values()
    before = [c._attn_implementation for c in configs]
    for c in configs:
        c._attn_implementation_internal = "by_hand"
    try:
        yield
    finally:
        for c, old in zip(configs, before):
            c._attn_implementation_internal = old


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    """Equal to 2e-5 of the largest logit: written out, attention without any policy differs from sdpa by 5e-6."""
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("which", ["multiply", "hide", "transfer", "threshold", "set point", "boost"])
@pytest.mark.parametrize("name", NAMES)
def test_policies_equal_attention_by_hand(name: str, which: str) -> None:
    model, inputs, spans, a, b = case(name)
    n_layers = resolve(model).n_layers
    covered = [n for n, path in enumerate(resolve(model).attention) if path]
    policy = policies(a, b)[which]
    clean = logits(model, inputs)
    for queries in ("after", "all", "last"):
        if which == "boost" and queries != "last":
            continue
        made = Reallocation(policy, heads={covered[0]: (1,), covered[-1]: (0, 2)}, queries=queries)
        with made.attach(model, spans):
            found = logits(model, inputs)
        with by_hand(model, made, spans):
            expected = logits(model, inputs)
        assert_close(found, expected, queries)
        if which != "threshold":
            assert float((found - clean).abs().max()) > 1e-4, f"{queries}: the policy has an effect"
    assert n_layers > 1
    assert torch.equal(logits(model, inputs), clean), "off is bit-identical"


@pytest.mark.parametrize("which", ["multiply", "transfer", "boost"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_attention_by_hand(name: str, cache: str, which: str) -> None:
    model, inputs, spans, a, b = case(name)
    made = Reallocation(policies(a, b)[which], queries="after")
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True, "cache_implementation": cache}
    with made.attach(model, spans):
        found = model.generate(**inputs, **how)
    oracle = made if which != "boost" else Reallocation(made.policy, queries="last")
    with by_hand(model, oracle, spans):
        expected = model.generate(**inputs, **{**how, "cache_implementation": "dynamic"})
    assert torch.equal(found.sequences, expected.sequences)
    for step, (x, y) in enumerate(zip(found.logits, expected.logits)):
        assert_close(x, y, f"step {step}")
    clean = model.generate(**inputs, **how)
    assert float((torch.stack(clean.logits) - torch.stack(found.logits)).abs().max()) > 1e-3


@pytest.mark.parametrize("which", ["multiply", "set point"])
@pytest.mark.parametrize("name", NAMES)
def test_beams_keep_their_rows_spans(name: str, which: str) -> None:
    model, inputs, spans, a, b = case(name)
    made = Reallocation(policies(a, b)[which], queries="all")
    how = {**GREEDY, "num_beams": 3}
    with made.attach(model, spans):
        found = model.generate(**inputs, **how)
    with by_hand(model, made, spans):
        expected = model.generate(**inputs, **how)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("which", ["multiply", "hide", "transfer", "threshold", "set point", "boost"])
@pytest.mark.parametrize("name", NAMES)
def test_left_padded_rows_equal_themselves_unpadded(name: str, which: str) -> None:
    """The first row padded, the second longer, so their spans stand at other columns: the first is as it was."""
    model, inputs, spans, a, b = case(name)
    made, n = Reallocation(policies(a, b)[which]), 3
    shape = inputs["input_ids"].shape
    padded = dict(inputs)
    for key in [k for k, v in inputs.items() if v.shape == shape]:
        more = torch.nn.functional.pad(inputs[key], (n, 0))
        more[1, :n] = inputs[key][1, :1]
        padded[key] = more
    labels = torch.nn.functional.pad(spans.labels, (n, 0))
    with made.attach(model, spans):
        expected = logits(model, inputs)
    with made.attach(model, ModalitySpans(spans.names, labels)):
        found = logits(model, padded)
    # Padding alone gives 2e-6; a transfer onto a span with little mass multiplies that.
    assert_close(found[0, n:], expected[0], tolerance=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_own_eager_attention_gives_the_same(name: str) -> None:
    model, inputs, spans, a, b = case(name)
    for which, policy in policies(a, b).items():
        made, found = Reallocation(policy), []
        for kernel in ("sdpa", "eager"):
            resolve_config(model)._attn_implementation = kernel
            with made.attach(model, spans):
                found.append(logits(model, inputs))
        assert_close(*found, which)


def resolve_config(model: Any) -> Any:
    return model.get_submodule(next(filter(None, resolve(model).attention))).config


def test_placeholders_are_found_in_the_ids(tmp_path: Any) -> None:
    model, inputs, spans, a, b = case("qwen2_5_omni")
    made = Reallocation(Multiply({a: 0.3, b: 2.0}))
    with made.attach(model):
        found = logits(model, inputs)
    with made.attach(model, spans):
        assert torch.equal(logits(model, inputs), found)
    saved = Reallocation.load(made.of(model).save(tmp_path / "less_audio.safetensors"))
    with saved.attach(model):
        assert torch.equal(logits(model, inputs), found)
    with pytest.raises(ArtefactError, match="was made for"), saved.attach(zoo.build("qwen2_5_vl")):
        pass
    for policy in (Sinks("image", 0.4, dims=(3, 5)), SetPoint("audio", "image", 2.0), Boost("audio")):
        again = Reallocation.load(Reallocation(policy, heads={1: (0, 2)}).save(tmp_path / "p.safetensors"))
        assert (again.policy, again.heads) == (policy, {1: (0, 2)})


def test_it_composes_with_steerers_and_ends_with_exceptions() -> None:
    model, inputs, _, a, b = case("qwen2_5_omni")
    vectors = torch.randn(1, resolve(model).d_model, generator=torch.Generator().manual_seed(0))
    steerer = Steerer((Term("resid_post", (1,), vectors, 3.0),), "push")
    made, clean = Reallocation(SetPoint(a, b)), logits(model, inputs)
    results = []
    for first, second in ((steerer, made), (made, steerer)):
        with first.attach(model), second.attach(model):
            results.append(logits(model, inputs))
    assert torch.equal(*results)
    for alone in (steerer, made):
        with alone.attach(model):
            assert float((logits(model, inputs) - results[0]).abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match="on purpose"), made.attach(model), Reallocation(Boost(b)).attach(model):
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, inputs), clean)
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [n for n in NAMES if n in zoo.ONE_STREAM])
def test_sinks_give_what_they_keep_not_to_the_picture(name: str) -> None:
    """Sinks inside the span and outside it; where they stand is what the stream before the layer says."""
    model, inputs, spans, a, b = case(name)
    layer = [n for n, path in enumerate(resolve(model).attention) if path][-1]
    stream = capture(model, inputs, "resid_pre", layer, positions="all")["resid_pre", layer]
    span = spans.mask(b)
    policy = next(p for p in (Sinks(b, keep=0.3, size=x / 10, least=0.0, most_sinks=1.0) for x in range(40, 0, -1))
                  if bool((p.found(stream) & span).any()) and bool((p.found(stream) & ~span).any()))  # fmt: skip
    made = Reallocation(policy, layers=(layer,), queries="all")
    sinks = policy.found(stream)
    assert int(sinks.sum()) < sinks.numel()
    seen: dict[int, torch.Tensor] = {}
    with watch_patterns(model, resolve(model), [layer], lambda n, p: seen.__setitem__(n, p)):
        logits(model, inputs)
    p = seen[layer].clone()
    for batch in range(len(p)):
        s, t = sinks[batch], span[batch]
        for h in range(p.shape[1]):
            for q in range(p.shape[2]):
                row = p[batch, h, q]
                if float(row[t & ~s].sum()) < 1e-9:
                    continue
                freed = 0.7 * float(row[s].sum())
                row[t & ~s] *= 1 + freed / float(row[t & ~s].sum())
                row[s] *= 0.3
    assert torch.allclose(p.sum(-1), seen[layer].sum(-1), atol=1e-5)
    v = capture(model, inputs, "v", layer, positions="all")["v", layer].transpose(1, 2)
    expected = (p @ v.repeat_interleave(p.shape[1] // v.shape[1], 1)).transpose(1, 2)
    with made.attach(model, spans):
        found = capture(model, inputs, "z", layer, positions="all")["z", layer]
    if name == "minicpmv4_6":  # its heads leave through a gate: found / gated = expected / plain
        plain = (seen[layer] @ v.repeat_interleave(p.shape[1] // v.shape[1], 1)).transpose(1, 2)
        gated = capture(model, inputs, "z", layer, positions="all")["z", layer]
        found, expected = found * plain, expected * gated
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bad_requests_are_one_sentence() -> None:
    model, inputs, _, a, b = case("qwen2_5_omni")
    with pytest.raises(InputError, match="modality"), Reallocation(Multiply({"smell": 2.0})).attach(model):
        pass
    with pytest.raises(InputError, match="head 9"), Reallocation(Boost(a), heads={0: (9,)}).attach(model):
        pass
    with pytest.raises(InputError, match="layer 40"), Reallocation(Boost(a), layers=(40,)).attach(model):
        pass
    with pytest.raises(InputError, match="placeholder"), Reallocation(Boost(a)).attach(zoo.build("llama")):
        pass
    for wrong in (
        lambda: Multiply({a: -1.0}), lambda: Transfer(a, a), lambda: Transfer(a, b, 1.5), lambda: Sinks(a, keep=2.0),
        lambda: SetPoint(a, b, 0.0), lambda: Reallocation(Boost(a), queries="some"),
        lambda: Reallocation(Boost(a), layers=(1,), heads={1: (0,)}),
    ):  # fmt: skip
        with pytest.raises(InputError):
            wrong()
    with Reallocation(Boost(a)).attach(model), pytest.raises(InputError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 4, resolve(model).d_model))
    with torch.no_grad():
        past = model(**inputs, use_cache=True).past_key_values
    with Reallocation(Boost(a)).attach(model), pytest.raises(InputError, match="before the prompt"):
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=past)


def test_layers_without_softmax_attention_are_left_out_or_refused() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).eval()
    assert tuple(Reallocation(Boost("x")).covered(model)) == (3,), "three of four layers are linear"
    with pytest.raises(HookError, match="layer 1"):
        Reallocation(Boost("x"), layers=(1,)).covered(model)
    ids = torch.arange(12)[None]
    spans = ModalitySpans.of_positions({"x": [(2, 5)]}, (1, 12))
    clean = logits(model, {"input_ids": ids})
    with Reallocation(Multiply({"x": 9.0}), queries="all").attach(model, spans):
        assert float((logits(model, {"input_ids": ids}) - clean).abs().max()) > 1e-4
    assert torch.equal(logits(model, {"input_ids": ids}), clean)
