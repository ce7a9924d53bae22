"""Steerers on the Hugging Face hub: one safetensors file and a model card; a local folder works in the same way."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import artefact
from ..errors import InputError
from ..models.load import _hub_is_unreachable
from .steerer import Steerer
from .term import Term

FILE, CARD, PLOT = "steerer.safetensors", "README.md", "cost.svg"
TAGS = ("emocircuits", "activation-steering", "emotion")


def push(
    steerer: Steerer,
    repo_id: str | Path,
    *,
    private: bool = False,
    token: str | None = None,
    licence: str = "mit",
    base_model: str | None = None,
    revision: str | None = None,
    card_text: str = "",
) -> str:
    """Upload steerer.safetensors, README.md and a measured cost card's plot in one commit; returns the address.

    A path ("./fear") gets the files instead.
    `licence` is a hub licence id and is kept in the file too; `base_model` is the hub id of the steered model. Raises
    InputError, in one sentence, for what the hub or the disk refuses.
    """
    if not licence.strip():
        raise InputError("a published steerer needs a licence, such as 'mit' or 'cc-by-4.0'")
    steerer = replace(steerer, provenance={**steerer.provenance, "licence": licence}, _installed=None)
    texts = {CARD: card(steerer, licence, base_model, card_text)}
    if _measured(steerer):
        from .._card_text import plot

        texts[PLOT] = plot(steerer.cost or {})
    if folder := _folder(repo_id):
        steerer.save(folder / FILE)
        for file, text in texts.items():
            artefact.write_text_atomic(folder / file, text)
        return str(folder)
    from huggingface_hub import CommitOperationAdd, HfApi

    name, api = str(repo_id), HfApi(token=token, library_name="emocircuits")
    with tempfile.TemporaryDirectory() as place, _said_plainly(name, revision):
        if _hub_is_unreachable():
            raise ConnectionError("its name does not resolve")
        files = [CommitOperationAdd(FILE, steerer.save(Path(place) / FILE))]
        files += [CommitOperationAdd(file, text.encode()) for file, text in texts.items()]
        made = api.create_repo(name, private=private, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.create_commit(name, files, commit_message=f"Steerer {steerer.name}", revision=revision)
    return str(made)


def pull(where: str | Path, *, revision: str | None = None, token: str | None = None, filename: str = FILE) -> Path:
    """The path of a steerer's file: in a local folder, or downloaded from a hub repository into the hub's cache.

    Raises InputError, in one sentence, when there is no such folder, repository, revision or file, or no network.
    """
    if folder := _folder(where):
        path = folder if folder.is_file() else folder / filename
        if not path.is_file():
            raise InputError(f"there is no {filename} in {folder}; check the path")
        return path
    from huggingface_hub import HfApi

    with _said_plainly(str(where), revision, filename):
        api = HfApi(token=token, library_name="emocircuits")
        offline = _hub_is_unreachable()  # the client would retry for half a minute
        return Path(api.hf_hub_download(str(where), filename, revision=revision, local_files_only=offline))


def card(steerer: Steerer, licence: str, base_model: str | None = None, text: str = "") -> str:
    """The model card: hub metadata, what the steerer adds where, its cost card, and how to use it."""
    metadata: dict[str, Any] = {"license": licence, "library_name": "emocircuits", "tags": list(TAGS)}
    metadata |= {"base_model": base_model} if base_model else {}
    made_for = (steerer.fingerprint or {}).get("name")
    rows = [_row(term) for term in steerer.terms]
    # JSON is YAML, and quotes whatever needs it.
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items())
    parts = [
        f"---\n{yaml}\n---",
        f"# {steerer.name}",
        text.strip(),
        f"Made for {made_for}." if made_for else "",
        "| what | site | layers | strength | when |\n|---|---|---|---|---|\n" + "\n".join(rows),
        _costs(steerer),
        "## Use\n\n```python\nfrom emocircuits import Steerer\n\n"
        'with Steerer.from_pretrained("<this repository>").attach(model):\n    model.generate(**inputs)\n```',
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(term: Term) -> str:
    when = term.positions + (f", {type(term.control).__name__}" if term.control else "")
    return f"| {term.mode} | {term.site} | {', '.join(map(str, term.layers))} | {term.strength:g} | {when} |"


def _measured(steerer: Steerer) -> bool:
    return bool(steerer.cost) and "cells" in (steerer.cost or {})


def _costs(steerer: Steerer) -> str:
    """The cost card one heading level down; other notes of costs as a table."""
    if not _measured(steerer):
        return "## What it costs\n\n" + _table(steerer.cost) if steerer.cost else ""
    from .._card_text import markdown

    return "\n".join(f"#{line}" if line.startswith("#") else line for line in markdown(steerer, PLOT).splitlines())


def _table(values: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {shown(value)} |" for key, value in values.items())


def _folder(where: str | Path) -> Path | None:
    """The local path that `where` means, None for a hub id: the rule of `load`, existing folders first."""
    text = os.fspath(where)
    if not text.strip():
        raise InputError("give a hub id such as 'name/fear', or a folder such as './fear'")
    path = Path(text).expanduser()
    is_path = isinstance(where, Path) or path.exists() or path.is_absolute() or text.startswith((".", "~"))
    return path if is_path or text.count("/") > 1 else None


@contextmanager
def _said_plainly(repo: str, revision: str | None, filename: str = FILE) -> Iterator[None]:
    """Every way in which the hub refuses, as one InputError that says what to do."""
    from httpx import HTTPError
    from huggingface_hub import errors

    network = f"the hub cannot be reached, and {repo} is not in its cache; check the network"
    words: list[tuple[tuple[type[BaseException], ...], str]] = [  # the first that fits
        ((errors.HFValidationError,), f"{repo!r} is no hub id (like 'name/fear') and no existing folder"),
        ((errors.GatedRepoError,), f"{repo} is gated; ask for access on the hub, then pass token="),
        ((errors.RepositoryNotFoundError,), f"the hub has no {repo}, or hides it; check the name, or pass token="),
        ((errors.RevisionNotFoundError,), f"{repo} has no revision {revision!r}; check its branches and tags"),
        ((errors.LocalEntryNotFoundError, ConnectionError, TimeoutError), network),
        ((errors.EntryNotFoundError,), f"{repo} holds no {filename}; check the file name, or whether it is a steerer"),
        ((errors.LocalTokenNotFoundError,), f"the hub asks who you are at {repo}; pass token="),
        ((errors.HfHubHTTPError,), ""),
        ((HTTPError,), network),
    ]
    try:
        yield
    except tuple(kind for kinds, _ in words for kind in kinds) as error:
        # The client says "not in the cache" for every refusal of a download; what the hub answered is its cause.
        answer = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        said = next(text for kinds, text in words if isinstance(answer, kinds))
        raise InputError(said or _by_status(answer, repo)) from error


def _by_status(error: BaseException, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub does not let you use {repo}; pass token= with the right to do so"
    return f"the hub answered {status or 'nothing'} for {repo}; try again later"
