"""MoSE on disk and what is refused: nothing may turn into a plain LoRA, and errors leave models as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo

pytest.importorskip("peft")

from experts_cases import NAME, SMALL, layers_of, logits, n_hooks, randomise, wrapped

from emocircuits import artefact
from emocircuits.errors import ArtefactError, HookError, InputError, MissingPackageError
from emocircuits.steering import experts
from emocircuits.steering.experts import MoSEConfig


def test_saved_experts_come_back_exactly(tmp_path: Any) -> None:
    made, inputs = wrapped()
    expected = logits(made, inputs)
    folder = experts.save(made, tmp_path / "mose")
    back = experts.load(folder, zoo.build(NAME))
    assert back.mose_config == SMALL
    assert float((logits(back, inputs) - expected).abs().max()) == 0.0
    assert not back.training
    made.save_pretrained(str(tmp_path / "trainers"))
    back.unload()
    assert torch.equal(logits(experts.load(tmp_path / "trainers", back.get_base_model()), inputs), expected)
    whole = MoSEConfig(r=2, n_experts=2, layers=(0, 2))
    made = randomise(experts.wrap(zoo.build(NAME), whole))
    back = experts.load(experts.save(made, tmp_path / "some"), zoo.build(NAME))
    assert float((logits(back, inputs) - logits(made, inputs)).abs().max()) == 0.0
    other = randomise(copy.deepcopy(made), seed=4)
    experts.reload(other, tmp_path / "some")  # a copy is still known as a model of these weights
    assert torch.equal(logits(other, inputs), logits(made, inputs))
    copied = experts.save(copy.deepcopy(made), tmp_path / "copied")
    assert torch.equal(logits(experts.load(copied, zoo.build(NAME)), inputs), logits(made, inputs))


def test_peft_alone_never_loads_a_plain_lora_from_it(tmp_path: Any) -> None:
    from peft import LoraConfig, PeftConfig, PeftModel
    from safetensors import SafetensorError

    made, _ = wrapped()
    folder = str(experts.save(made, tmp_path / "mose"))
    with pytest.raises(KeyError, match="experts.load"):
        PeftModel.from_pretrained(zoo.build(NAME), folder)
    with pytest.raises(KeyError, match="experts.load"):
        PeftConfig.from_pretrained(folder)
    with pytest.raises(KeyError, match="experts.load"):
        zoo.build(NAME).load_adapter(folder)
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(zoo.build(NAME), folder, config=LoraConfig(target_modules=["q_proj", "v_proj"]))


def test_what_cannot_fit_is_refused_and_the_model_stays_as_it_was(tmp_path: Any) -> None:
    made, inputs = wrapped()
    folder = experts.save(made, tmp_path / "mose")
    other = zoo.build("llava")
    with pytest.raises(ArtefactError, match="was made for"):
        experts.load(folder, other)
    wrong = zoo.build(NAME, seed=3)
    clean, hooks = logits(wrong, inputs), n_hooks(wrong)
    with pytest.raises(ArtefactError, match="other weights"):
        experts.load(folder, wrong)
    assert (n_hooks(wrong), layers_of(wrong)) == (hooks, {})
    with pytest.warns(UserWarning, match="other weights"):
        experts.load(folder, wrong, strict=False).unload()
    assert torch.equal(logits(wrong, inputs), clean)
    with pytest.raises(ArtefactError, match="another configuration"):
        experts.reload(experts.wrap(zoo.build(NAME), MoSEConfig(r=2)), folder)
    from safetensors.torch import load_file

    tensors, header = load_file(folder / experts.FILE), artefact.read_header(folder / experts.FILE)
    name = next(n for n in tensors if "experts" in n)
    for broken in ({**tensors, name: tensors[name][:, :1]}, {n: t for n, t in tensors.items() if n != name}):
        artefact.save(tmp_path / "broken" / experts.FILE, experts.KIND, broken, header)
        model = zoo.build(NAME)
        with pytest.raises(ArtefactError, match="does not fit"):
            experts.load(tmp_path / "broken", model)
        assert layers_of(model) == {}
    artefact.save(tmp_path / "kind" / experts.FILE, "steerer", tensors, header)
    with pytest.raises(ArtefactError, match="steerer"):
        experts.load(tmp_path / "kind", zoo.build(NAME))
    (folder / experts.FILE).write_bytes((folder / experts.FILE).read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="truncated"):
        experts.load(folder, zoo.build(NAME))
    with pytest.raises(InputError, match="no artefact"):
        experts.load(tmp_path / "nowhere", zoo.build(NAME))
    from peft import LoraConfig, get_peft_model

    get_peft_model(zoo.build(NAME), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ArtefactError, match="peft"):
        experts.load(tmp_path / "plain", zoo.build(NAME))


def test_merging_and_other_adapters_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    made, inputs = wrapped()
    clean = logits(made, inputs)
    for attempt in (
        made.merge_adapter, made.merge_and_unload, next(iter(layers_of(made).values())).merge,
        lambda: next(iter(layers_of(made).values())).get_delta_weight("default"),
        lambda: made.add_adapter("second", LoraConfig()), lambda: experts.wrap(made),
        lambda: experts.wrap(made.get_base_model()),
        lambda: experts.wrap(get_peft_model(zoo.build(NAME), LoraConfig(target_modules=["q_proj"]))),
    ):  # fmt: skip
        with pytest.raises(InputError):
            attempt()
    assert torch.equal(logits(made, inputs), clean)
    with pytest.raises(HookError, match="one adapter"):
        made(**inputs, adapter_names=["default", "__base__"])


def test_bad_requests_are_one_sentence(monkeypatch: Any) -> None:
    model = zoo.build(NAME)
    hooks = n_hooks(model)
    for config, match in (
        (MoSEConfig(modalities=("smell",)), "modality 'smell'"), (MoSEConfig(layers=(9,)), "layer 9"),
        (MoSEConfig(target_modules=("q_proj", "nose")), "target module 'nose'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            experts.wrap(model, config)
    with pytest.raises(InputError, match="placeholder"):
        experts.wrap(zoo.build("llama"))
    for wrong in (
        {"r": 0}, {"n_experts": 1.5}, {"alpha": 0}, {"balance": -1}, {"dropout": 1.0}, {"modalities": ()},
        {"target_modules": "q_proj"},
    ):  # fmt: skip
        with pytest.raises(InputError):
            MoSEConfig(**wrong)
    with pytest.raises(InputError, match="no MoSE experts"):
        experts.gates(model, {})
    assert (n_hooks(model), layers_of(model)) == (hooks, {})
    made, _ = wrapped()
    for control, values in (
        (experts.clamp, {"audio": 3}), (experts.clamp, {"video": 0}), (experts.clamp, {"audio": "all"}),
        (experts.clamp, {"audio": [0.5, 0.5]}), (experts.rebalance, {"audio": -1.0}),
        (experts.rebalance, {"text": 1.0}), (experts.rebalance, {"audio": float("nan")}),
    ):  # fmt: skip
        with pytest.raises(InputError), control(made, values):
            pass
    with pytest.raises(InputError, match="layer 7"), experts.clamp(made, {"audio": 0}, layers=7):
        pass
    for version in ("0.20.1", "0.22.0", "1.0"):
        monkeypatch.setattr(experts.metadata, "version", lambda _, version=version: version)
        with pytest.raises(MissingPackageError, match=f"found {version}"):
            experts.wrap(model)


def test_mixtures_of_experts_and_linears_that_get_other_tokens() -> None:
    """A module that is given rearranged tokens is refused when it runs; peft's renaming of experts when it wraps."""
    made, inputs = wrapped(MoSEConfig(r=2, n_experts=2, layers=(1,)), name="qwen3_omni_moe")
    assert logits(made, inputs).isfinite().all()
    layer = next(iter(layers_of(made).values()))
    made.get_base_model().model.language_model.layers[1].register_forward_pre_hook(
        lambda _, args: layer(torch.randn(1, 3, layer.in_features)) and None
    )
    with pytest.raises(HookError, match="leave it out"):
        logits(made, inputs)
