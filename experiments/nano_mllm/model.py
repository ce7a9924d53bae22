"""The model (Qwen2.5-Omni's thinker, small), its tokenizer, its feature extractors, and how clips become its inputs.

Features come from the model's own extractors: WhisperFeatureExtractor, and the PIL backend of Qwen2VLImageProcessor,
which needs no torchvision. Qwen2_5OmniProcessor itself cannot be built without torchvision (its video processor needs
it), so `collate` expands the placeholders as that processor does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clips import EMOTIONS, RATE, SIDE
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

CHECKPOINT = Path(__file__).parent / "checkpoint"
MELS, FRAMES, PATCH, MERGE = 32, 100, 4, 2
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>",
)  # fmt: skip
QUESTIONS = {
    "person": "what does the person feel ?",
    "voice": "how does the voice sound ?",
    "face": "how does the face look ?",
}
_WORDS = ("user", "assistant", "what", "how", "does", "the", "person", "voice", "face", "feel", "sound", "look", "?")


@dataclass(frozen=True)
class Item:
    """One prompt. sound: log-mel [MELS, FRAMES] with its length in frames; picture: patches [64, 96]; None: absent."""

    question: str
    sound: tuple[Tensor, int] | None = None
    picture: Tensor | None = None
    audio_first: bool = True


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of Qwen2.5-Omni, built without a download."""
    words = [*SPECIAL, *_WORDS, *EMOTIONS, "<unk>"]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL), padding_side="left",
    )  # fmt: skip


@cache
def vocabulary() -> dict[str, int]:
    """{word: token id}."""
    return dict(tokenizer().get_vocab())


def label_ids() -> list[int]:
    """Token ids of the answer words, in the order of EMOTIONS."""
    return [vocabulary()[e] for e in EMOTIONS]


def config() -> Qwen2_5OmniThinkerConfig:
    """Four decoder layers of width 96, a vision and an audio tower of two layers each."""
    ids = vocabulary()
    text = {
        "vocab_size": len(ids), "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "window_size": SIDE, "fullatt_block_indexes": [1], "out_hidden_size": 96,
        "initializer_range": 0.05,
    }  # fmt: skip
    audio = {
        "num_mel_bins": MELS, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 160,
        "max_source_positions": FRAMES // 2, "n_window": FRAMES // 2, "output_dim": 96,
        "initializer_range": 0.05,
    }  # fmt: skip
    marks = {
        "audio_token_index": "<|AUDIO|>", "image_token_index": "<|IMAGE|>", "video_token_index": "<|VIDEO|>",
        "audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>",
        "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>", "user_token_id": "user",
    }  # fmt: skip
    numbers: dict[str, Any] = {key: ids[token] for key, token in marks.items()}
    return Qwen2_5OmniThinkerConfig(text_config=text, vision_config=vision, audio_config=audio, **numbers)


def build(seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The model with fresh weights."""
    torch.manual_seed(seed)
    return Qwen2_5OmniThinkerForConditionalGeneration(config())


def load(folder: str | Path = CHECKPOINT) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A trained model in fp32 and eval mode."""
    made = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return made.eval()


def sounds(waves: Sequence[NDArray[np.float32]]) -> list[tuple[Tensor, int]]:
    """Log-mel features [MELS, FRAMES] and length in frames of each waveform; the same whatever is beside it."""
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, sampling_rate=RATE)
    made = extractor(list(waves), sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    return list(zip(made["input_features"], made["attention_mask"].sum(-1).tolist()))


def pictures(faces: Sequence[NDArray[np.uint8]]) -> list[Tensor]:
    """Patches [64, 3 channels x 2 frames x PATCH x PATCH] of each picture [SIDE, SIDE, 3]."""
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    patches = processor(list(faces), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return list(patches.split((SIDE // PATCH) ** 2))


def audio_tokens(frames: int) -> int:
    """How many tokens the audio tower makes of so many frames."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def prompt(item: Item) -> str:
    """The text of a prompt, placeholders expanded."""
    audio, image = "", ""
    if item.sound is not None:
        audio = "<|audio_bos|> " + "<|AUDIO|> " * audio_tokens(item.sound[1]) + "<|audio_eos|> "
    if item.picture is not None:
        image = "<|vision_bos|> " + "<|IMAGE|> " * IMAGE_TOKENS + "<|vision_eos|> "
    media = audio + image if item.audio_first else image + audio
    return f"<|im_start|> user {media}{QUESTIONS[item.question]} <|im_end|> <|im_start|> assistant"


def collate(items: Sequence[Item], answers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Inputs of the model for a batch, left-padded; with answers, these are appended and `labels` marks them alone."""
    ids = vocabulary()
    ends = [[]] * len(items) if answers is None else [[ids[a], ids["<|im_end|>"]] for a in answers]
    rows = [[ids[w] for w in prompt(i).split()] + end for i, end in zip(items, ends)]
    width, pad = max(map(len, rows)), ids["<|endoftext|>"]
    made: dict[str, Any] = {
        "input_ids": torch.tensor([[pad] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }
    if answers is not None:
        made["labels"] = made["input_ids"].clone()
        made["labels"][:, :-2] = -100
    if heard := [i.sound for i in items if i.sound is not None]:
        lengths = torch.tensor([n for _, n in heard])
        made["input_features"] = torch.stack([x for x, _ in heard])
        made["feature_attention_mask"] = (torch.arange(FRAMES) < lengths[:, None]).long()
    if seen := [i.picture for i in items if i.picture is not None]:
        made["pixel_values"] = torch.cat(seen)
        made["image_grid_thw"] = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * len(seen))
    return made


@torch.no_grad()
def label_probabilities(
    model: Any,
    items: Sequence[Item],
    batch: int = 64,
    around: Callable[[dict[str, Tensor]], AbstractContextManager[Any]] | None = None,
    processor: Callable[[dict[str, Tensor]], LogitsProcessor] | None = None,
) -> NDArray[np.float64]:
    """[n, 6] probability of each answer word among EMOTIONS as the next token, from one forward pass each.

    around, processor: made from a batch's inputs, a context in which that batch runs, and what changes its logits.
    """
    found = []
    for start in range(0, len(items), batch):
        inputs = collate(items[start : start + batch])
        with around(inputs) if around is not None else nullcontext():
            logits = model(**inputs, use_cache=False).logits[:, -1]
        if processor is not None:
            logits = processor(inputs)(inputs["input_ids"], logits)
        found.append(logits[:, label_ids()].double().softmax(-1))
    return torch.cat(found).numpy()
