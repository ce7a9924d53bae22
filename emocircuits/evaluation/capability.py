"""A small capability check: does the model still know what every model knows while it is steered?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import artefact
from .likelihood import perplexity


@cache
def items() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Forty beginnings with three endings each, the right one first; the order plays no part in the scoring."""
    path = resources.files("emocircuits.data") / "capability.jsonl"
    with resources.as_file(path) as file:
        return tuple((row["prompt"], tuple(row["choices"])) for row in artefact.read_jsonl(file))


def capability(
    model: Any, tokenizer: Any, steered: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> NDArray[np.bool_]:
    """[40] whether the right ending has the highest likelihood per token, under whatever `steered()` attaches."""
    prompts = [prompt for prompt, choices in items() for _ in choices]
    endings = [choice for _, choices in items() for choice in choices]
    with steered():
        odd = perplexity(model, tokenizer, prompts, endings)
    return odd.reshape(len(items()), -1).argmin(1) == 0
