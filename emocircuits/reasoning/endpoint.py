"""Rollouts from a server that speaks OpenAI's /v1/completions: vLLM, SGLang, llama.cpp, or `emocircuits serve`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..errors import InputError
from ..posting import RefusedError, Server
from .engines import Completion, Finished, Job, Sampling

HOPELESS = (401, 403, 404)
"""Refusals that concern every request: the key, the address or the model's name."""


@dataclass(frozen=True)
class _Answer:
    text: str
    finish: str
    n_tokens: int


class EndpointEngine:
    """Rollouts by `model` at `base_url` (such as "http://localhost:8000/v1"), `concurrency` requests at a time.

    Texts are streamed, so that a continuation whose answer is complete is not paid for to its end. Each job has its
    own seed, but how much that fixes is the server's affair. A server with prefix caching reads a prefix once.
    `n_tokens` is the server's count; where a text was left early and the server counts at the end only, it is the
    number of streamed pieces.
    """

    computed_tokens: int | None = None
    """Unknown: what the server's cache saved is not told."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        concurrency: int = 16,
        retries: int = 5,
        backoff_s: float = 1.0,
        timeout_s: float = 300.0,
    ) -> None:
        """timeout_s: the longest silence of a connection. Raises InputError for an address that is not http."""
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, not {concurrency}")
        self.model, self.concurrency = model, concurrency
        self._server = Server("the endpoint", base_url, api_key, retries, backoff_s, timeout_s)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's name; the address does not matter."""
        return {"endpoint_model": self.model}

    def complete(
        self, jobs: Sequence[Job], sampling: Sampling, finished: Finished | None = None
    ) -> Iterator[Completion]:
        """Every job's continuation, as they finish; one that keeps failing has finish "error", and others go on.

        Raises InputError before the first job when nothing answers; and later when the server refuses all requests,
        or when so many fail one after the other that it must be gone.
        """
        if not jobs:
            return
        self._server.check()
        closed = threading.Event()
        server = replace(self._server, sleep=lambda seconds: _pause(closed, seconds))
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="rollouts")
        failures, patience = 0, max(2 * self.concurrency, 8)
        try:
            for done in as_completed([pool.submit(self._job, server, job, sampling, finished, closed) for job in jobs]):
                completion = done.result()
                yield completion
                failures = failures + 1 if completion.finish == "error" else 0
                if failures >= patience:
                    raise InputError(
                        f"{failures} rollouts failed one after the other (last: {completion.reason}); "
                        "what came before is kept, so mend the server and run this again"
                    )
        finally:
            closed.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _job(
        self, server: Server, job: Job, sampling: Sampling, finished: Finished | None, closed: threading.Event
    ) -> Completion:
        try:
            read = partial(_read, finished=finished, closed=closed)
            found = server.post("/completions", self._body(job, sampling), read)
        except InputError as error:
            if isinstance(error, RefusedError) and error.status in HOPELESS:
                raise
            return Completion(job.boundary, job.index, "", "error", reason=str(error))
        return Completion(job.boundary, job.index, found.text, found.finish, found.n_tokens)

    def _body(self, job: Job, sampling: Sampling) -> dict[str, Any]:
        seed = int(np.random.SeedSequence((sampling.seed, job.boundary, job.index)).generate_state(1)[0]) >> 1
        optional = {"top_k": sampling.top_k, "stop": list(sampling.stop)}
        return {
            "model": self.model,
            "prompt": job.prefix,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **{name: value for name, value in optional.items() if value},
        }


def _read(answer: Any, finished: Finished | None, closed: threading.Event) -> _Answer:
    """The text of a streamed (or whole) answer, up to where `finished` is content.

    Raises ConnectionError, which is retried, for a stream that breaks off or holds an error.
    """
    text, finish, pieces, usage = "", "", 0, None
    for event in _events(answer):
        if "error" in event:
            raise ConnectionError(str(event["error"])[:200])
        usage = (event.get("usage") or {}).get("completion_tokens", usage)
        for choice in event.get("choices") or ():
            said, finish = choice.get("text") or "", choice.get("finish_reason") or finish
            text, pieces = text + said, pieces + bool(said)
            if said and finished is not None and finished(text):
                return _Answer(text, "answer", pieces if usage is None else usage)
        _pause(closed, 0)
    if not finish:
        raise ConnectionError("the answer broke off")
    return _Answer(text, "length" if finish == "length" else "stop", pieces if usage is None else usage)


def _pause(closed: threading.Event, seconds: float) -> None:
    """Wait; raises InputError, which ends a job, once nobody wants its text any more."""
    if closed.wait(seconds):
        raise InputError("the rollouts were stopped")


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, or the one of an answer that was not streamed."""
    if "event-stream" not in answer.headers.get("Content-Type", ""):
        yield json.loads(answer.read())
        return
    for line in answer:
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            yield json.loads(data)
