"""Batched generation with a steerer per row: six emotions and an unsteered baseline can share one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress

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
        """Arguments of transformers' generate()."""
        given = asdict(self)
        if self.temperature == 0:
            return {k: given[k] for k in ("max_new_tokens", "min_new_tokens", "repetition_penalty")} | {"do_sample": False}
        # top_p stays off: it sorts the whole vocabulary at every step
        return given | {"do_sample": True, "top_p": 1.0}


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

    Prompts are texts or chat messages. The result depends on `seed` and `batch_size`, not on other calls. Raises
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
        found = _generate_batch(model, tokenizer, [ids[i] for i in index], [rows[i] for i in index], decoding, seed + start)
        for i, text in zip(index, found):
            texts[i] = text
        if progress is not None and task is not None:
            progress.advance(task, len(index))
    return texts


def _check_room(model: Any, ids: Sequence[Sequence[int]], new_tokens: int) -> None:
    config = getattr(unwrap(model).config, "get_text_config", lambda: None)()
    limit = getattr(config, "max_position_embeddings", None)
    for row, tokens in enumerate(ids):
        if not tokens:
            raise InputError(f"prompt {row} is empty; give at least one word")
        if limit and len(tokens) + new_tokens > limit:
            raise InputError(
                f"prompt {row} has {len(tokens)} tokens; with {new_tokens} new ones it exceeds the context of {limit}"
            )


@torch.no_grad()
def _generate_batch(
    model: Any, tokenizer: Any, ids: list[list[int]], rows: list[Steerer | None], decoding: Decoding, seed: int
) -> list[str]:
    module = unwrap(model)
    device = next(module.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, ids))
    tokens = torch.tensor([[pad] * (width - len(r)) + r for r in ids], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids], device=device)
    steerer = _one_steerer(rows)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with steerer.attach(model) if steerer else nullcontext():
            out = module.generate(input_ids=tokens, attention_mask=mask, pad_token_id=pad, **decoding.kwargs())
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def _one_steerer(rows: list[Steerer | None]) -> Steerer | None:
    """The batch's steerer: none, the common one (which may compile to a bias), or one with a vector per row."""
    if all(r is None for r in rows):
        return None
    if all(r is rows[0] for r in rows):
        return rows[0]
    return Steerer.rows(rows)
