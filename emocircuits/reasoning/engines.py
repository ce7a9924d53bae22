"""Continuations sampled from prefixes: what engines are asked and answer, and the engine that runs a model here.

A rollout is a function of (seed, boundary, index) alone: it owns a random stream, and neither its neighbours in a batch
nor the order of the work nor an interruption change it (beyond float noise in the model itself).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.prompts import encode_prompt
from ..errors import InputError
from ..generation import context_length, end_tokens
from ..models.fingerprint import fingerprint
from ..serving.batch import Batch, Decoder
from ..serving.text import TextStream
from ..steering.steerer import Steerer
from .prefixes import Prefixes, Read

Finished = Callable[[str], bool]
WIDE = 1024
"""Tokens among which the nucleus is looked for first; sorting a whole vocabulary costs more than a small model."""
BEFORE = 8
"""Tokens of the prefix that a continuation is decoded next to."""


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn: temperature 0 is greedy; top_k None keeps all tokens; stop strings are left out."""

    max_new_tokens: int
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError for values that define no distribution."""
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, fine, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for all tokens"),
            ("seed", self.seed >= 0, "0 or more"),
            ("stop", all(self.stop), "a tuple of texts, none of them empty"),
        ):
            if not fine:
                raise InputError(f"{name} must be {rule}, not {getattr(self, name)!r}")

    def stream(self, boundary: int, index: int) -> np.random.Generator:
        """The random stream of one rollout."""
        return np.random.default_rng((self.seed, boundary, index))


@dataclass(frozen=True)
class Job:
    """One continuation to sample from a prefix; (boundary, index) names it and its random stream."""

    prefix: str
    boundary: int
    index: int


@dataclass(frozen=True)
class Completion:
    """A continuation: finish is "answer" (`finished` said so), "stop", "length" or "error", then with its reason."""

    boundary: int
    index: int
    text: str
    finish: str
    n_tokens: int = 0
    reason: str = ""


class Engine(Protocol):
    """Anything that samples continuations."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes its rollouts its own: the model, as plain JSON values."""
        ...

    @property
    def computed_tokens(self) -> int | None:
        """Tokens that passed through the model so far, prefixes included; None where that is not known."""
        ...

    def complete(
        self, jobs: Sequence[Job], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[Completion]:
        """Every job's continuation, as they finish; `finished` is asked about the text so far and may end it."""
        ...


def draw(logits: Tensor, uniforms: Sequence[float], sampling: Sampling) -> list[int]:
    """A token per row of logits [B, vocabulary] for uniform numbers [B] in [0, 1): the inverse of the row's own CDF.

    Of the top_k most likely tokens, the fewest that hold top_p of their mass are kept (Holtzman et al. 2020, arXiv
    1904.09751), in the order of their ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    chances, tokens = _nucleus(logits.float() / sampling.temperature, sampling.top_p, sampling.top_k)
    cumulative = chances.cumsum(-1)
    total, wanted = cumulative[:, -1:].contiguous(), torch.tensor(uniforms, dtype=torch.float64)[:, None]
    place = torch.searchsorted(cumulative, wanted * total, right=True)
    last = torch.searchsorted(cumulative, total)  # of those kept, should rounding lead beyond it
    return tokens.gather(-1, place.minimum(last))[:, 0].tolist()


def _nucleus(scaled: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Chances (float64, not normalised, 0 for what is cut off) and ids of tokens [B, n] by ascending id, on the CPU.

    By id and not by rank: two tokens that are as good as equally likely must not change places with float noise.
    """
    size = scaled.shape[-1]
    most = min(top_k or size, size)
    if most == size and top_p >= 1:
        return scaled.softmax(-1).cpu().double(), torch.arange(size).expand(len(scaled), -1)
    values, tokens = scaled.topk(min(most, WIDE))
    total = (scaled if most == size else scaled.topk(most).values).logsumexp(-1, keepdim=True)
    if values.shape[-1] < most and bool(((values - total).exp().sum(-1) < top_p).any()):
        values, tokens = scaled.topk(most)
    chances = (values - total).exp().cpu().double()
    kept = chances * (chances.cumsum(-1) - chances < top_p)  # the first token always
    tokens, order = tokens[:, : int((kept > 0).sum(-1).max())].cpu().sort(-1)
    return kept.gather(-1, order), tokens


@dataclass(eq=False)
class _Row:
    """A continuation in the making."""

    job: Job
    ids: list[int]
    stream: np.random.Generator
    pieces: TextStream
    text: str = ""
    token: int = 0
    count: int = 0
    steerer: Steerer | None = None

    def push(self, token: int, ends: set[int], sampling: Sampling, finished: Finished | None) -> str:
        """Take one more token; why the continuation ends with it, or ""."""
        self.token, self.count = token, self.count + 1
        if token in ends:
            self.text += self.pieces.flush()
            return "stop"
        said = self.pieces.push(token)
        self.text += said
        if self.pieces.stopped:
            return "stop"
        if said and finished is not None and finished(self.text):
            return "answer"
        if self.count < sampling.max_new_tokens:
            return ""
        self.text += self.pieces.flush()
        return "stop" if self.pieces.stopped else "length"

    def completion(self, finish: str, reason: str = "") -> Completion:
        return Completion(self.job.boundary, self.job.index, self.text, finish, self.count, reason)


class LocalEngine:
    """Rollouts by a transformers model in this process, up to `batch_size` at a time.

    A prefix is read once for all its rollouts, and continues the prefix read before it (`Prefixes`). Rows that end
    leave the batch between two tokens, and the next jobs, also of the next prefix, take their places; a model with
    recurrent layers works prefix by prefix. The model carries no hooks; whatever is attached to it acts as usual.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16, name: str = "") -> None:
        """name: tells apart what one model says under different interventions, so that a store does not mix them.

        Raises InputError for a batch_size below 1, a model in training mode or one that is no decoder.
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        decoder = Decoder(model)
        if decoder.module.training:
            raise InputError("the model is in training mode, where dropout adds its own noise; call model.eval() first")
        self.model, self.tokenizer, self.batch_size, self.name = model, tokenizer, batch_size, name
        self._decoder, self._prefixes = decoder, Prefixes(decoder)
        self._ends, self._decoded = set(end_tokens(decoder.module)), 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model by its architecture and weights, wherever it was loaded from, and `name`."""
        known = fingerprint(self._decoder.module)
        return {"name": self.name, **{k: known[k] for k in ("architecture", "n_params", "weights_sha256")}}

    @property
    def computed_tokens(self) -> int:
        """Tokens that passed through the model: new tokens of prefixes, and one per row and step."""
        return self._prefixes.computed + self._decoded

    @torch.no_grad()
    def complete(
        self, jobs: Sequence[Job], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[Completion]:
        """Every job's continuation, as they finish. Raises InputError where a prefix leaves no room in the context."""
        groups: dict[str, deque[Job]] = {}
        for job in jobs:
            groups.setdefault(job.prefix, deque()).append(job)
        prompts = {prefix: self._encoded(prefix, sampling.max_new_tokens) for prefix in groups}
        batch = Batch(self.model, self.tokenizer.pad_token_id or 0)
        prefix, read = "", None
        try:
            while groups or batch.rows:
                room = self.batch_size - len(batch.rows)
                if groups and room and batch.can_join:
                    if read is None or prefix not in groups:
                        prefix = next(iter(groups))
                        read = self._prefixes.read(prompts[prefix])
                    group = groups[prefix]
                    rows = [self._row(group.popleft(), read, sampling) for _ in range(min(room, len(group)))]
                    if not group:
                        del groups[prefix]
                    logits = self._join(batch, rows, read)
                else:
                    rows = list(batch.rows)
                    logits = batch.step()
                    self._decoded += len(rows)
                ended = list(self._advance(rows, logits, sampling, finished))
                gone = {id(row) for row, _ in ended}
                batch.keep([row for row in batch.rows if id(row) not in gone])
                yield from (completion for _, completion in ended)
        finally:
            batch.clear()

    @torch.no_grad()
    def likelihoods(self, text: str, labels: Sequence[str], *, keep: bool = False) -> dict[str, float]:
        """Chances of the labels as what follows a text, each by its tokens' likelihood and summing to 1.

        Labels are read where they stand, right after the text, also when the tokenizer merges them with its end.
        With `keep`, a later text may continue this one. Raises InputError where the model's logits are NaN or there is
        no room in its context.
        """
        rows = [self._encoded(text + label) for label in labels]
        shared = min(_common(rows), min(map(len, rows)) - 1)
        if shared < 1:
            raise InputError("labels can be scored after a text of at least one token only; give it some more context")
        tails = [row[shared:] for row in rows]
        read = self._prefixes.read(rows[0][:shared], keep=keep)
        cache, logits = None, read.logits.expand(len(rows), -1)
        total = torch.zeros(len(rows), dtype=torch.float64)
        for place in range(max(map(len, tails))):
            tokens = torch.tensor([[tail[min(place, len(tail) - 1)]] for tail in tails], device=logits.device)
            gained = logits.float().log_softmax(-1).gather(-1, tokens)[:, 0].cpu().double()
            total += torch.where(torch.tensor([place < len(tail) for tail in tails]), gained, 0.0)
            if any(place + 1 < len(tail) for tail in tails):
                cache = self._prefixes.rows(read, len(rows)) if cache is None else cache
                seen = torch.ones(len(rows), shared + place + 1, dtype=torch.long, device=logits.device)
                logits, cache = self._decoder(tokens, seen, cache)
                self._decoded += len(rows)
        if total.isnan().any():
            raise InputError("the model's logits are NaN; load it in float32 or bfloat16")
        return dict(zip(labels, total.softmax(0).tolist()))

    def _encoded(self, text: str, new_tokens: int = 0) -> list[int]:
        ids, limit = encode_prompt(self.tokenizer, text), context_length(self.model)
        if not ids:
            raise InputError("a prefix is empty; give the trace a prompt of at least one word")
        if limit and len(ids) + new_tokens > limit:
            raise InputError(
                f"a prefix has {len(ids)} tokens; with max_new_tokens={new_tokens} it exceeds the model's context of"
                f" {limit}; lower max_new_tokens or shorten the trace"
            )
        return ids

    def _row(self, job: Job, read: Read, sampling: Sampling) -> _Row:
        pieces = TextStream(self._decode, sampling.stop, before=read.ids[-BEFORE:])
        return _Row(job, list(read.ids), sampling.stream(job.boundary, job.index), pieces)

    def _join(self, batch: Batch, rows: list[_Row], read: Read) -> Tensor:
        seen = torch.ones(len(rows), len(read.ids), dtype=torch.long, device=self._decoder.device)
        batch.admit(rows, self._prefixes.rows(read, len(rows)), seen)
        return read.logits.expand(len(rows), -1)

    def _advance(
        self, rows: Sequence[_Row], logits: Tensor, sampling: Sampling, finished: Finished | None
    ) -> Iterator[tuple[_Row, Completion]]:
        """Give every row its next token; those that end with it, and their completions."""
        broken = logits.isnan().any(-1).tolist()
        logits = logits.nan_to_num() if any(broken) else logits
        tokens = draw(logits, [row.stream.random() for row in rows], sampling)
        for row, token, nan in zip(rows, tokens, broken):
            if nan:
                yield row, row.completion("error", "the model's logits are NaN")
            elif finish := row.push(token, self._ends, sampling, finished):
                yield row, row.completion(finish)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest beginning that all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))
