"""How likely is a text to the model, and how far does steering move it: perplexity and KL, in bounded memory.

The LM head runs only on the positions that are scored and in chunks, so logits never exceed 128 MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import HookError, InputError
from ..reading import has_cache, pad, prefix_cache

_CHUNK_LOGITS = 2**25  # fp32 logits held at once, whatever the vocabulary and the batch


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """Perplexity [n] of each text as the continuation of its prompt: exp of the mean NLL of its tokens.

    Pass the unsteered model, so that the number says how odd the text is to it. The prompt keeps the tokens
    it has on its own: where joining would merge a token across the boundary, the text is tokenised alone.
    With neither a prompt nor a BOS token, the first token has no context and is not scored. A text without a
    token to score is NaN. Raises InputError on unequal lengths, a model in training mode, or a text longer
    than the model can read.
    """
    check_paired("prompts", prompts, "texts", texts)
    head = _ready_head(model, batch_size)
    pairs = [_continuation(tokenizer, prompt, text) for prompt, text in zip(prompts, texts)]
    rows = [i for i, (ids, start) in enumerate(pairs) if len(ids) > start]
    _check_positions(model, [pairs[i][0] for i in rows])
    mean_nll = np.full(len(texts), np.nan)
    for batch, first, states in _scored_states(model, head, pairs, rows, batch_size):
        sequences, starts = zip(*(pairs[i] for i in batch))
        # the state at t - 1 predicts token t
        before = [
            states[r, s - 1 - f : len(ids) - 1 - f] for r, (ids, s, f) in enumerate(zip(sequences, starts, first))
        ]
        targets = [ids[start:] for ids, start in zip(sequences, starts)]
        nll = _nll(model, head, torch.cat(before), torch.tensor(sum(targets, []), device=states.device))
        for i, part in zip(batch, nll.split([len(target) for target in targets])):
            mean_nll[i] = float(part.mean())
    return np.exp(mean_nll)


def _scored_states(
    model: PreTrainedModel, head: nn.Module, pairs: list[tuple[list[int], int]], rows: list[int], batch_size: int
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """(rows, token where each row's states begin, states) of every batch; prompts that rows share run once."""
    prefixes = {i: tuple(pairs[i][0][: pairs[i][1] - 1]) for i in rows}
    shared = len(set(prefixes.values())) <= len(rows) // 2 and has_cache(model) and all(prefixes.values())
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        groups.setdefault(prefixes[i] if shared else (i,), []).append(i)
    members = list(groups.values())
    longest = [max(len(pairs[i][0]) for i in group) for group in members]
    size = max(1, 4 * batch_size * len(members) // max(1, len(rows))) if shared else batch_size
    for chosen in _batches(list(range(len(members))), longest, size, "perplexity"):
        batch = [i for g in chosen for i in members[g]]
        if not shared:
            yield batch, [0] * len(batch), _states(model, head, [pairs[i][0] for i in batch])
            continue
        own = [prefixes[members[g][0]] for g in chosen]
        owner = torch.tensor([slot for slot, g in enumerate(chosen) for _ in members[g]])
        ids, mask = pad(own, "left", 0)
        cache = prefix_cache(model, ids.to(model.device), mask.to(model.device))
        cache.batch_select_indices(owner.to(model.device))
        first = [len(prefixes[i]) for i in batch]
        tails, tail_mask = pad([pairs[i][0][f:] for i, f in zip(batch, first)], "right", 0)
        inputs = {"input_ids": tails, "attention_mask": torch.cat([mask[owner], tail_mask], dim=1)}
        yield batch, first, _head_states(model, head, inputs, past_key_values=cache, use_cache=True)


def kl_on_neutral(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    steered: Callable[[], AbstractContextManager[Any]],
    batch_size: int = 16,
) -> float:
    """Mean KL(clean || steered) of the next-token distribution over all tokens, in nats per token.

    `steered()` returns a context manager that holds the steering, such as `lambda: steerer.attach(model)`.
    NaN when no text has a token. Raises InputError as `perplexity` does.
    """
    head = _ready_head(model, batch_size)
    encoded = [_ids(tokenizer, text) if text.strip() else [] for text in texts]
    rows = [i for i, ids in enumerate(encoded) if ids]
    _check_positions(model, [encoded[i] for i in rows])
    total, tokens = 0.0, 0
    for batch in _batches(rows, [len(ids) for ids in encoded], batch_size, "KL on neutral text"):
        sequences = [encoded[i] for i in batch]
        clean = _real(_states(model, head, sequences), sequences)
        with steered():
            moved = _real(_states(model, head, sequences), sequences)
            total += _kl_sum(model, head, clean, moved)
        tokens += len(clean)
    return total / tokens if tokens else math.nan


@torch.no_grad()
def _nll(model: PreTrainedModel, head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood [n] (float64, CPU) of the targets [n] given the states [n, d]."""
    parts = []
    for chunk in _chunks(len(states), head):
        logits = _finish(model, head(states[chunk])).float()
        parts.append(nn.functional.cross_entropy(logits, targets[chunk], reduction="none").double().cpu())
    return torch.cat(parts)


@torch.no_grad()
def _kl_sum(model: PreTrainedModel, head: nn.Module, clean: Tensor, moved: Tensor) -> float:
    """Sum over rows of KL(clean || moved), in nats; to be called inside the steering context."""
    total = 0.0
    for chunk in _chunks(len(clean), head):
        # `forward` skips hooks: steering that touches the head itself belongs to one side only
        p = _finish(model, head.forward(clean[chunk])).float().log_softmax(dim=1)
        q = _finish(model, head(moved[chunk])).float().log_softmax(dim=1)
        total += float((p.exp() * (p - q)).sum(dim=1).double().sum())
    return total


@torch.no_grad()
def _states(model: PreTrainedModel, head: nn.Module, sequences: Sequence[list[int]]) -> Tensor:
    """What enters the LM head [batch, longest, d] for right-padded sequences, without their logits."""
    ids, mask = pad(sequences, "right", 0)
    return _head_states(model, head, {"input_ids": ids, "attention_mask": mask}, use_cache=False)


@torch.no_grad()
def _head_states(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Tensor], **keywords: Any) -> Tensor:
    with _head_input(head) as caught:
        output = model(**{k: v.to(model.device) for k, v in inputs.items()}, **keywords)
    if len(caught) != 1:
        raise HookError(f"the LM head ran {len(caught)} times in one forward pass, so its input is ambiguous")
    ours = _finish(model, head(caught[0][:, :1]))
    theirs = output.logits
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise HookError(f"{type(model).__name__} changes its logits after the LM head in an unknown way")
    return caught[0]


@contextmanager
def _head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Catches the input of the LM head and lets through one position per row, enough to check `_finish`."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(catch, prepend=True)
    try:
        yield caught
    finally:
        handle.remove()


def _finish(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What some architectures do after the LM head: scale (Cohere, Granite) and soft cap (Gemma 2)."""
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _continuation(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], int]:
    """Token ids of prompt and text, and the index of the first token to score."""
    context = _ids(tokenizer, prompt)
    whole = _ids(tokenizer, prompt + text) if text else context
    if whole[: len(context)] != context:
        whole = context + list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return whole, max(len(context), 1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the expected BOS (never twice) and without an EOS that the tokenizer appends."""
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token", "eos_token"))
    ids = list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
    if eos and eos != bos and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        ids.pop()
    return ids


def _real(states: Tensor, sequences: Sequence[list[int]]) -> Tensor:
    """The states of real tokens only, [tokens, d]."""
    return torch.cat([states[row, : len(ids)] for row, ids in enumerate(sequences)])


def _chunks(n: int, head: nn.Module) -> Iterator[slice]:
    vocabulary = int(head.get_parameter("weight").shape[0])
    size = max(1, _CHUNK_LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, n, size))


def _batches(rows: list[int], lengths: list[int], size: int, title: str) -> Iterator[list[int]]:
    """Rows in batches of similar length, longest first so that memory peaks at once."""
    ordered = sorted(rows, key=lambda i: -lengths[i])
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    yield from track(batches, description=title, transient=True, disable=len(batches) < 4)


def _ready_head(model: PreTrainedModel, batch_size: int) -> nn.Module:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give 1 or more")
    if model.training:
        raise InputError("the model is in training mode, where dropout makes scores random; call model.eval() first")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise InputError(f"{type(model).__name__} has no LM head; pass a causal language model")
    return head


def _check_positions(model: PreTrainedModel, sequences: Sequence[list[int]]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, sequences), default=0)
    if limit is not None and longest > limit:
        raise InputError(
            f"a text has {longest} tokens with its prompt, but the model reads at most {limit}; shorten it"
        )


def check_paired(a_name: str, a: Sequence[str], b_name: str, b: Sequence[str]) -> None:
    """Raises InputError unless both are lists of texts of one length."""
    if isinstance(a, str) or isinstance(b, str):
        raise InputError(f"{a_name} and {b_name} must be lists of texts, not one text")
    if len(a) != len(b):
        raise InputError(f"{len(a)} {a_name} but {len(b)} {b_name}; give one for each")
