"""Steering inside vLLM: a worker extension that adds a steerer's vectors to the outputs of its decoder layers.

    llm = LLM(model, enforce_eager=True, worker_extension_cls="emocircuits.steering.vllm_worker.SteerWorker")
    llm.collective_rpc("steer", args=("fear.safetensors",))
    llm.reset_prefix_cache()  # cached prefixes were computed without the steerer

Eager mode is needed because a compiled model and its CUDA graphs replay what ran when they were captured: a hook that
comes later never runs. The extension has been tested on modules that follow vLLM's conventions, not inside vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ArtefactError, HookError, InputError
from ..models.anatomy import BLOCK_LISTS, NOT_TEXT, text_config
from .export import residual_vectors
from .steerer import Steerer


class SteerWorker:
    """What vLLM mixes into its workers; both methods are called through `collective_rpc`."""

    def steer(self, path: str) -> int:
        """Steer every position of every request from now on, instead of any earlier steerer; how many layers.

        Raises InputError for other sites or positions than resid_post at all, HookError when vLLM is not eager.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if not getattr(getattr(runner, "model_config", None), "enforce_eager", True):
            raise HookError("steering needs an eager engine, since graphs skip new hooks; pass enforce_eager=True")
        handles = hook_layers(Steerer.load(path), runner.model)
        self.unsteer()
        self._steering_hooks = handles
        return len(handles)

    def unsteer(self) -> None:
        """Take the steerer off again; safe to call when there is none."""
        for handle in getattr(self, "_steering_hooks", ()):
            handle.remove()
        self._steering_hooks: list[RemovableHandle] = []


def hook_layers(steerer: Steerer, model: nn.Module) -> list[RemovableHandle]:
    """Hooks that add the steerer's vectors after their decoder layers; remove the handles to undo it.

    Raises InputError for a layer the model lacks, ArtefactError for another width, HookError without decoder layers.
    """
    vectors, blocks = residual_vectors(steerer), decoder_layers(model)
    width = getattr(text_config(getattr(model, "config", None)), "hidden_size", None)
    for layer, vector in vectors.items():
        if layer >= len(blocks):
            raise InputError(f"{steerer.name!r} steers layer {layer}, but this model has {len(blocks)} layers")
        if width is not None and len(vector) != width:
            raise ArtefactError(f"{steerer.name!r} has width {len(vector)}, but this model has {width}")
    return [blocks[layer].register_forward_hook(_Push(vector)) for layer, vector in vectors.items()]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of the text model, whatever its class; raises HookError when there is not just one."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        is_text = not any(word in path for word in NOT_TEXT)
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LISTS and is_text and not inside:
            found[path] = module
    if len(found) != 1:
        raise HookError(f"expected one list of decoder layers in {type(model).__name__}, found {list(found) or 'none'}")
    return next(iter(found.values()))


class _Push:
    """Adds one vector to a layer's output.

    vLLM's layers return (hidden_states, residual), and the next norm adds the two, so a push on the first is a push on
    their sum. Other layers return hidden_states alone or first. Under tensor parallelism every rank holds all of it.
    """

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    @torch.no_grad()
    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.vector.device != hidden.device or self.vector.dtype != hidden.dtype:
            self.vector = self.vector.to(hidden.device, hidden.dtype)
        pushed = hidden + self.vector
        return (pushed, *output[1:]) if isinstance(output, tuple) else pushed
