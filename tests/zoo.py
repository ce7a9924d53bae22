"""Tiny random-weight instances of real architectures, for tests that must hold on all of them.

Every model is built from its own Hugging Face config class, without network: 4 layers, width 32,
vocabulary 128, fp32, eval mode. Weights are redrawn so that every sublayer matters: projections
of order one gain, norm gains and biases away from their neutral values. The same name and seed always
give the same weights.

>>> model = TEXT["gemma2"]()
>>> logits = model(**inputs("gemma2", model)).logits          # [batch 2, length 9, vocabulary 128]
"""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from zoo_configs import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    BOS,
    FIRST_TEXT,
    IMAGE,
    LAST_TEXT,
    MULTIMODAL_CONFIGS,
    PAD,
    TEXT_CONFIGS,
    VISION_END,
    VISION_START,
)

Builder = Callable[[], PreTrainedModel]

# ---------------------------------------------------------------- building


@torch.no_grad()
def reweight(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter in place so that no sublayer is negligible and no norm or bias is neutral."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(0.6 * noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * min(0.25, 1.5 / math.sqrt(_fan_in(parameter))))
        elif name.endswith("weight"):  # a norm gain: keep its neutral value (1, or 0 in Gemma) as the centre
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(0.2 * noise)


def _fan_in(weight: torch.Tensor) -> int:
    """Inputs per output unit; stacked experts [experts, out, in] count as matrices."""
    return weight.shape[-1] if weight.ndim == 3 and weight.shape[-1] > 4 else weight[0].numel()


def _finish(model: PreTrainedModel, name: str, seed: int) -> PreTrainedModel:
    """Redraw weights, put in eval mode, and let generation always run to `max_new_tokens`."""
    reweight(model, seed=zlib.crc32(f"{name}/{seed}".encode()))
    config = model.generation_config
    assert config is not None
    config.eos_token_id, config.pad_token_id, config.bos_token_id = None, PAD, BOS
    return model.float().eval()


@functools.cache
def _text_master(name: str, seed: int) -> PreTrainedModel:
    config_class, settings = TEXT_CONFIGS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _finish(transformers.AutoModelForCausalLM.from_config(config), name, seed)


@functools.cache
def _multimodal_master(name: str, seed: int) -> PreTrainedModel:
    model_class, config_class, settings = MULTIMODAL_CONFIGS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(settings))
    with torch.random.fork_rng(), _without_timm(name):
        torch.manual_seed(seed)
        return _finish(getattr(transformers, model_class)(config), name, seed)


