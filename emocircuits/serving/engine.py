"""The engine: a bounded queue, one worker thread that owns the model, and rows that join and leave a running batch."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.prompts import PLAIN_CHAT_STOP, encode_prompt, plain_chat
from ..errors import EmocircuitsError, InputError
from ..generation import context_length, end_tokens
from ..models.load import Loaded
from ..steering.steerer import Steerer
from .batch import Batch
from .metrics import Metrics
from .registry import Registry, Wish
from .sampling import Sampler
from .text import TextStream

log = logging.getLogger(__name__)
FAILED = "generation failed; the server's log says why"


class QueueFullError(EmocircuitsError):
    """As many requests wait as the server allows; try again later."""


class StoppedError(EmocircuitsError):
    """The engine was closed and takes no more requests."""


@dataclass(frozen=True)
class Limits:
    """max_batch rows at once, max_queue requests waiting, max_tokens generated per request."""

    max_batch: int = 16
    max_queue: int = 64
    max_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Request:
    """One checked request; make it with `Engine.request`."""

    ids: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    steering: Wish = ()


@dataclass(frozen=True)
class Piece:
    """Some more of the text."""

    text: str


@dataclass(frozen=True)
class Done:
    """The text is complete: finish_reason is "stop" or "length"."""

    finish_reason: str
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """No more text will come."""

    message: str
    status: int = 500


Event = Piece | Done | Failed


@dataclass(frozen=True)
class Answer:
    """A whole text, as `Engine.run` returns it."""

    text: str
    finish_reason: str
    completion_tokens: int


@dataclass(eq=False)
class Job:
    """A submitted request; its events are given to `on_event` by the worker thread."""

    request: Request
    on_event: Callable[[Event], None]
    steerer: Steerer | None
    text: TextStream
    sampler: Sampler
    cancelled: bool = False
    token: int = 0
    count: int = 0
    """Tokens generated so far."""
    at_limit: bool = False
    """Whether the text ended only because it is as long as it may be."""
    started: float = field(default_factory=time.monotonic)

    @property
    def ids(self) -> list[int]:
        return self.request.ids


class Engine:
    """Generates for many requests at once; a request's text does not depend on its neighbours.

    Requests join the running batch between two tokens and leave it when they end. Whatever fails fails the requests
    it concerns; the worker goes on, and the model carries no hook while nothing is steered.
    """

    def __init__(self, loaded: Loaded, registry: Registry | None = None, limits: Limits | None = None) -> None:
        """Raises ArtefactError when a steerer does not fit the model, InputError for a model that cannot be served."""
        self.tokenizer, self.registry, self.limits = loaded.tokenizer, registry or Registry(), limits or Limits()
        self.registry.check(loaded.model)
        self.metrics = Metrics()
        self.batch = Batch(loaded.model, self.tokenizer.pad_token_id or 0)
        self.context = context_length(loaded.model)
        self.vocabulary = int(self.batch.module.get_input_embeddings().num_embeddings)
        self._ends = set(end_tokens(self.batch.module))
        self._tokenizer_lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="emocircuits-engine", daemon=True)
        self._worker.start()

    # ---------------------------------------------------------------- for clients, from any thread

    def request(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        steering: Mapping[str, float] | None = None,
    ) -> Request:
        """A checked request from a text, token ids or chat messages; a chat without a template is rendered plainly.

        Without `max_tokens` it is as long as the limits allow. Raises InputError for what cannot be answered.
        """
        wish = self.registry.wish(steering or {})
        ids, stop = self._encode(prompt, tuple(stop))
        if not ids:
            raise InputError("the prompt is empty; give at least one word")
        if max_tokens is not None and max_tokens > self.limits.max_tokens:
            raise InputError(f"max_tokens {max_tokens} is beyond this server's limit of {self.limits.max_tokens}")
        room = self.context - len(ids) if self.context else self.limits.max_tokens
        if room < (max_tokens or 1):
            raise InputError(
                f"the prompt has {len(ids)} tokens; with {max_tokens or 1} new ones it exceeds the context of"
                f" {self.context}"
            )
        return Request(
            ids,
            max_tokens or min(room, self.limits.max_tokens),
            temperature,
            top_p,
            secrets.randbits(63) if seed is None else seed,
            stop,
            wish,
        )

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Job:
        """Queue a request. Raises QueueFullError, or StoppedError after `close`."""
        job = Job(
            request,
            on_event,
            self.registry.combined(request.steering),
            TextStream(self._decode, request.stop),
            Sampler(request.temperature, request.top_p, request.seed),
        )
        with self._wake:
            if self._closed:
                raise StoppedError("this server is shutting down")
            if len(self._waiting) >= self.limits.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(job)
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Drop a request: at once where it waits, before the next token where it runs; nothing once it has ended."""
        with self._wake:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.outcome("cancelled")

    def run(self, request: Request) -> Answer:
        """Submit and wait for the whole text. Raises EmocircuitsError when generation failed."""
        done, events = threading.Event(), list[Event]()

        def collect(event: Event) -> None:
            events.append(event)
            if not isinstance(event, Piece):
                done.set()

        self.submit(request, collect)
        done.wait()
        last = events.pop()
        if isinstance(last, Failed):
            raise EmocircuitsError(last.message)
        assert isinstance(last, Done)
        text = "".join(e.text for e in events if isinstance(e, Piece))
        return Answer(text, last.finish_reason, last.completion_tokens)

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    @property
    def batch_size(self) -> int:
        return len(self.batch.rows)

    def close(self) -> None:
        """Stop the worker; requests that are not finished fail. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._worker.join()

    def _encode(self, prompt: Any, stop: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
        if isinstance(prompt, str):
            with self._tokenizer_lock:
                return encode_prompt(self.tokenizer, prompt), stop
        if not prompt or isinstance(prompt[0], int):
            if not all(0 <= token < self.vocabulary for token in prompt):
                raise InputError(f"token ids must be between 0 and {self.vocabulary - 1}")
            return list(prompt), stop
        if not getattr(self.tokenizer, "chat_template", None):
            return self._encode(plain_chat(prompt), (*stop, PLAIN_CHAT_STOP))
        with self._tokenizer_lock:
            try:
                return encode_prompt(self.tokenizer, prompt), stop
            except Exception as error:  # templates refuse what they do not know with errors of many kinds
                raise InputError(f"the model's chat template does not take these messages ({error})") from error

    def _decode(self, ids: list[int]) -> str:
        with self._tokenizer_lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ---------------------------------------------------------------- the worker thread

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            try:
                if not self._turn():
                    break
            except Exception:  # the engine must outlive whatever one batch does
                log.exception("a batch failed")
                self._fail(list(self.batch.rows))
        self._fail([*self.batch.rows, *self._waiting], "this server is shutting down", 503)
        self._waiting.clear()

    def _turn(self) -> bool:
        """Let requests in, or generate one token for every row; False once the engine is closed."""
        newcomers = self._take()
        if self._closed:
            self._fail(newcomers, "this server is shutting down", 503)
            return False
        self._leave([row for row in self.batch.rows if row.cancelled], "cancelled")
        if newcomers:
            self._join(newcomers)
        elif self.batch.rows:
            self._advance(self.batch.rows, self.batch.step())
        return True

    def _take(self) -> list[Job]:
        """The waiting requests for which there is room now; waits for one when nothing runs."""
        with self._wake:
            while not self.batch.rows and not self._waiting and not self._closed:
                self._wake.wait()
            room = self.limits.max_batch - len(self.batch.rows) if self.batch.can_join else 0
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _join(self, jobs: list[Job]) -> None:
        try:
            logits = self.batch.join(jobs)
        except Exception:
            log.exception("reading prompts failed")
            self._fail(jobs)
            return
        self.metrics.add_tokens("prompt", sum(len(job.ids) for job in jobs))
        self._advance(jobs, logits)

    def _advance(self, rows: Sequence[Job], logits: Tensor) -> None:
        """Give every row its next token; those that end leave the batch before they are told."""
        greedy, broken = logits.argmax(-1).tolist(), logits.isnan().any(-1).tolist()
        ended: list[Job] = []
        for i, row in enumerate(list(rows)):
            if row.cancelled:
                continue  # leaves before the next token
            if broken[i]:
                self._fail([row], "the model's logits are NaN; a smaller steering strength may help")
                continue
            try:
                row.token = greedy[i] if row.request.temperature == 0 else row.sampler(logits[i])
                if self._say(row):
                    ended.append(row)
            except Exception:
                log.exception("a token could not be chosen or decoded")
                self._fail([row])
        self._leave(ended, "ok")
        for row in ended:
            self.metrics.took(time.monotonic() - row.started)
            self._tell(row, Done("length" if row.at_limit else "stop", row.count))

    def _say(self, row: Job) -> bool:
        """Pass on the text of a row's newest token; whether the row has ended."""
        row.count += 1
        self.metrics.add_tokens("generated", 1)
        at_end = row.token in self._ends
        text = "" if at_end else row.text.push(row.token)
        row.at_limit = not at_end and row.count >= row.request.max_tokens
        over = at_end or row.text.stopped or row.at_limit
        if over:
            text += row.text.flush()
            row.at_limit = row.at_limit and not row.text.stopped
        if text:
            self._tell(row, Piece(text))
        return over

    def _leave(self, rows: Sequence[Job], outcome: str) -> None:
        if rows:
            self.batch.keep([row for row in self.batch.rows if row not in rows])
            for _ in rows:
                self.metrics.outcome(outcome)

    def _fail(self, rows: Sequence[Job], message: str = FAILED, status: int = 500) -> None:
        self._leave(rows, "error")
        for row in rows:
            self._tell(row, Failed(message, status))

    def _tell(self, row: Job, event: Event) -> None:
        try:
            row.on_event(event)
        except Exception:  # a listener that is gone, such as a closed event loop
            row.cancelled = True
