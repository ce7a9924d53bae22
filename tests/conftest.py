"""Fixtures and profiles shared by every test. Torch runs on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Without it MKL's last bits depend on where in memory an array lies, and nothing can be bit-identical to anything.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch
from chat_server import chat_server
from hypothesis import settings

from emocircuits.errors import MissingPackageError

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# Tiny models: threads cost more than they bring, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo model as `emocircuits.models.load("demo")` returns it, shared by the whole session."""
    from emocircuits import models  # here, so that tests without the demo do not pay for the import

    try:
        return models.load("demo")
    except MissingPackageError as error:
        pytest.skip(f"the demo model is not installed: {error}")


@pytest.fixture
def endpoint() -> Iterator[Any]:
    """A local chat endpoint: set its `answer`; see `chat_server`."""
    with chat_server() as server:
        yield server