@contextmanager
def _without_timm(name: str) -> Iterator[None]:
    """Gemma 3n sees through a timm model, which is not among the packages: its place stays empty, it only hears."""
    if name != "gemma3n":
        yield
        return
    real = transformers.AutoModel.from_config
    blind = transformers.Gemma3nVisionConfig

    def made(config: Any, **options: Any) -> nn.Module:
        return nn.Identity() if isinstance(config, blind) else real(config, **options)

    with mock.patch.object(transformers.AutoModel, "from_config", made):
        yield


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A fresh copy of the model called `name` (a key of TEXT or MULTIMODAL); `seed` draws its weights."""
    master = _text_master if name in TEXT_CONFIGS else _multimodal_master
    return copy.deepcopy(master(name, seed))


TEXT: dict[str, Builder] = {name: functools.partial(build, name) for name in TEXT_CONFIGS}
MULTIMODAL: dict[str, Builder] = {name: functools.partial(build, name) for name in MULTIMODAL_CONFIGS}
ONE_STREAM = [name for name in (*TEXT, *MULTIMODAL) if name != "gemma3n"]
"""Gemma 3n passes several residual streams from block to block: it has attention and an MLP, but no resid sites."""

# ---------------------------------------------------------------- inputs


def inputs(
    name: str,
    model: PreTrainedModel,
    batch: int = 2,
    length: int = 9,
    seed: int = 0,
    padding: Literal["left", "right"] | None = None,
) -> dict[str, torch.Tensor]:
    """Text-only inputs: `input_ids` and `attention_mask`, both int64 [batch, length].

    With `padding`, row i is shortened by 2 * i tokens (never below 2) and padded on that side.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/text/{seed}".encode()))
    ids = torch.randint(FIRST_TEXT, LAST_TEXT, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row in range(batch):
            short = min(2 * row, max(length - 2, 0))
            padded = slice(0, short) if padding == "left" else slice(length - short, length)
            ids[row, padded], mask[row, padded] = PAD, 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def multimodal_inputs(name: str, model: PreTrainedModel, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs with one clip and/or one picture per row: ids with placeholder spans, masks, and features.

    Row layout: 3 text tokens, the audio span, 2 text tokens, the image span, 3 text tokens; a span is its
    placeholders between a start and an end mark, and is left out where the model lacks the modality.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/multimodal/{seed}".encode()))
    features, audio_tokens, image_tokens = _features(name, batch, generator)
    ids = _with_spans(batch, audio_tokens, image_tokens, generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}
    if name in ("qwen2_5_vl", "qwen3_vl"):
        made["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "gemma3":
        made["token_type_ids"] = (ids == IMAGE).long()
    return {key: value.to(model.device) for key, value in made.items()}


def modalities(name: str) -> tuple[str, ...]:
    """Which modalities `multimodal_inputs(name, ...)` carries besides text, in sequence order."""
    if name in ("qwen2_5_omni", "qwen3_omni_moe"):
        return ("audio", "image")
    return ("audio",) if name in _HEARING else ("image",)


def placeholder_ids(name: str) -> Mapping[str, int]:
    """The placeholder token id of each modality in `multimodal_inputs(name, ...)`."""
    return {modality: {"audio": AUDIO, "image": IMAGE}[modality] for modality in modalities(name)}


def _with_spans(batch: int, audio: int, image: int, generator: torch.Generator) -> torch.Tensor:
    def text(length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT, LAST_TEXT, (batch, length), generator=generator)

    def span(start: int, token: int, end: int, length: int) -> torch.Tensor:
        row = [start, *[token] * length, end] if length else []
        return torch.tensor(row, dtype=torch.long).expand(batch, -1)

    sounds = span(AUDIO_START, AUDIO, AUDIO_END, audio)
    pictures = span(VISION_START, IMAGE, VISION_END, image)
    return torch.cat([text(3), sounds, text(2), pictures, text(3)], dim=1)


_FRAMES, _MELS = 40, 8
_HEARING = ("qwen2_audio", "phi4_multimodal", "voxtral", "audioflamingo3", "gemma3n")


def _features(name: str, batch: int, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int, int]:
    """Features of the towers, and how many audio and image tokens each row holds."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heard = {
        "input_features": noise(batch, _MELS, _FRAMES),
        "feature_attention_mask": torch.ones(batch, _FRAMES, dtype=torch.long),
    }
    grid = {
        "pixel_values": noise(batch * 16, 3 * 2 * 4 * 4),  # 16 patches of 3 channels, 2 frames, 4 x 4 pixels
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
    }
    sizes = torch.full((batch, 2), 8)
    made: dict[str, tuple[dict[str, torch.Tensor], int, int]] = {
        "qwen2_5_omni": ({**heard, **grid}, 10, 4),
        "qwen3_omni_moe": ({**heard, **grid}, 5, 4),
        "qwen2_audio": (heard, 10, 0),
        "qwen2_5_vl": (grid, 0, 4),
        "qwen3_vl": (grid, 0, 4),
        "llava": ({"pixel_values": noise(batch, 3, 8, 8)}, 0, 4),
        "llava_onevision": ({"pixel_values": noise(batch, 2, 3, 8, 8), "image_sizes": sizes}, 0, 10),
        "gemma3": ({"pixel_values": noise(batch, 3, 16, 16)}, 0, 4),
        "smolvlm": ({"pixel_values": noise(batch, 1, 3, 16, 16)}, 0, 4),
        "idefics3": ({"pixel_values": noise(batch, 1, 3, 16, 16)}, 0, 4),
        "minicpmv4_6": (
            {
                "pixel_values": noise(1, 3, 4, batch * 64 * 4),  # 8 x 8 patches of 4 x 4 pixels each, in a row
                "target_sizes": torch.full((batch, 2), 8),
            },
            0,
            4,
        ),
        "phi4_multimodal": (
            {
                "audio_input_features": noise(batch, _FRAMES, _MELS),
                "audio_embed_sizes": torch.full((batch,), 5),
            },
            5,
            0,
        ),
        "voxtral": ({"input_features": noise(batch, _MELS, _FRAMES)}, 5, 0),
        "audioflamingo3": (
            {
                "input_features": noise(batch, _MELS, _FRAMES),
                "input_features_mask": torch.ones(batch, _FRAMES, dtype=torch.long),
            },
            10,
            0,
        ),
        "gemma3n": (
            {
                "input_features": noise(batch, _FRAMES, _MELS),
                "input_features_mask": torch.ones(batch, _FRAMES, dtype=torch.bool),
            },
            4,
            0,
        ),
    }
    return made[name]
