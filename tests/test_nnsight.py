"""nnsight: as an independent reference for what is captured, as a model passed in, and as a backend."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from emocircuits.activations import Add, capture, edit
from emocircuits.activations.remote import execution_order
from emocircuits.errors import HookError, InputError, MissingPackageError
from emocircuits.models.anatomy import resolve, unwrap
from emocircuits.models.load import Loaded

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")

TINY = ["llama", "gpt2", "gemma3_text", "qwen3"]
TOLERANCE = 1e-4
POSITIONS: list[tuple[Any, str | None]] = [
    ("last", None),
    ("all", None),
    ("all", "mean"),
    ([0, -1], None),
    ([(0, 2), (1, 4), (2, 3)], "mean"),
    ([[(0, 2), (2, 3)], [(1, 4)], [(0, 1)]], "mean"),
]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.isnan().equal(want.isnan()), "spans that a row does not have are NaN in both"
    got, want = got.nan_to_num(), want.nan_to_num()
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def saved(root: Any, batch: dict[str, Tensor], path: Any, io: str) -> Tensor:
    """One tensor as a user of nnsight would save it, in a trace of its own."""
    envoy = root
    for part in path.split("."):
        envoy = getattr(envoy, part)
    with torch.no_grad(), root.trace(**batch) as tracer:
        value = envoy.input.save() if io == "input" else envoy.output.save()
        tracer.stop()
    return value if isinstance(value, Tensor) else value[0]


LLAMA = {  # written out by hand, without this package's anatomy
    "resid_pre": ("model.layers.{}", "input"),
    "q": ("model.layers.{}.self_attn.q_proj", "output"),
    "k": ("model.layers.{}.self_attn.k_proj", "output"),
    "v": ("model.layers.{}.self_attn.v_proj", "output"),
    "z": ("model.layers.{}.self_attn.o_proj", "input"),
    "attn_out": ("model.layers.{}.self_attn", "output"),
    "resid_mid": ("model.layers.{}.post_attention_layernorm", "input"),
    "mlp_post": ("model.layers.{}.mlp.down_proj", "input"),
    "mlp_out": ("model.layers.{}.mlp", "output"),
    "resid_post": ("model.layers.{}", "output"),
}
GEMMA3 = LLAMA | {
    "attn_out": ("model.layers.{}.post_attention_layernorm", "output"),
    "resid_mid": ("model.layers.{}.pre_feedforward_layernorm", "input"),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm", "output"),
}
GPT2 = {
    "resid_pre": ("transformer.h.{}", "input"),
    "z": ("transformer.h.{}.attn.c_proj", "input"),
    "attn_out": ("transformer.h.{}.attn", "output"),
    "resid_mid": ("transformer.h.{}.ln_2", "input"),
    "mlp_post": ("transformer.h.{}.mlp.c_proj", "input"),
    "mlp_out": ("transformer.h.{}.mlp", "output"),
    "resid_post": ("transformer.h.{}", "output"),
}
BY_HAND = {"llama": LLAMA, "qwen3": LLAMA, "gemma3_text": GEMMA3, "gpt2": GPT2}
FINAL_NORM = {"gpt2": "transformer.ln_f"}


def compare_by_hand(root: Any, model: Any, batch: dict[str, Tensor], name: str, layers: list[int]) -> dict[str, float]:
    """Largest relative error of each site between our capture and values saved by hand, on real tokens."""
    real, errors = batch["attention_mask"].bool(), {}
    got = capture(model, batch, [*BY_HAND[name], "final_norm"], layers=layers, positions="all")
    for (site, layer), value in got.items():
        path, io = BY_HAND[name].get(site, (FINAL_NORM.get(name, "model.norm"), "output"))
        want = saved(root, batch, path.format(layer), io).reshape(value.shape)
        errors[site] = max(errors.get(site, 0.0), error(value[real], want[real]))
    return errors


@pytest.mark.parametrize("name", TINY)
def test_capture_equals_values_saved_by_hand(name: str) -> None:
    model = zoo.build(name)
    root = nnsight.NNsight(copy.deepcopy(model))
    batch = zoo.inputs(name, model, padding="right")
    errors = compare_by_hand(root, model, batch, name, [0, 3])
    assert set(errors) == {*BY_HAND[name], "final_norm"}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", zoo.TEXT)
def test_the_nnsight_backend_equals_the_torch_backend(name: str, padding: Any) -> None:
    model = zoo.build(name)
    root = nnsight.NNsight(copy.deepcopy(model))
    batch = zoo.inputs(name, model, padding=padding, batch=3)
    sites = [site for site in resolve(model).sites() if site != "pattern"]
    for positions, reduce in POSITIONS:
        want = capture(model, batch, sites, positions=positions, reduce=reduce)
        got = capture(root, batch, sites, positions=positions, reduce=reduce, backend="nnsight")
        assert set(got) == set(want)
        assert torch.equal(got.valid, want.valid)
        assert max(error(got[key], want[key]) for key in want) < TOLERANCE, (positions, reduce)


def test_the_nnsight_backend_stops_after_the_last_site_and_wraps_plain_models() -> None:
    model = zoo.build("llama")
    batch = zoo.inputs("llama", model)
    want = capture(model, batch, {"z": [0], "resid_post": [1]})
    clean = logits(model, batch)
    ran: list[str] = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append("layer 2"))
    got = capture(Loaded(model, None, "tiny"), batch, {"resid_post": [1], "z": [0]}, backend="nnsight")
    handle.remove()
    assert not ran
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(logits(model, batch), clean)


def test_attention_patterns_come_through_nnsight_with_eager_attention_only() -> None:
    model = zoo.build("qwen3")
    batch = zoo.inputs("qwen3", model)
    with pytest.raises(HookError, match="attn_implementation='eager'"):
        capture(model, batch, "pattern", backend="nnsight")
    want = capture(model, batch, ["pattern", "z", "attn_out"], positions="all")
    model.set_attn_implementation("eager")
    got = capture(model, batch, ["pattern", "z", "attn_out"], positions="all", backend="nnsight")
    assert max(error(got[key], want[key]) for key in want) < TOLERANCE


def test_reads_are_asked_for_in_the_order_of_the_forward_pass() -> None:
    anatomy = resolve(zoo.build("gpt2"))
    keys = [("final_norm", 0), ("resid_post", 1), ("v", 0), ("pattern", 0), ("attn_out", 0), ("q", 0), ("resid_pre", 0)]
    reads = [read.keys for read in execution_order(keys, anatomy)]
    assert reads == [
        (("resid_pre", 0),),
        (("q", 0), ("v", 0)),  # one tensor, one read
        (("pattern", 0),),
        (("attn_out", 0),),
        (("resid_post", 1),),
        (("final_norm", 0),),
    ]


@pytest.mark.parametrize("name", TINY)
def test_an_nnsight_model_can_be_passed_as_the_model(name: str) -> None:
    model = zoo.build(name)
    root = nnsight.NNsight(copy.deepcopy(model))
    batch = zoo.inputs(name, model, padding="left")
    sites = resolve(model).sites()
    assert resolve(root).sites() == sites
    want, got = (capture(m, batch, sites, positions="last", logits="last") for m in (model, root))
    assert max(error(got[key], want[key]) for key in want) < TOLERANCE
    assert error(got.logits, want.logits) < TOLERANCE


def test_edits_act_in_the_traces_of_an_nnsight_model_and_leave_none() -> None:
    model = zoo.build("llama")
    root = nnsight.NNsight(copy.deepcopy(model))
    batch = zoo.inputs("llama", model)
    change = Add(site="resid_post", layer=1, vector=torch.linspace(-1, 1, resolve(model).d_model), positions="last")
    clean = traced(root, batch)
    with edit(model, change):
        want = logits(model, batch)
    with edit(root, change):
        got = traced(root, batch)
        positional = traced(root, batch["input_ids"])
    assert error(got, want) < TOLERANCE
    assert error(positional, want) < TOLERANCE
    assert error(got, clean) > 1e-3
    assert torch.equal(traced(root, batch), clean)


def traced(root: Any, batch: Any) -> Tensor:
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    with torch.no_grad(), root.trace(*args, **kwargs):
        found = root.output.logits.save()
    return found  # noqa: RET504


def test_requests_that_nnsight_cannot_serve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    batch = zoo.inputs("llama", model)
    with pytest.raises(InputError, match="hub id"):
        capture(model, batch, backend="nnsight", remote=True)
    with pytest.raises(InputError, match="remote"):
        capture(model, batch, remote=True)
    with pytest.raises(InputError, match="logits"):
        capture(model, batch, backend="nnsight", logits="last")
    with pytest.raises(InputError, match="too few"):
        capture(model, batch, positions=[50], backend="nnsight")
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        capture(model, batch, backend="nnsight")


def test_a_model_without_weights_is_named() -> None:
    with torch.device("meta"):
        model = type(zoo.build("llama"))(zoo.build("llama").config)
    with pytest.raises(InputError, match="no weights"):
        capture(nnsight.NNsight(model), torch.ones(1, 3, dtype=torch.long))


def test_wrappers_unwrap_to_the_torch_model() -> None:
    model = zoo.build("llama")
    root = nnsight.NNsight(model)
    assert unwrap(root) is unwrap(Loaded(root, None, "tiny")) is model
    with pytest.raises(InputError, match="got str"):
        unwrap("gpt2")


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def demo_root(demo: Any) -> Any:
    from emocircuits.models.demo_model import demo_path

    return nnsight.TransformersModel(str(demo_path()), task="text-generation", dispatch=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(demo: Any) -> dict[str, Tensor]:
    rows = ["The letter from the hospital arrived on a grey morning.", "She laughed until she cried."]
    return dict(demo.tokenizer(rows, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.real_model
def test_demo_capture_equals_values_saved_by_hand(demo: Any, demo_root: Any, texts: dict[str, Tensor]) -> None:
    errors = compare_by_hand(demo_root, demo.model, texts, "gemma3_text", [0, 5, 17])
    assert set(errors) == {*GEMMA3, "final_norm"}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.real_model
@pytest.mark.parametrize("remote", [False, "local"])
def test_demo_backends_agree_also_when_the_trace_is_sent_as_source(
    demo: Any, demo_root: Any, texts: dict[str, Tensor], remote: Any
) -> None:
    sites = [site for site in resolve(demo.model).sites() if site != "pattern"]
    for positions, reduce in [("last", None), ([(0, 3), (2, 5)], "mean")]:
        want = capture(demo.model, texts, sites, positions=positions, reduce=reduce)
        got = capture(demo_root, texts, sites, positions=positions, reduce=reduce, backend="nnsight", remote=remote)
        assert set(got) == set(want)
        assert max(error(got[key], want[key]) for key in want) < TOLERANCE
