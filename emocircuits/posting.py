"""Asking an OpenAI-compatible server through the standard library: retries, waits, and errors that say what to do."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0


class RefusedError(InputError):
    """The server will not answer this request, however often it is asked; `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class FailingError(InputError):
    """The server was asked as often as allowed and failed every time."""


def whole(answer: Any) -> Any:
    """The JSON of an answer that does not stream."""
    return json.loads(answer.read())


@dataclass(frozen=True)
class Server:
    """A server at `base_url` (such as "http://localhost:8000/v1"); `who` is what errors call it.

    Busy and failing servers are asked again up to `retries` times, after growing waits or the one they ask for.
    """

    who: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    retries: int = 4
    backoff_s: float = 1.0
    timeout_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        """Raises InputError for an address that is not http."""
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"base_url {self.base_url!r} must start with http:// or https://")

    def url(self, path: str) -> str:
        return self.base_url.rstrip("/") + path

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T] = whole) -> T:
        """What `read` makes of the answer to a JSON body.

        An OSError in `read` (a broken stream) counts as a failure and is retried. Raises RefusedError when the
        server refuses the request, FailingError when it keeps failing, InputError when it does not speak JSON.
        """
        problem, attempts = "never asked", max(self.retries, 0) + 1
        for attempt in range(attempts):
            try:
                with self._open(path, json.dumps(body).encode()) as answer:
                    return read(answer)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in RETRIED:
                        raise RefusedError(self._refusal(path, error), error.code) from error
                    problem, wait = f"HTTP {error.code}", _retry_after(error)
            except json.JSONDecodeError as error:
                raise InputError(f"{self.url(path)} answered something other than JSON; check base_url") from error
            except (OSError, http.client.HTTPException) as error:
                problem, wait = str(error) or type(error).__name__, None
            if attempt + 1 < attempts:
                self.sleep(min(wait if wait is not None else self.backoff_s * 2**attempt, LONGEST_WAIT))
        raise FailingError(
            f"{self.who} at {self.url(path)} failed {attempts} times (last: {problem}); "
            "check that it is up, or lower concurrency"
        )

    def check(self, path: str = "/models") -> None:
        """Raise InputError where nothing answers, or not with this key; any other answer will do, and so will none."""
        try:
            self._open(path, timeout_s=min(self.timeout_s, 10.0)).close()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (401, 403):
                    raise RefusedError(self._refusal(path, error), error.code) from error
        except TimeoutError:  # connected, but too busy to answer
            return
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"nothing answers at {self.base_url} ({str(error) or type(error).__name__}); "
                "start the server, or check base_url"
            ) from error

    def _open(self, path: str, data: bytes | None = None, timeout_s: float | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url(path), data, headers)
        return urllib.request.urlopen(request, timeout=timeout_s or self.timeout_s)

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> str:
        hint = "pass a valid api_key" if error.code in (401, 403) else "check base_url and model"
        said = error.read(200).decode(errors="replace")
        return f"{self.who} at {self.url(path)} refused the request (HTTP {error.code}: {said}); {hint}"


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds the server asks to wait, if it says so in seconds."""
    value = error.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
