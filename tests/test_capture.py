"""Captured values equal plain hooks, batches equal single rows, and nothing runs or stays that should not."""

from __future__ import annotations

import pytest
import torch
import zoo

from emocircuits.activations import Moments, capture, record
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import register_structure, resolve

ALL = [*zoo.TEXT, *zoo.MULTIMODAL]
SOME = ["llama", "gpt2", "gemma3_text", "gpt_neox", "phi3", "qwen3_moe"]


@pytest.mark.parametrize("name", ALL)
def test_the_anatomy_adds_up_and_every_site_is_read(name: str) -> None:
    model = zoo.build(name)
    anatomy = resolve(model)
    assert anatomy.validate(model) < 1e-5
    inputs = zoo.inputs(name, model)
    acts = capture(model, inputs, anatomy.sites(), positions="all")
    batch, length = inputs["input_ids"].shape
    for (site, layer), value in acts.items():
        if site == "pattern":
            assert value.shape == (batch, anatomy.n_heads, length, length)
            torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:-1]), atol=1e-4, rtol=0)
        elif site in ("q", "k", "v", "z"):
            assert value.shape == (batch, length, anatomy.n_units(site), anatomy.head_dim), (site, layer)
        else:
            assert value.shape == (batch, length, anatomy.n_units(site)), (site, layer)


@pytest.mark.parametrize("name", ALL)
def test_residuals_equal_hidden_states_and_the_head_reads_the_final_norm(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model)
    acts = capture(model, inputs, ["resid_pre", "resid_post", "final_norm"], positions="all")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for layer in range(resolve(model).n_layers):
        torch.testing.assert_close(acts["resid_pre", layer], states[layer])
        if layer + 1 < resolve(model).n_layers:
            torch.testing.assert_close(acts["resid_post", layer], states[layer + 1])
    torch.testing.assert_close(acts["final_norm", 0], states[-1])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2", "qwen2"])
def test_heads_and_neurons_rebuild_their_sublayer(name: str) -> None:
    """W_O applied to z and W_down applied to mlp_post must give the module's output: a check of every view."""
    model = zoo.build(name)
    anatomy, inputs = resolve(model), zoo.inputs(name, model)
    acts = capture(model, inputs, ["z", "mlp_post"], positions="all")
    for layer in range(anatomy.n_layers):
        for site in ("z", "mlp_post"):
            module = model.get_submodule(anatomy.point(site, layer).module)
            seen = []
            handle = module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            with torch.no_grad():
                model(**inputs)
                rebuilt = module(acts[site, layer].reshape(*inputs["input_ids"].shape, -1))
            handle.remove()
            torch.testing.assert_close(rebuilt, seen[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma3_text", "gpt_neox", "olmo2"])
def test_patterns_equal_eager_attention(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, padding="left")
    acts = capture(model, inputs, "pattern")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        # plain transformers counts GPT-2's positions from the padding; ours are counted from each row's first token
        places = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)} if name == "gpt2" else {}
        expected = model(**inputs, **places, output_attentions=True).attentions
    rows = inputs["attention_mask"].bool()
    for layer, weights in enumerate(expected):
        a, b = (w.transpose(1, 2)[rows] for w in (acts["pattern", layer], weights))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation(before)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", SOME)
