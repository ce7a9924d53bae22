"""Steerers baked into a model folder: any loader of the folder gets the steered model, with no code of ours."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.bias import BEFORE, is_biased
from ..activations.edits import Add
from ..errors import HookError, InputError
from ..models.anatomy import Anatomy, is_quantised, resolve, text_config, unwrap
from .steerer import Steerer

INSTEAD = "attach the steerer, or write it for another engine (to_gguf)"
TOLERANCE = {torch.float32: 1e-4}
"""Relative; in half precision the hook and the bias round at different places."""


def bake(steerer: Steerer, model: Any, path: str | Path, tokenizer: Any = None, *, check: bool = True) -> Path:
    """Write a Hugging Face folder whose plain `from_pretrained` gives the steered model; `model` stays as it is.

    The vectors become biases of the output projections; where a config switch is needed for these (as in Llama), it is
    turned on and the other biases it brings are zero. `check` loads the folder once more and compares logits.
    Raises InputError for other positions than "all", vectors per row, or a folder that is not empty; HookError where
    the architecture has no such bias on a plain load, or the comparison fails.
    """
    module: Any = unwrap(model)
    path = require_free(path)
    _require_plain(module)
    steerer.check(module)
    added = _biases(steerer, module, resolve(module))
    skeleton = _with_biases(module, set(added))
    skeleton.load_state_dict(_state(module, skeleton, added), assign=True)
    skeleton.tie_weights()
    skeleton.generation_config = copy.deepcopy(getattr(module, "generation_config", None))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        skeleton.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if check:
            _require_same_logits(steerer, module, type(module).from_pretrained(partial, dtype=module.dtype))
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def require_free(path: str | Path) -> Path:
    """The path of a folder to be made; raises InputError when something is there already."""
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder; choose another place for the baked model")
    return path


@torch.no_grad()
def _biases(steerer: Steerer, model: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    """What is added to the bias of which module, in float32."""
    added: dict[str, Tensor] = {}
    for edit in steerer.edits():
        if not isinstance(edit, Add) or edit.control is not None:
            how = "changes its strength as it goes" if isinstance(edit, Add) else "removes or bounds a component"
            raise InputError(f"a baked model adds constant vectors, but {steerer.name!r} {how}; attach the steerer")
        delta = edit.delta()
        if edit.positions != "all" or delta.dim() != (2 if edit.site == "z" else 1):
            what = "vectors per row" if edit.positions == "all" else f"positions {edit.positions!r}"
            raise InputError(f"a baked model steers every position of every row alike, not {what}; attach the steerer")
        path = _target(edit, anatomy)
        module = model.get_submodule(path)
        _require_weights(module, path, anatomy)
        delta = delta.float().cpu().flatten()
        if edit.site in BEFORE:
            weight: Any = module.weight.float().cpu()  # type: ignore[operator]
            delta = weight @ delta if isinstance(module, nn.Linear) else delta @ weight
        added[path] = added[path] + delta if path in added else delta
    if not added:
        raise InputError(f"{steerer.name!r} adds nothing at its strength, so there is nothing to bake")
    return added


def _target(edit: Add, anatomy: Anatomy) -> str:
    """The projection whose bias reaches the residual stream exactly as this edit does; HookError when none does."""
    layer = edit.layer % anatomy.n_layers
    if edit.site in BEFORE:
        return anatomy.point(edit.site, layer).module
    source = {"attn_out": "z", "mlp_out": "mlp_post", "resid_post": "mlp_post"}.get(edit.site)
    if source is None:
        raise HookError(f"a constant at {edit.site!r} is no bias of an output projection; {INSTEAD}")
    if anatomy.structure not in ("pre-norm", "parallel"):
        raise HookError(
            f"{anatomy.family} passes every sublayer's output through a norm, so no bias is a constant at"
            f" {edit.site!r}; {INSTEAD}"
        )
    point = anatomy.points.get((source, layer))
    if point is None:
        raise HookError(f"layer {layer} of {anatomy.family} has no single projection that writes last; {INSTEAD}")
    return point.module


def _require_plain(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(f"only a transformers model can be baked into a folder, not a {type(model).__name__}")
    if any(is_biased(m) for m in model.modules()):
        raise HookError("a steerer is attached to this model as a bias and would be baked in too; detach it first")


def _require_weights(module: nn.Module, path: str, anatomy: Anatomy) -> None:
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if not known or not isinstance(weight, Tensor) or is_quantised(weight) or weight.is_meta:
        raise HookError(
            f"{path} of this {anatomy.family} model is a {type(module).__name__} whose weights cannot be saved with a"
            " bias (quantised, offloaded or an adapter); load the plain model"
        )


def _with_biases(model: nn.Module, paths: set[str]) -> Any:
    """The same architecture without memory, with the fewest config switches on that give every path a bias."""
    config: Any = copy.deepcopy(model.config)
    skeleton = _empty(model, config)
    missing = _without_bias(skeleton, paths)
    text = text_config(config)
    for flag in [key for key, value in text.to_dict().items() if "bias" in key and value is False]:
        if not missing:
            break
        setattr(text, flag, True)
        wider = _empty(model, config)
        if _without_bias(wider, paths) < missing:
            skeleton, missing = wider, _without_bias(wider, paths)
        else:
            setattr(text, flag, False)
    if missing:
        raise HookError(
            f"no switch in the config of {text.model_type} gives {sorted(missing)[0]} a bias, so a plain load would"
            f" drop it; {INSTEAD}"
        )
    return skeleton


def _empty(model: nn.Module, config: Any) -> Any:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config)).eval()  # type: ignore[call-arg]


def _without_bias(skeleton: nn.Module, paths: set[str]) -> set[str]:
    return {path for path in paths if skeleton.get_submodule(path).bias is None}


@torch.no_grad()
def _state(model: nn.Module, skeleton: nn.Module, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors, zeros for biases it lacks, and new tensors for the biases that are added to."""
    state, wanted = dict(model.state_dict()), skeleton.state_dict()
    dtype = next(model.parameters()).dtype
    if foreign := sorted(state.keys() - wanted.keys()):
        raise HookError(f"this model holds {foreign[0]}, which its plain class has no place for; load the plain model")
    for name, parameter in wanted.items():
        if name not in state:
            if not name.endswith(".bias"):
                raise HookError(f"the switch for biases also brings {name}, which has no neutral value; {INSTEAD}")
            state[name] = torch.zeros(parameter.shape, dtype=dtype)
    for path, delta in added.items():
        bias = state[f"{path}.bias"]
        state[f"{path}.bias"] = (bias.float() + delta.to(bias.device)).to(bias.dtype)
    return state


@torch.no_grad()
def _require_same_logits(steerer: Steerer, model: Any, baked: Any) -> None:
    ids = torch.arange(1, 9, device=model.device)[None] % text_config(model.config).vocab_size
    with steerer.attach(model, compile_to="hook"):
        wanted = model(input_ids=ids).logits.float()
    found = baked.to(model.device).eval()(input_ids=ids).logits.float()
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCE.get(model.dtype, 0.05):
        raise HookError(
            f"the baked model's logits differ from the steered model's (relative error {error:.2g}), so this"
            f" architecture does more with its biases than add them; {INSTEAD}"
        )
