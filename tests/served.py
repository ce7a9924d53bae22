"""A tiny model that can be served: random weights, a real tokenizer that makes broken UTF-8, and four steerers."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from emocircuits.models.load import Loaded
from emocircuits.serving.registry import Registry
from emocircuits.steering import Steerer, Term

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
POLICIES = ("all", "prompt", "generated", "last")
EURO = [99, 100, 101]
"""Tokens of the three bytes of one character."""


def tokenizer() -> PreTrainedTokenizerFast:
    """128 tokens: specials, printable ASCII, and single bytes of longer characters, as in byte-fallback models."""
    letters = [chr(code) for code in range(32, 127)]
    data = [0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC3, *range(0xA0, 0xAC), *range(0xB0, 0xB9)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, *(f"<0x{b:02X}>" for b in data)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def steerer(positions: str, seed: int, width: int = 32) -> Steerer:
    """A random push at two layers, large enough to change tokens."""
    vectors = 20 * torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    term = Term("resid_post", (1, 2), vectors, 0.5, positions)
    return Steerer((term,), positions, cost={"perplexity": float("nan"), "gain": 0.3})


def registry() -> Registry:
    """A steerer per positions policy, named after it."""
    return Registry({policy: steerer(policy, seed) for seed, policy in enumerate(POLICIES)})


def tiny(name: str = "llama", seed: int = 0) -> Loaded:
    """A model of the zoo with the tokenizer above."""
    model: Any = zoo.build(name, seed)
    return Loaded(model, tokenizer(), name)


def hooks(model: Any) -> int:
    """Forward hooks of any kind that the model carries."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
