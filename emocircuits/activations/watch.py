"""What generate() was given, told to whoever follows its forward passes, because the passes alone do not say it."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Prompt:
    """Rows and columns of the batch that generate() was given, and how many beams follow each row."""

    rows: int
    columns: int
    beams: int = 1
    ids: Tensor | None = None


class Follower(Protocol):
    """Whoever wants to know when a generate() begins (None: it was given no tokens) and ends."""

    def begin(self, prompt: Prompt | None) -> None: ...

    def end(self) -> None: ...


class GenerateWatch:
    """Tells a follower about every generate() of a model until `remove()`.

    Beams repeat rows, assisted decoding mixes prompt and candidates in one pass, chunks cut the prompt: all of them
    look like something else from inside. The wrapper stands on the instance while anyone follows; models without a
    `generate` of their class are left alone.
    """

    def __init__(self, model: nn.Module, follower: Follower) -> None:
        self.model, self.follower = model, follower
        with _LOCK:
            if "generate" not in vars(model) and hasattr(type(model), "generate"):
                model.generate = MethodType(_watched(type(model)), model)  # type: ignore[assignment]
            followers = _followers(model)
            if followers is not None:
                followers.append(follower)

    def remove(self) -> None:
        """Stop telling; safe to call twice."""
        with _LOCK:
            followers = _followers(self.model)
            if followers is None or self.follower not in followers:
                return
            followers.remove(self.follower)
            if not followers:
                del self.model.generate


def _followers(model: nn.Module) -> list[Follower] | None:
    return getattr(vars(model).get("generate"), "followers", None)


def _watched(kind: Any) -> Any:
    followers: list[Follower] = []

    @functools.wraps(kind.generate)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        told, prompt = list(followers), _prompt(model, args, kwargs)
        for follower in told:
            follower.begin(prompt)
        try:
            return kind.generate(model, *args, **kwargs)
        finally:
            for follower in told:
                follower.end()

    generate.followers = followers  # type: ignore[attr-defined]
    return generate


def _prompt(model: Any, args: tuple, kwargs: dict[str, Any]) -> Prompt | None:
    given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
    tokens = next((t for t in given if isinstance(t, Tensor) and t.dim() >= 2 and t.shape[1]), None)
    if tokens is None:
        return None
    configs = (kwargs.get("generation_config"), *args[1:2], getattr(model, "generation_config", None))
    beams = [kwargs.get("num_beams"), *(getattr(c, "num_beams", None) for c in configs)]
    ids = tokens if tokens.dim() == 2 and not tokens.is_floating_point() else None
    return Prompt(tokens.shape[0], tokens.shape[1], int(next((b for b in beams if b), 1)), ids)
