"""Who a model is: hashes of its config and of a fixed sample of its weights, cheap enough to take at every attach."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ArtefactError
from .anatomy import is_quantised
from .lens import transformers_parameters

N_PARAMETERS, N_ENTRIES = 64, 256
VOLATILE = (
    "_name_or_path",
    "architectures",  # only set once a model has been saved
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)

_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Name, architecture, size and hashes of a model; cached per model object.

    The weights' hash covers up to 64 parameters at 256 places each, rounded to bfloat16, so that one checkpoint has
    one fingerprint in float32 and in bfloat16. It is taken once, before any edit.
    """
    if model not in _CACHE:
        config = getattr(model, "config", None)
        _CACHE[model] = {
            "name": str(getattr(config, "_name_or_path", "") or type(model).__name__).rstrip("/").split("/")[-1],
            "revision": getattr(config, "_commit_hash", None),
            "architecture": type(model).__name__,
            "n_params": sum(_numel(p) for _, p in transformers_parameters(model)),
            "config_sha256": _config_hash(config),
            "weights_sha256": _weights_hash(model),
        }
    return dict(_CACHE[model])


def keep(model: nn.Module, known: Mapping[str, Any]) -> None:
    """Let a model that parameters were added to keep the fingerprint it had before."""
    _CACHE[model] = dict(known)


def _config_hash(config: Any) -> str:
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return hashlib.sha256(json.dumps(_stable(values), sort_keys=True, default=str).encode()).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _stable(v) for k, v in value.items() if k not in VOLATILE and not str(k).startswith("_attn")}
    return [_stable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _numel(parameter: torch.Tensor) -> int:
    """Entries of a parameter; bitsandbytes packs two of 4 bits into one, and remembers the shape they had."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


@torch.no_grad()
def _weights_hash(model: nn.Module) -> str:
    named = sorted(transformers_parameters(model), key=lambda pair: pair[0])
    step = max(1, -(-len(named) // N_PARAMETERS))
    digest = hashlib.sha256()
    for name, parameter in named[::step]:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta" or is_quantised(parameter):
            continue
        flat = parameter.detach().reshape(-1)
        count = min(N_ENTRIES, flat.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        digest.update(flat[places].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def check_fits(made_for: Mapping[str, Any], model: nn.Module, *, strict: bool = False) -> str | None:
    """Raise ArtefactError when an artefact was made for another model; a warning text when only weights differ.

    strict: other weights are an error too.
    """
    here = fingerprint(model)
    if made_for.get("weights_sha256") == here["weights_sha256"]:
        return None
    if (made_for.get("architecture"), made_for.get("n_params")) != (here["architecture"], here["n_params"]):
        raise ArtefactError(
            f"this artefact was made for {made_for.get('name')} ({made_for.get('architecture')},"
            f" {made_for.get('n_params'):,} parameters), not for {here['name']} ({here['architecture']},"
            f" {here['n_params']:,}); load it with the model it was made for"
        )
    warning = f"made for {made_for.get('name')}, attached to {here['name']}: same shapes, other weights"
    if strict:
        raise ArtefactError(f"this artefact was {warning}; load it with the model it was made for")
    return warning
