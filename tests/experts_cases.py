"""MoSE models for tests, and the definition of their layer written token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import zoo

from emocircuits.steering import experts
from emocircuits.steering.experts import MoSEConfig

NAME = "qwen2_5_omni"
SMALL = MoSEConfig(r=3, alpha=5.0, n_experts=3, modalities=("audio", "image"), target_modules=("q_proj", "v_proj"))
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
GREEDY["suppress_tokens"] = list(range(zoo.LAST_TEXT, 128))  # a placeholder would need features of its own
OUTPUT = {
    "phi4_multimodal": "o_proj",  # its other projections are fused
    "gemma3n": "q_proj",  # the last layers borrow keys and values
    "minicpmv4_6": "down_proj",  # most layers have linear attention
}


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    """Experts as training could leave them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.tensors():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise if "gate" in name or "modality" in name else 0.3 * noise)
    return model


def wrapped(config: MoSEConfig = SMALL, seed: int = 0, name: str = NAME) -> tuple[Any, dict[str, Any]]:
    model = zoo.build(name)
    return randomise(experts.wrap(model, config), seed), zoo.multimodal_inputs(name, model)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def layers_of(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_experts")}


def n_hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    """Loss on text tokens only, as multimodal training has it."""
    return {**inputs, "labels": torch.where(inputs["input_ids"] < zoo.LAST_TEXT, inputs["input_ids"], -100)}


def text_only(model: Any) -> dict[str, Any]:
    return zoo.inputs(NAME, model)


@contextmanager
def seen(module: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(input, output) of a module in each pass."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = module.register_forward_hook(lambda _, args, out: found.append((args[0].detach(), out.detach())))
    try:
        yield found
    finally:
        hook.remove()


def gates_by_hand(layer: Any, x: torch.Tensor, modality: int) -> torch.Tensor:
    return (layer.lora_gate["default"][modality] @ x).softmax(0)


def by_hand(layer: Any, x: torch.Tensor, ids: torch.Tensor, config: MoSEConfig, tokens: dict[str, int]) -> torch.Tensor:
    """The definition, token by token; x [B, T, in]."""
    theta = layer.lora_modality["default"]
    omega = len(theta) * theta.exp() / theta.exp().sum()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    names = config.modalities or tuple(tokens)
    rows = []
    for row in range(len(x)):
        for column in range(x.shape[1]):
            token, low = int(ids[row, column]), a @ x[row, column]
            change = b @ low
            for number, name in enumerate(names):
                if token == tokens[name]:
                    gate = gates_by_hand(layer, x[row, column], number)
                    pool = layer.lora_experts["default"][number]
                    change = sum(omega[number] * gate[e] * (pool[e] @ low) for e in range(config.n_experts))
            rows.append(layer.base_layer(x[row, column]) + config.alpha / config.r * change)
    return torch.stack(rows).view(*x.shape[:2], -1)
