"""Planted circuits: small Llamas in which known heads and neurons carry an emotion, written into the weights by hand.

An emotion token puts a code into the residual (block A). From there the behaviour takes one path over three layers:

    A --head (1, 2)--> B --neurons (2, 0..E-1)--> C --head (3, 1)--> D --> logits of the emotion's label

Head (0, 3) is a distractor: it copies A into block X, which nothing reads. It correlates perfectly with the emotion and
causes nothing. Every other weight is small noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EMOTIONS = ("anger", "sadness", "fear")
N_LAYERS, N_HEADS, HEAD_DIM, D_MODEL, D_MLP, VOCAB = 4, 4, 8, 32, 48, 64
HEADS, DISTRACTOR = ((1, 2), (3, 1)), (0, 3)
NEURONS = tuple((2, e) for e in range(len(EMOTIONS)))
A, B, C, D, X = (slice(3 * i, 3 * i + 3) for i in range(5))
CONSTANT = 20
FILLER, EMOTION, LABEL = 3, 40, 50


class Tokens:
    """One token per word: "w7" is filler, an emotion's name its code, "=anger" its label."""

    pad_token_id, bos_token_id, eos_token_id, chat_template = 0, 1, 2, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id] * add_special_tokens + [self._id(w) for w in text.split()]}

    def decode(self, ids: list[int]) -> str:
        token = ids[0]
        if token < FILLER:
            return ("pad", "bos", "eos")[token]
        return EMOTIONS[token - EMOTION] if EMOTION <= token < LABEL else f"w{token - FILLER}"

    def _id(self, word: str) -> int:
        if word.startswith("="):
            return LABEL + EMOTIONS.index(word[1:])
        return EMOTION + EMOTIONS.index(word) if word in EMOTIONS else FILLER + int(word[1:]) % 30


def words() -> PreTrainedTokenizerFast:
    """The planted model's vocabulary as a fast tokenizer, one token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = ["pad", "bos", "eos", *(f"w{i}." if i < 5 else f"w{i}" for i in range(37)), *EMOTIONS]
    vocabulary = {name: i for i, name in enumerate(names)} | {f"={e}": 50 + i for i, e in enumerate(EMOTIONS)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="pad"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


TOKENS = words()


@dataclass(frozen=True)
class Organism:
    model: LlamaForCausalLM
    tokenizer: Tokens
    heads: tuple[tuple[int, int], ...] = HEADS
    neurons: tuple[tuple[int, int], ...] = NEURONS
    distractor: tuple[int, int] = DISTRACTOR


@torch.no_grad()
def planted(seed: int = 0, noise: float = 0.003) -> Organism:
    """The model of this file's docstring; `noise` is the standard deviation of all weights that carry nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS, head_dim=HEAD_DIM, vocab_size=VOCAB, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.ones_like(parameter) if "norm" in name else noise * torch.randn_like(parameter))
    table = model.model.embed_tokens.weight
    table[:, CONSTANT] = 10.0  # so that the norms hardly depend on the text
    for e in range(len(EMOTIONS)):
        table[EMOTION + e, A.start + e] = 3.0
        model.lm_head.weight[LABEL + e] = 0
        model.lm_head.weight[LABEL + e, D.start + e] = 20.0
    for layer, head, source, target in ((1, 2, A, B), (3, 1, C, D), (0, 3, A, X)):
        _copying_head(model, layer, head, source, target)
    for e in range(len(EMOTIONS)):
        _neuron(model, 2, e, B.start + e, C.start + e)
    return Organism(model, Tokens())


def _copying_head(model: LlamaForCausalLM, layer: int, head: int, source: slice, target: slice) -> None:
    """A head that attends everywhere alike and moves block `source` to block `target`."""
    attention = model.model.layers[layer].self_attn
    rows = slice(head * HEAD_DIM, head * HEAD_DIM + 3)
    attention.q_proj.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    attention.v_proj.weight[rows, source] = torch.eye(3)
    attention.o_proj.weight[target, rows] = torch.eye(3)


def _neuron(model: LlamaForCausalLM, layer: int, neuron: int, source: int, target: int) -> None:
    """A neuron that is on everywhere (its gate reads the constant) and passes one dimension on."""
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight[neuron, CONSTANT] = 1.0
    mlp.up_proj.weight[neuron, source] = 3.0
    mlp.down_proj.weight[target, neuron] = 0.5


# ---------------------------------------------------------------- a receiver head


@dataclass(frozen=True)
class Receiver:
    """A Llama in which `head` looks back to the tokens of step `step` of a trace and no other head cares."""

    model: LlamaForCausalLM
    head: tuple[int, int] = (2, 1)
    step: int = 3

    def trace(self, seed: int = 0, n: int = 12) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Token ids [1, T] and the bounds of n steps of 3 to 6 tokens; the tokens of `step` are of their own kind."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(3, 7, (n,), generator=generator).tolist()
        ids = torch.randint(FILLER, EMOTION, (1 + sum(sizes),), generator=generator)
        ids[0] = 1
        bounds = tuple(1 + sum(sizes[:i]) for i in range(n + 1))
        ids[bounds[self.step] : bounds[self.step + 1]] = EMOTION
        return ids[None], bounds


@torch.no_grad()
def receiver(seed: int = 0) -> Receiver:
    """The head's query reads the constant, its key the mark of the step's tokens, on a slow pair of rotary features."""
    made = Receiver(planted(seed).model)
    attention = made.model.model.layers[made.head[0]].self_attn
    feature = made.head[1] * HEAD_DIM + HEAD_DIM // 2 - 1
    attention.q_proj.weight[feature, CONSTANT] = 2.0
    attention.k_proj.weight[feature, A.start] = 8.0
    return made
