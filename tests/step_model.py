"""A tiny Llama with a byte-level tokenizer that merges punctuation with the line breaks after it, as real ones do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from zoo import reweight

TEXTS = [
    "Let me think.\n\nThe sum is 12, I believe.\n\nWait, no: é!\n\n  It is 13 🙂\n\nSo 13.",
    "First.\n\n\nSecond step here.\n \nThird",
    "One step only, with no delimiter at all",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a begin token, trained so that "." and the line breaks after it merge."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore
    inner.decoder = decoders.ByteLevel()  # type: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<p>"], initial_alphabet=alphabet)  # type: ignore
    inner.train_from_iterator(TEXTS * 3, trainer)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])  # type: ignore
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<p>")


def model() -> LlamaForCausalLM:
    """Three blocks of width 16, in which every sublayer matters."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    reweight(made)
    return made
