"""The HTTP side: OpenAI's endpoints over an engine, with the limits that an open port needs."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from .. import __version__
from ..errors import InputError
from .engine import Done, Engine, Event, Failed, Job, Piece, QueueFullError, StoppedError
from .protocol import ChatRequest, CompletionRequest, Replies, error_body, sentence

BODY_SECONDS = 30.0
"""How long a client may take to send its request."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's format."""

    def __init__(self, message: str, status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


def create_app(
    engine: Engine | None = None,
    *,
    model_name: str = "model",
    api_key: str | None = None,
    max_body_bytes: int = 1 << 20,
    hosts: Iterable[str] | None = None,
) -> FastAPI:
    """The application. Without an engine it answers "loading" until one is put at `app.state.engine`.

    hosts: names by which a browser may reach it (None: any); guards a loopback server against DNS rebinding.
    """
    app = FastAPI(title="emocircuits", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _server_error)
    guarded = [Depends(_key_check(api_key))]

    @app.get("/health")
    async def health() -> Response:
        ready = app.state.engine is not None
        status = {"status": "ready" if ready else "loading", "model": model_name, "version": __version__}
        return JSONResponse(status, 200 if ready else 503)

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        running = _engine(app)
        return PlainTextResponse(running.metrics.text(running.queue_length, running.batch_size))

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(model_name)]})

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def model(name: str) -> Response:
        _check_model(name, model_name)
        return JSONResponse(_model_card(name))

    @app.get("/v1/steerers", dependencies=guarded)
    async def steerers() -> Response:
        return JSONResponse({"object": "list", "data": _engine(app).registry.cards()})

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Response:
        return await _generate(_engine(app), request, ChatRequest, model_name, max_body_bytes)

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        return await _generate(_engine(app), request, CompletionRequest, model_name, max_body_bytes)

    return app


# ---------------------------------------------------------------- errors and checks


async def _api_error(request: Request, error: Any) -> Response:
    engine = request.app.state.engine
    outcome = {401: "unauthorized", 429: "rejected"}.get(error.status, "invalid" if error.status < 500 else None)
    if engine is not None and outcome:
        engine.metrics.outcome(outcome)  # failures in the engine are counted there
    return JSONResponse(error_body(error.message, error.status, error.code), error.status)


async def _http_error(request: Request, error: Any) -> Response:
    return JSONResponse(error_body(f"{request.url.path}: {error.detail}", error.status_code), error.status_code)


async def _server_error(_: Request, __: Exception) -> Response:
    return JSONResponse(error_body("internal error; the server's log says what happened", 500), 500)


def _key_check(api_key: str | None) -> Any:
    expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if expected is not None and not hmac.compare_digest(given, expected):
            raise ApiError("this server needs its API key as a bearer token", 401, "invalid_api_key")

    return check


def _engine(app: FastAPI) -> Engine:
    if app.state.engine is None:
        raise ApiError("the model is still loading; try again later", 503, "loading")
    return app.state.engine


def _check_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(f"unknown model {name!r}; this server has {served!r}", 404, "model_not_found")


def _model_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "emocircuits"}


async def _body(request: Request, limit: int) -> bytes:
    """The body; raises ApiError when it is no JSON by its header, longer than `limit` bytes, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps web pages from posting here without being asked
        raise ApiError("send the request as application/json", 415)

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(f"the request is longer than this server's limit of {limit} bytes", 413)
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(f"the request did not arrive within {BODY_SECONDS:g} seconds", 408) from error


# ---------------------------------------------------------------- generation


async def _generate(engine: Engine, request: Request, kind: Any, model_name: str, limit: int) -> Response:
    try:
        asked = kind.model_validate_json(await _body(request, limit))
    except ValidationError as error:
        raise ApiError(sentence(error), 400) from error
    except ClientDisconnect:
        return Response(status_code=499)
    _check_model(asked.model, model_name)
    job, events = await _submit(engine, asked)
    replies = Replies(model_name, kind is ChatRequest, len(job.ids))
    gone = asyncio.create_task(_disconnected(request))
    streaming = False
    try:
        first = await _next(events, gone)
        if isinstance(first, Failed):  # before any text, so that the status can say it
            raise ApiError(first.message, first.status)
        if first is not None and asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            chunks = _chunks(engine, job, first, events, replies, usage)
            streaming = True
            return StreamingResponse(
                chunks, media_type="text/event-stream", background=BackgroundTask(engine.cancel, job)
            )
        return await _whole(first, events, gone, replies)
    finally:
        gone.cancel()
        if not streaming:
            engine.cancel(job)


async def _submit(engine: Engine, asked: Any) -> tuple[Job, asyncio.Queue[Event]]:
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        # Tokenising a long text takes a while, in which others want to be served.
        checked = await run_in_threadpool(engine.request, asked.prompt(), **asked.options())
        return engine.submit(checked, on_event), events
    except QueueFullError as error:
        raise ApiError(str(error), 429, "queue_full") from error
    except StoppedError as error:
        raise ApiError(str(error), 503) from error
    except InputError as error:
        raise ApiError(str(error), 400) from error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(events: asyncio.Queue[Event], gone: asyncio.Task[None]) -> Event | None:
    """The next event; None when the client went away first."""
    waiting = asyncio.ensure_future(events.get())
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()


async def _whole(
    event: Event | None, events: asyncio.Queue[Event], gone: asyncio.Task[None], replies: Replies
) -> Response:
    text: list[str] = []
    while isinstance(event, Piece):
        text.append(event.text)
        event = await _next(events, gone)
    if isinstance(event, Failed):
        raise ApiError(event.message, event.status)
    if not isinstance(event, Done):
        return Response(status_code=499)  # nobody is left to read it
    return JSONResponse(replies.whole("".join(text), event.finish_reason, event.completion_tokens))


async def _chunks(
    engine: Engine, job: Job, event: Event, events: asyncio.Queue[Event], replies: Replies, usage: bool
) -> AsyncIterator[str]:
    with contextlib.ExitStack() as stack:
        stack.callback(engine.cancel, job)  # also when the client goes away
        if replies.chat:
            yield _sse(replies.chunk("", first=True))
        while isinstance(event, Piece):
            yield _sse(replies.chunk(event.text))
            event = await events.get()
        if isinstance(event, Failed):
            yield _sse(error_body(event.message, event.status))
            return
        yield _sse(replies.chunk(None, event.finish_reason))
        if usage:
            yield _sse(replies.usage_chunk(event.completion_tokens))
        yield "data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"  # in ASCII: some clients split lines at U+2028
