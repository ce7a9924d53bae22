"""TransformerLens models: as an independent reference for what is captured, and as models passed in themselves."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from emocircuits.activations import Add, Edit, Scale, capture, edit, record
from emocircuits.errors import HookError, InputError
from emocircuits.models.anatomy import resolve, unwrap
from emocircuits.models.fingerprint import fingerprint
from emocircuits.models.lens import lens_anatomy

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")

TINY = ["llama", "gpt2", "gemma3_text", "qwen3"]
MORE = ["gemma2", "qwen2", "olmo2", "phi3", "mixtral", "qwen3_moe"]
NAMES = {  # where run_with_cache keeps each site
    "resid_pre": "blocks.{}.hook_resid_pre",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_post": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
TOLERANCE = 1e-4


# ---------------------------------------------------------------- helpers


def bridged(model: Any) -> Any:
    """A TransformerBridge around this very model (which it changes in place)."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def hooked(name: str, model: Any) -> Any:
    """A HookedTransformer with the weights of a tiny model, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    config, anatomy = model.config, resolve(model)
    family: dict[str, Any] = (
        {
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "rotary_dim": anatomy.head_dim,
            "rotary_adjacent_pairs": False,
            "n_key_value_heads": anatomy.n_kv_heads,
            "gated_mlp": True,
            "final_rms": True,
            "eps": config.rms_norm_eps,
            "act_fn": config.hidden_act,
        }
        if name == "llama"
        else {"normalization_type": "LN", "eps": config.layer_norm_epsilon, "act_fn": config.activation_function}
    )
    cfg = HookedTransformerConfig(
        n_layers=anatomy.n_layers,
        d_model=anatomy.d_model,
        n_heads=anatomy.n_heads,
        d_head=anatomy.head_dim,
        d_mlp=anatomy.d_mlp,
        d_vocab=anatomy.vocab_size,
        n_ctx=64,
        device="cpu",
        **family,
    )
    made = HookedTransformer(cfg)
    weights = (convert_llama_weights if name == "llama" else convert_gpt2_weights)(model, cfg)
    made.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
    return made.eval()


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Any, Any]]:
    """(transformers model, bridge around a copy of it) by name, made on first use."""

    class Made(dict[str, tuple[Any, Any]]):
        def __missing__(self, name: str) -> tuple[Any, Any]:
            model = zoo.build(name)
            self[name] = (model, bridged(copy.deepcopy(model)))
            return self[name]

    return Made()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def on_real(key: tuple[str, int], value: Tensor, real: Tensor) -> Tensor:
    """Values of real tokens only (of a pattern: its rows)."""
    return (value.transpose(1, 2) if key[0] == "pattern" else value)[real]


def worst(got: Any, want: Any, real: Tensor) -> dict[str, float]:
    """Largest relative error of each site over its layers, on real tokens."""
    found: dict[str, float] = {}
    for key in got:
        value = error(on_real(key, got[key], real), on_real(key, want[key], real))
        found[key[0]] = max(found.get(key[0], 0.0), value)
    return found


@torch.no_grad()
def reference(bridge: Any, batch: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """Everything that run_with_cache offers at this package's sites."""
    _, cache = bridge.run_with_cache(batch["input_ids"], attention_mask=batch["attention_mask"])
    keys = [key for key in resolve(bridge).points if key[0] in NAMES]
    found = {key: cache[NAMES[key[0]].format(key[1])] for key in keys}
    return {**found, ("final_norm", 0): cache["ln_final.hook_out"]}


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def an_edit(site: str, model: Any, layer: int = 1) -> Edit:
    """An edit of `site` that changes the logits of every architecture (a constant on all keys would not)."""
    anatomy = resolve(model)
    width = anatomy.head_dim if site in "qkvz" else anatomy.n_units(site)
    if site in "qk":
        return Scale(site=site, layer=layer, units=[1], factor=torch.linspace(-1, 3, width))
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return Add(site=site, layer=layer, units=[1] if site in "vz" else None, vector=vector)


