"""Batched generation with a steerer per row: six emotions and an unsteered baseline can share one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from .data.prompts import encode_prompt
from .errors import InputError
from .models.anatomy import unwrap
from .steering.steerer import Steerer


@dataclass(frozen=True)
class Decoding:
    """How text is sampled; the same for every method that is compared. temperature 0 is greedy."""

    max_new_tokens: int = 30
    min_new_tokens: int = 12
    temperature: float = 0.7
    top_k: int = 40
    repetition_penalty: float = 1.1

    def kwargs(self) -> dict[str, Any]:
        """Arguments of transformers' generate(); `RowSampler` does all the rest when it samples."""
        if self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, "repetition_penalty": None}
        kept = ("max_new_tokens", "min_new_tokens", "repetition_penalty")
        return {k: v for k, v in asdict(self).items() if k in kept} | {"do_sample": False}


class RowSampler:
    """Top-k sampling as one logits processor, with one random stream per row.

    A row's text then depends on its own seed and not on its neighbours in the batch. The repetition penalty and the
    minimal length are done here too, in place and on the few tokens they concern: for 262,144 tokens, copying, sorting
    or sampling the whole vocabulary costs as much as the model.
    """

    def __init__(self, seeds: Sequence[int], decoding: Decoding, prompts: Tensor, eos: Sequence[int]) -> None:
        """prompts: attention mask [B, T] of the prompts."""
        self.decoding, self.eos = decoding, list(eos)
        self.padding = prompts.shape[1] - prompts.sum(1, keepdim=True)
        self.first_end = prompts.shape[1] + decoding.min_new_tokens
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.penalise(input_ids, scores)
        values, tokens = scores.topk(min(self.decoding.top_k, scores.shape[-1]))
        noise = torch.stack([torch.rand(values.shape[-1], generator=g) for g in self.generators]).to(values)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
        chosen = tokens.gather(-1, (values / self.decoding.temperature + gumbel).argmax(-1, keepdim=True))
        return scores.fill_(-torch.inf).scatter_(-1, chosen, 0.0)

    def penalise(self, input_ids: Tensor, scores: Tensor) -> None:
        """Repetition penalty on what a row holds already, and no end before the minimal length; in place."""
        padded = torch.arange(input_ids.shape[1], device=input_ids.device) < self.padding
        tokens = torch.where(padded, input_ids[:, -1:], input_ids)  # padding was never said
        seen, penalty = scores.gather(1, tokens), self.decoding.repetition_penalty
        scores.scatter_(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))
        if input_ids.shape[1] < self.first_end:
            scores[:, self.eos] = -torch.inf


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[dict[str, str]]],
    steerers: Steerer | Sequence[Steerer | None] | None = None,
    *,
    decoding: Decoding | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "generating",
) -> list[str]:
    """Continuations of the prompts, each row under its own steerer (None: unsteered), in the order given.

    Prompts are texts or chat messages. Row i draws from its own stream, seeded by `seed` and i. Raises
    InputError when prompts and steerers do not pair up or a prompt leaves no room in the model's context.
    """
    decoding = decoding or Decoding()
    rows = list(steerers) if isinstance(steerers, Sequence) else [steerers] * len(prompts)
    if len(rows) != len(prompts):
        raise InputError(f"{len(prompts)} prompts were given with {len(rows)} steerers; they must pair up")
    ids = [encode_prompt(tokenizer, p) for p in prompts]
    _check_room(model, ids, decoding.max_new_tokens)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    texts = [""] * len(ids)
    task = progress.add_task(title, total=len(ids)) if progress else None
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        seeds = [seed * 1_000_003 + i for i in index]
        found = _generate_batch(model, tokenizer, [ids[i] for i in index], [rows[i] for i in index], decoding, seeds)
        for i, text in zip(index, found):
            texts[i] = text
        if progress is not None and task is not None:
            progress.advance(task, len(index))
    return texts


def _check_room(model: Any, ids: Sequence[Sequence[int]], new_tokens: int) -> None:
    limit = context_length(model)
    for row, tokens in enumerate(ids):
        if not tokens:
            raise InputError(f"prompt {row} is empty; give at least one word")
        if limit and len(tokens) + new_tokens > limit:
            raise InputError(
                f"prompt {row} has {len(tokens)} tokens; with {new_tokens} new ones it exceeds the context of {limit}"
            )


def context_length(model: Any) -> int | None:
    """The most tokens the model takes; None where its config sets no limit."""
    config = getattr(unwrap(model).config, "get_text_config", lambda: None)()
    return getattr(config, "max_position_embeddings", None)


@torch.no_grad()
def _generate_batch(
    model: Any,
    tokenizer: Any,
    ids: list[list[int]],
    rows: list[Steerer | None],
    decoding: Decoding,
    seeds: list[int],
    streamer: Any = None,
) -> list[str]:
    module: Any = unwrap(model)
    device = next(module.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, ids))
    tokens = torch.tensor([[pad] * (width - len(r)) + r for r in ids], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids], device=device)
    steerer = _one_steerer(rows)
    sampler = [RowSampler(seeds, decoding, mask, end_tokens(module))] if decoding.temperature else []
    with steerer.attach(model) if steerer else nullcontext():
        out = module.generate(
            input_ids=tokens, attention_mask=mask, pad_token_id=pad, logits_processor=sampler, streamer=streamer,
            **decoding.kwargs(),
        )  # fmt: skip
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def end_tokens(module: Any) -> list[int]:
    """Token ids that end a text."""
    ends = module.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _one_steerer(rows: list[Steerer | None]) -> Steerer | None:
    """The batch's steerer: none, the common one (which may compile to a bias), or one with a vector per row."""
    if all(r is None for r in rows):
        return None
    if all(r is rows[0] for r in rows):
        return rows[0]
    return Steerer.rows(rows)