def test_a_batch_equals_its_rows(name: str, padding: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, batch=3, padding=padding)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    assert len(set(lengths)) > 1, "the batch must really be padded"
    requests = {"last": "last", "second": 1, "from the end": -2, "several": [0, 2]}
    for what, positions in requests.items():
        together = capture(model, inputs, ["resid_post", "mlp_out", "z"], positions=positions)
        for row, length in enumerate(lengths):
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
            alone = capture(model, {"input_ids": ids}, ["resid_post", "mlp_out", "z"], positions=positions)
            for key in together:
                torch.testing.assert_close(together[key][row], alone[key][0], atol=2e-5, rtol=1e-4, msg=f"{what} {key}")
            assert ids.shape[1] == length
    spans = [(1, n) for n in lengths]
    means = capture(model, inputs, "resid_post", positions=spans, reduce="mean")
    everything = capture(model, inputs, "resid_post", positions="all")
    for row, length in enumerate(lengths):
        real = everything["resid_post", 1][row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(means["resid_post", 1][row], real[1:length].mean(0), atol=1e-5, rtol=1e-4)


def test_the_forward_stops_when_everything_was_read() -> None:
    model = zoo.build("llama")
    ran: list[str] = []
    for name in ("model.layers.2", "lm_head", "model.norm"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    capture(model, zoo.inputs("llama", model), "resid_post", [0, 1])
    assert ran == []
    capture(model, zoo.inputs("llama", model), "resid_post")
    assert ran == ["model.layers.2"], "later blocks, the final norm and the head must not run"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_only_where_wanted(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, padding="right")
    acts = capture(model, inputs, "resid_post", 1, logits="last")
    with torch.no_grad():
        full = model(**inputs).logits
    last = inputs["attention_mask"].sum(-1) - 1
    torch.testing.assert_close(acts.logits[:, 0], full[torch.arange(len(last)), last], atol=1e-5, rtol=1e-4)


def test_gradients_flow_when_asked() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    acts = capture(model, inputs, "resid_post", 2, grad=True)
    acts["resid_post", 2].sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert not capture(model, inputs, "resid_post", 2)["resid_post", 2].requires_grad


@pytest.mark.parametrize("kinds", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_record_follows_generation(kinds: dict) -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=2, length=6, padding="left")
    with record(model, "resid_post", 1) as steps:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, **kinds)
    assert len(steps) == 4
    assert steps[0]["resid_post", 1].shape[0] == 2 * kinds.get("num_beams", 1)
    if "num_beams" not in kinds:
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        whole = capture(model, {"input_ids": out[:, :7], "attention_mask": mask}, "resid_post", 1)
        torch.testing.assert_close(steps[1]["resid_post", 1], whole["resid_post", 1], atol=1e-5, rtol=1e-4)


def test_moments_equal_numpy_and_take_no_more_memory_with_more_batches() -> None:
    model = zoo.build("llama")
    moments, rows = Moments(n_groups=2, covariance=True), []
    for seed in range(4):
        inputs = zoo.inputs("llama", model, batch=6, seed=seed)
        moments.groups = torch.tensor([0, 1, 0, 1, 0, 0])
        capture(model, inputs, "resid_post", 2, into=moments)
        rows.append(capture(model, inputs, "resid_post", 2)["resid_post", 2])
    x = torch.cat(rows).double()
    group = torch.tensor([0, 1, 0, 1, 0, 0] * 4)
    for g in (0, 1):
        torch.testing.assert_close(moments.mean(("resid_post", 2))[g], x[group == g].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.cov(("resid_post", 2)), torch.cov(x.T), atol=1e-4, rtol=1e-4)
    assert moments.count(("resid_post", 2)).tolist() == [16, 8]


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_whatever_happens_and_others_stay() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model)
    seen: list[int] = []
    other = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    capture(model, inputs, "resid_post")
    assert (hooks(model), seen) == (1, [1])
    with pytest.raises(KeyboardInterrupt), record(model, "resid_post"):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="row 0 has 9 tokens"):
        capture(model, inputs, "resid_post", positions=30)
    assert hooks(model) == 1
    other.remove()
    assert hooks(model) == 0


def test_bad_requests_say_what_to_do() -> None:
    model = zoo.build("llama")
    inputs = zoo.inputs("llama", model, batch=2)
    with pytest.raises(InputError, match="choose from resid_pre, q, k"):
        capture(model, inputs, "residual")
    with pytest.raises(InputError, match="layer 11 does not exist; this model has layers 0 to 3"):
        capture(model, inputs, "z", 11)
    with pytest.raises(HookError, match="fused parameter without a down_proj module; use mlp_out"):
        capture(zoo.build("mixtral"), inputs, "mlp_post")
    with pytest.raises(HookError, match="in parallel"):
        capture(zoo.build("gpt_neox"), inputs, "resid_mid")
    with pytest.raises(InputError, match="reduce='mean'"):
        capture(model, inputs, positions=[(0, 2), (0, 2)])
    with pytest.raises(HookError, match="no forward pass"), record(model):
        pass
    padded = zoo.inputs("llama", model, padding="left")
    model.config.pad_token_id = int(padded["input_ids"][padded["attention_mask"] == 0][0])
    with pytest.raises(InputError, match="padded but has no attention_mask"):
        capture(model, {"input_ids": padded["input_ids"]})


def test_nan_names_its_layer() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(HookError, match="'resid_post' at layer 2 hold NaN"):
        capture(model, zoo.inputs("llama", model))


def test_an_unknown_architecture_says_what_was_found_and_can_be_registered() -> None:
    model = zoo.build("llama")
    for block in model.model.layers:
        block.mixer = block.mlp
        del block.mlp
        block.mlp_forward = None
    with pytest.raises(InputError, match="children: .*mixer.*register_structure"):
        resolve(model)
    register_structure("llama", mlp="mixer")
    try:
        assert resolve(model).point("mlp_post", 0).module.endswith("mixer.down_proj")
    finally:
        register_structure("llama")
    with pytest.raises(InputError, match="no decoder"):
        resolve(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("name", list(zoo.MULTIMODAL))
def test_images_and_audio_reach_the_residual_stream(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.multimodal_inputs(name, model)
    acts = capture(model, inputs, "resid_post", positions="all")
    text = capture(model, {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}, positions="all")
    n = resolve(model).n_layers
    assert acts["resid_post", n - 1].shape[-1] == resolve(model).d_model
    assert not torch.allclose(acts["resid_post", n - 1], text["resid_post", n - 1], atol=1e-3)