# ---------------------------------------------------------------- as a reference


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", TINY)
def test_capture_on_transformers_equals_run_with_cache(name: str, padding: Any, pairs: Any) -> None:
    model, bridge = pairs[name]
    batch = zoo.inputs(name, model, padding=padding)
    want = reference(bridge, batch)
    got = capture(model, batch, {site: "all" for site in [*NAMES, "final_norm"]}, positions="all")
    assert set(got) == set(want)
    errors = worst(got, want, batch["attention_mask"].bool())
    assert max(errors.values()) < TOLERANCE, errors


# ---------------------------------------------------------------- a TransformerBridge as the model


@pytest.mark.parametrize("name", TINY + MORE)
def test_capture_on_a_bridge_equals_capture_on_its_model(name: str, pairs: Any) -> None:
    model, bridge = pairs[name]
    batch = zoo.inputs(name, model, padding="left", batch=3)
    assert resolve(bridge).sites() == resolve(model).sites()
    shapes = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "vocab_size", "structure")
    assert [getattr(resolve(bridge), s) for s in shapes] == [getattr(resolve(model), s) for s in shapes]
    sites = resolve(model).sites()
    got, want = (capture(m, batch, sites, positions="all", logits="last") for m in (bridge, model))
    errors = worst(got, want, batch["attention_mask"].bool())
    assert set(errors) == set(sites)
    assert max(errors.values()) < TOLERANCE, errors
    assert error(got.logits, want.logits) < TOLERANCE
    assert resolve(bridge).validate(bridge) < 1e-5


@pytest.mark.parametrize("name", TINY + MORE)
def test_a_bridge_has_the_fingerprint_of_its_model(name: str, pairs: Any) -> None:
    model, bridge = pairs[name]
    assert fingerprint(unwrap(bridge)) == fingerprint(model)


@pytest.mark.parametrize("name", TINY)
def test_edits_on_a_bridge_change_its_logits_as_on_the_model_and_leave_no_trace(name: str, pairs: Any) -> None:
    model, bridge = pairs[name]
    ids = zoo.inputs(name, model)["input_ids"]
    clean, clean_bridge = logits(model, ids), logits(bridge, ids)
    for site in [s for s in resolve(model).sites() if s != "pattern"]:
        change = an_edit(site, model, layer=0 if site == "final_norm" else 1)
        with edit(model, change):
            want = logits(model, ids)
        with edit(bridge, change):
            got = logits(bridge, ids)
        assert error(want, clean) > 1e-3, f"the edit of {site} does nothing"
        assert error(got, want) < TOLERANCE, site
        with pytest.raises(ZeroDivisionError), edit(bridge, change):
            raise ZeroDivisionError
        assert torch.equal(logits(bridge, ids), clean_bridge), site


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("cache", [True, False])
def test_edits_reach_a_bridges_own_generate(positions: str, cache: bool, pairs: Any) -> None:
    model, bridge = pairs["llama"]
    batch = zoo.inputs("llama", model)
    vector = 4 * torch.randn(resolve(model).d_model, generator=torch.Generator().manual_seed(1))
    change = Add(site="resid_post", layer=2, vector=vector, positions=positions)
    plain = model.generate(**batch, max_new_tokens=6, do_sample=False)
    with edit(model, change):
        want = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache)
    with edit(bridge, change):
        got = generated(bridge, batch["input_ids"], 6, cache)
    assert torch.equal(got, want)
    assert not torch.equal(want, plain)
    assert torch.equal(generated(bridge, batch["input_ids"], 6, cache), plain)


def generated(model: Any, ids: Tensor, n: int, cache: bool = True) -> Tensor:
    return model.generate(
        ids,
        max_new_tokens=n,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=cache,
        return_type="tokens",
        verbose=False,
    )


def test_record_sees_every_pass_of_a_bridges_generate(pairs: Any) -> None:
    model, bridge = pairs["qwen3"]
    ids = zoo.inputs("qwen3", model)["input_ids"]
    with record(bridge, "resid_post", layers=[-1], positions="all") as steps:
        generated(bridge, ids, 4)
    assert [step["resid_post", 3].shape[1] for step in steps] == [9, 1, 1, 1]


