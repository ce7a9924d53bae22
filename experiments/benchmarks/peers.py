"""The same work done by other packages. Each is imported only when it is measured."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from harness import Line, Way
from torch import Tensor

NOT_COMPARED = ("pyvene",)
"""Packages whose releases pin other versions of the stack; the import case times them where they are installed."""


def not_compared() -> list[Line]:
    """A line for each of them, so that a table shows who is missing."""
    return [
        Line(name, note="installed, but this case has no way for it" if find_spec(name) else "not installed")
        for name in NOT_COMPARED
    ]


def twin(model: Any) -> Any:
    """A copy of the model with modules of its own and the same weights: what a peer installs stays off the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def require(package: str) -> Any:
    """The package, or ModuleNotFoundError; its warnings about itself stay quiet."""
    warnings.filterwarnings("ignore", module=package)
    return import_module(package)


def greedy(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """[B, new_tokens] token ids by transformers' generate(), never ending early (see `workloads`)."""
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[:, ids.shape[1] :]


def raw_hooks(model: Any, ids: Tensor, new_tokens: int, vectors: dict[int, Tensor]) -> Way:
    """The least a hook can do: x + v on the output of a block."""

    def run() -> Tensor:
        handles = [
            model.model.layers[layer].register_forward_hook(lambda _m, _a, out, v=vector: out + v)
            for layer, vector in vectors.items()
        ]
        try:
            return greedy(model, ids, new_tokens)
        finally:
            for handle in handles:
                handle.remove()

    return run


# ---------------------------------------------------------------- nnsight


@cache
def nnsight_model(model: Any, tokenizer: Any) -> Any:
    nnsight = require("nnsight")
    if hasattr(nnsight, "TransformersModel"):
        return nnsight.TransformersModel(twin(model), task="text-generation", tokenizer=tokenizer)
    return nnsight.LanguageModel(twin(model), tokenizer=tokenizer)


def nnsight_capture(wrapped: Any, ids: Tensor, stop: bool) -> Way:
    """Last token of every block's output, cloned; with `stop`, the forward pass ends after the last block."""
    nnsight = require("nnsight")

    def run() -> Tensor:
        with torch.no_grad(), wrapped.trace(ids) as tracer:
            rows = nnsight.save([])
            for block in wrapped.model.layers:
                rows.append(block.output[:, -1].clone())
            if stop:
                tracer.stop()
        return torch.stack(list(rows))

    return run


def nnsight_steer(wrapped: Any, ids: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Way:
    def run() -> Tensor:
        with torch.no_grad(), wrapped.generate(ids, max_new_tokens=new_tokens, do_sample=False) as tracer:
            for _ in tracer.iter[:new_tokens]:
                wrapped.model.layers[layer].output = wrapped.model.layers[layer].output + vector
            tokens = tracer.result.save()
        return tokens[:, ids.shape[1] :]

    return run


# ---------------------------------------------------------------- TransformerLens


@cache
def bridge_model(model: Any, tokenizer: Any) -> Any:
    bridges = require("transformer_lens.model_bridge")
    name = str(getattr(model.config, "_name_or_path", "") or "model")
    return bridges.TransformerBridge.boot_transformers(name, hf_model=twin(model), tokenizer=tokenizer, device="cpu")


@cache
def hooked_model(model: Any, tokenizer: Any, name: str = "google/gemma-3-270m") -> Any:
    """The demo model as a HookedTransformer without weight processing."""
    lens = require("transformer_lens")
    made = lens.HookedTransformer.from_pretrained_no_processing(
        name, hf_model=twin(model), tokenizer=tokenizer, device="cpu"
    )
    made.cfg.use_attn_result = False
    return made.eval()


def bridge_capture(bridge: Any, ids: Tensor, n_layers: int, tuned: bool) -> Way:
    """run_with_cache filtered to resid_post; `tuned` keeps the last position only and asks for no logits."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    options = {"pos_slice": -1, "return_type": None} if tuned else {}

    def run() -> Tensor:
        with torch.no_grad():
            output, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names, **options)
            kept = torch.stack([cache[name] if tuned else cache[name][:, -1] for name in names])
        del output
        return kept.reshape(n_layers, len(ids), -1)

    return run


def bridge_steer(bridge: Any, ids: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Way:
    hooks = [(f"blocks.{layer}.hook_out", lambda x, hook: x + vector)]

    def run() -> Tensor:
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            tokens = bridge.generate(ids, max_new_tokens=new_tokens, do_sample=False, stop_at_eos=False, verbose=False)
        return tokens[:, ids.shape[1] :]

    return run


# ---------------------------------------------------------------- steering packages


def repeng_steer(model: Any, ids: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Way:
    """repeng's ControlModel around a twin; setting and resetting the control counts."""
    setattr(np, "float_", np.float64)  # noqa: B010  (repeng 0.4 names it, NumPy 2 has dropped it)
    repeng = require("repeng")
    wrapped = repeng.ControlModel(twin(model), [layer])
    control = repeng.ControlVector(model.config.model_type, {layer: vector.numpy()})

    def run() -> Tensor:
        wrapped.set_control(control)
        try:
            return greedy(wrapped, ids, new_tokens)
        finally:
            wrapped.reset()

    return run


def vectors_steer(model: Any, ids: Tensor, new_tokens: int, layer: int, vector: Tensor) -> Way:
    """A SteeringVector of the package steering-vectors, applied to every token of a twin."""
    made, other = require("steering_vectors").SteeringVector({layer: vector}, "decoder_block"), twin(model)

    def run() -> Tensor:
        with made.apply(other):
            return greedy(other, ids, new_tokens)

    return run
