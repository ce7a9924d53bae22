"""OpenAI's wire format: the requests that are understood, and the JSON of answers, chunks and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

Json = dict[str, Any]

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields of OpenAI that this server does not support, with the values that ask for nothing."""
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that cannot change the text."""


def _steering(value: Any) -> Any:
    """{"fear": 0.8} or [{"name": "fear", "strength": 0.8}, ...] as one mapping; names given twice add up."""
    if value is None:
        return {}
    if isinstance(value, dict):
        value = [{"name": name, "strength": strength} for name, strength in value.items()]
    if not isinstance(value, list) or not all(isinstance(part, dict) and "name" in part for part in value):
        raise ValueError('give steering as {"fear": 0.8} or [{"name": "fear", "strength": 0.8}]')
    total: dict[str, float] = {}
    for part in value:
        name, strength = part["name"], part.get("strength", 1.0)
        if set(part) - {"name", "strength"}:
            raise ValueError("an item of steering has 'name' and 'strength' only")
        if not isinstance(name, str) or isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise ValueError("in steering, a name is a text and a strength is a number")
        total[name] = total.get(name, 0.0) + strength
    return total


def _stop(value: Any) -> Any:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("give stop as a text or a list of up to 16 texts, none of them empty")
    return stops


class StreamOptions(BaseModel):
    """include_usage: one more chunk at the end that holds the token counts."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What chats and completions share; raises ValidationError for fields this server cannot honour."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: FiniteFloat | None = Field(1.0, ge=0, le=10)
    top_p: FiniteFloat | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stop)] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    steering: Annotated[dict[str, FiniteFloat], BeforeValidator(_steering)] = {}

    @model_validator(mode="after")
    def _understood(self) -> Any:
        """Refuse extra fields rather than ignore them: a misspelt one would give a text nobody asked for."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in HARMLESS:
                raise ValueError(f"unknown field {name!r}")
            if not any(type(value) is type(h) and value == h or value == h == 0 for h in HARMLESS[name]):
                raise ValueError(f"this server does not support {name}={str(value):.40}; leave it out")
        return self

    def options(self) -> Json:
        """Keyword arguments for `Engine.request`."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "stop": self.stop,
            "steering": self.steering,
        }


def _content(value: Any) -> Any:
    """A message's text, given as it is or in parts; assistants that called tools have none."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        raise ValueError("this server reads text only; give content as a text or as parts of type 'text'")
    return "".join(str(part.get("text", "")) for part in parts)


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompt(self) -> list[dict[str, str]]:
        """The messages."""
        return [message.plain() for message in self.messages]

    def options(self) -> Json:
        """Keyword arguments for `Engine.request`."""
        return super().options() | {"max_tokens": self.max_completion_tokens or self.max_tokens}


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions: one prompt, as text or token ids."""

    input: str | list[int] = Field(alias="prompt")

    @field_validator("input", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not isinstance(value[0], int):
            if len(value) > 1:
                raise ValueError("this server takes one prompt per request; send several requests, they share a batch")
            value = value[0]
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(t) is int for t in value)):
            raise ValueError("a prompt is a text or a list of token ids")
        return value

    def prompt(self) -> str | list[int]:
        """The text or token ids."""
        return self.input


def sentence(error: ValidationError) -> str:
    """The first problem of a body in one sentence."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def error_body(message: str, status: int, code: str | None = None) -> Json:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Replies:
    """The JSON of one answer: whole, or in chunks that share an id."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self._object = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: str, completion_tokens: int) -> Json:
        """The answer of a request that does not stream."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": self._object, "choices": [choice], "usage": self.usage(completion_tokens)}

    def chunk(self, text: str | None = None, finish_reason: str | None = None, *, first: bool = False) -> Json:
        """One chunk: the opening of a chat (`first`), some text, or the end."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        said = {"delta": delta} if self.chat else {"text": text or ""}
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}])

    def usage_chunk(self, completion_tokens: int) -> Json:
        """The chunk without choices that `include_usage` asks for."""
        return self._chunk([]) | {"usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> Json:
        """Token counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _chunk(self, choices: Sequence[Json]) -> Json:
        kind = f"{self._object}.chunk" if self.chat else self._object
        return {**self._head, "object": kind, "choices": list(choices)}