def test_a_model_bridged_after_it_was_used_is_described_anew() -> None:
    model = zoo.build("gpt2")
    batch = zoo.inputs("gpt2", model)
    before = capture(model, batch, ["q", "z"])
    bridge = bridged(model)
    after = capture(model, batch, ["q", "z"])
    assert max(error(after[key], before[key]) for key in before) < TOLERANCE
    assert resolve(bridge) is resolve(model)


def test_edits_on_a_processed_bridge_still_arrive() -> None:
    """Compatibility mode folds norms and runs MLPs without their modules; the HookPoints stay."""
    bridge = bridged(zoo.build("llama"))
    bridge.enable_compatibility_mode(disable_warnings=True)
    ids = zoo.inputs("llama", unwrap(bridge))["input_ids"]
    clean = logits(bridge, ids)
    acts = capture(bridge, ids, ["mlp_post", "mlp_out", "z", "resid_post"], positions="all")
    _, cache = bridge.run_with_cache(ids)
    for (site, layer), value in acts.items():
        assert error(value, cache[NAMES[site].format(layer)]) < TOLERANCE, site
    for site in ("mlp_post", "z", "resid_mid"):
        with edit(bridge, an_edit(site, bridge)):
            assert error(logits(bridge, ids), clean) > 1e-3, site
    assert torch.equal(logits(bridge, ids), clean)


# ---------------------------------------------------------------- a HookedTransformer as the model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_capture_on_a_hooked_transformer_equals_transformers(name: str, padding: Any) -> None:
    model = zoo.build(name)
    lens = hooked(name, model)
    batch = zoo.inputs(name, model, padding=padding)
    sites = resolve(model).sites()
    assert resolve(lens).sites() == sites
    got, want = (capture(m, batch, sites, positions="all", logits="last") for m in (lens, model))
    errors = worst(got, want, batch["attention_mask"].bool())
    assert set(errors) == set(sites)
    assert max(errors.values()) < TOLERANCE, errors
    assert error(got.logits, want.logits) < TOLERANCE
    got, want = (capture(m, batch, sites[:3], positions=[(0, 2), (1, 4)], reduce="mean") for m in (lens, model))
    assert max(error(got[key], want[key]) for key in want) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edits_on_a_hooked_transformer_act_as_on_transformers(name: str) -> None:
    model = zoo.build(name)
    lens = hooked(name, model)
    ids = zoo.inputs(name, model)["input_ids"]
    clean = logits(lens, ids)
    for site in [s for s in resolve(lens).sites() if s != "pattern"]:
        change = an_edit(site, model, layer=0 if site == "final_norm" else 1)
        with edit(model, change):
            want = logits(model, ids)
        with edit(lens, change):
            got = logits(lens, ids)
        assert error(got, want) < TOLERANCE, site
        assert error(got, clean) > 1e-3, f"the edit of {site} does nothing"
        assert torch.equal(logits(lens, ids), clean), site


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("cache", [True, False])
def test_edits_and_records_reach_the_generate_of_a_hooked_transformer(positions: str, cache: bool) -> None:
    """Its generate() calls forward() directly, past the hooks on the model itself."""
    model = zoo.build("llama")
    lens = hooked("llama", model)
    lens.tokenizer = SimpleNamespace(padding_side="right", pad_token_id=0, bos_token_id=1)  # for its padding mask
    batch = zoo.inputs("llama", model)
    vector = 4 * torch.randn(lens.cfg.d_model, generator=torch.Generator().manual_seed(1))
    change = Add(site="resid_post", layer=2, vector=vector, positions=positions)
    with edit(model, change):
        want = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache)
    with edit(lens, change), record(lens, "resid_post", layers=[1], positions="all") as steps:
        got = generated(lens, batch["input_ids"], 5, cache)
    assert torch.equal(got, want)
    assert [step["resid_post", 1].shape[1] for step in steps] == ([9, 1, 1, 1, 1] if cache else [9, 10, 11, 12, 13])


