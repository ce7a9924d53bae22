"""Models, token ids and directions that the cases run on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from emocircuits.activations import capture
from emocircuits.data.prompts import encode_prompt
from emocircuits.data.scenarios import discovery
from emocircuits.models.anatomy import resolve
from emocircuits.models.fingerprint import fingerprint
from emocircuits.models.load import Loaded, load
from emocircuits.steering import Steerer, Term

STRENGTH = 0.2
"""Steering strength in units of the mean residual norm: enough to change tokens, so that agreement means something."""


@cache
def demo() -> Loaded:
    """The demo model, made to generate exactly as many tokens as it is asked for."""
    loaded = load("demo")
    return Loaded(_endless(loaded.model), loaded.tokenizer, loaded.name)


@cache
def llama() -> Any:
    """A random model of Llama's shape; its pre-norm blocks let a constant push become a bias."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=640, num_hidden_layers=18, num_attention_heads=10, intermediate_size=1728, vocab_size=32_000
    )
    return _endless(LlamaForCausalLM(config).eval())


def _endless(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text_ids(batch: int, length: int) -> Tensor:
    """[batch, length] tokens of real text: every row starts another scenario, and no row is padded."""
    tokenizer = demo().tokenizer
    texts = [group.text for group in discovery().groups()]
    step = len(texts) // batch
    rows = [encode_prompt(tokenizer, " ".join(texts[i * step : i * step + 8])) for i in range(batch)]
    return torch.tensor([row[:length] for row in rows])


def random_ids(batch: int, length: int, vocabulary: int) -> Tensor:
    """[batch, length] random tokens, for the model whose weights are random too."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def steerer(model: Any, ids: Tensor, layers: tuple[int, ...], seed: int = 0) -> Steerer:
    """A random direction at the residual stream of `layers`, scaled to each layer's mean norm on `ids`."""
    norms = capture(model, ids, "resid_post", layers).stack("resid_post").norm(dim=-1).mean(-1)
    width = resolve(model).d_model
    directions = torch.randn(len(layers), width, generator=torch.Generator().manual_seed(seed))
    vectors = torch.nn.functional.normalize(directions, dim=-1) * norms[:, None]
    term = Term("resid_post", layers, vectors, STRENGTH / len(layers))
    return Steerer((term,), name=f"random {seed}", fingerprint=fingerprint(model))