def test_a_hooked_transformer_refuses_inputs_that_it_would_ignore() -> None:
    lens = hooked("llama", zoo.build("llama"))
    batch = zoo.inputs("llama", zoo.build("llama"))
    with pytest.raises(InputError, match="drop position_ids"):
        capture(lens, {**batch, "position_ids": torch.arange(9)[None]})


def test_models_and_sites_that_transformer_lens_does_not_offer_are_named() -> None:
    from transformer_lens import HookedEncoder, HookedTransformer, HookedTransformerConfig

    tiny = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_vocab": 16, "device": "cpu"}
    lens = HookedTransformer(HookedTransformerConfig(**tiny, attn_only=True))
    with pytest.raises(HookError, match="mlp.hook_post"):
        capture(lens, torch.ones(1, 4, dtype=torch.long), "mlp_post")
    with pytest.raises(InputError, match="HookedEncoder has no decoder"):
        lens_anatomy(
            HookedEncoder(HookedTransformerConfig(**tiny, d_mlp=8, act_fn="gelu", attention_dir="bidirectional"))
        )


# ---------------------------------------------------------------- what the references brought to light


def test_gradients_pass_an_edit_between_attention_and_mlp() -> None:
    model = zoo.build("llama")
    batch = zoo.inputs("llama", model)
    embedding = model.get_input_embeddings().weight

    def slope(factor: float) -> Tensor:
        with edit(model, Scale(site="resid_mid", layer=3, factor=factor)):
            return torch.autograd.grad(model(**batch).logits[:, -1].square().sum(), embedding)[0]

    assert error(slope(1.0), torch.autograd.grad(model(**batch).logits[:, -1].square().sum(), embedding)[0]) < TOLERANCE
    assert not torch.equal(slope(0.0), slope(1.0))
    assert not slope(0.0).any(), "the residual stream went past the edit"


def test_a_left_padded_row_of_a_model_with_learned_positions_reads_as_if_alone() -> None:
    model = zoo.build("gpt2")
    batch = zoo.inputs("gpt2", model, padding="left")
    alone = batch["input_ids"][1:][:, batch["attention_mask"][1].bool()]
    padded = capture(model, batch, "resid_post")["resid_post", 3][1]
    assert error(padded, capture(model, alone, "resid_post")["resid_post", 3][0]) < TOLERANCE


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def demo_bridge(demo: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    from emocircuits.models.demo_model import demo_path

    model = copy.deepcopy(demo.model)
    return TransformerBridge.boot_transformers(
        str(demo_path()), hf_model=model, tokenizer=copy.deepcopy(demo.tokenizer), device="cpu"
    )


@pytest.fixture(scope="module")
def texts(demo: Any) -> dict[str, Tensor]:
    rows = ["The letter from the hospital arrived on a grey morning.", "She laughed until she cried."]
    return dict(demo.tokenizer(rows, return_tensors="pt", padding=True, padding_side="left"))


@pytest.mark.real_model
def test_demo_capture_equals_the_bridge(demo: Any, demo_bridge: Any, texts: dict[str, Tensor]) -> None:
    want = reference(demo_bridge, texts)
    real = texts["attention_mask"].bool()
    assert not real.all()
    sites = {site: "all" for site in [*NAMES, "final_norm"]}
    plain, through = (capture(m, texts, sites, positions="all") for m in (demo.model, demo_bridge))
    assert set(plain) == set(want) == set(through)
    for got in (plain, through):
        errors = worst(got, want, real)
        assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.real_model
def test_demo_edits_act_alike_on_the_bridge(demo: Any, demo_bridge: Any, texts: dict[str, Tensor]) -> None:
    ids = texts["input_ids"][:1]
    clean = logits(demo_bridge, ids)
    for site in ("resid_mid", "z", "mlp_post"):
        change = Scale(site=site, layer=9, factor=-3.0)
        with edit(demo.model, change):
            want = logits(demo.model, ids)
        with edit(demo_bridge, change):
            got = logits(demo_bridge, ids)
        assert error(got, want) < TOLERANCE, site
        assert error(got, clean) > 1e-3, f"the edit of {site} does nothing"
    assert torch.equal(logits(demo_bridge, ids), clean)
