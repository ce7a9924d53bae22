"""Steerers in other engines' files: control vectors of llama.cpp, repeng and EasySteer, which share one format."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtefactError, InputError, MissingPackageError
from .steerer import Steerer
from .term import Term

PREFIX = "direction."


def to_gguf(steerer: Steerer, path: str | Path, model_hint: str = "") -> Path:
    """Write a control vector for ``llama-cli --control-vector``: one "direction.N" per layer, strength included.

    llama.cpp adds it to the residual stream after block N at every position. Raises InputError for what the format
    cannot say: other sites or positions, vectors per row, or layer 0, which llama.cpp never touches.
    """
    vectors = residual_vectors(steerer)
    if min(vectors) < 1:
        raise InputError(
            f"llama.cpp never steers layer 0, but {steerer.name!r} has a vector there; choose other layers"
        )
    return _write(vectors, Path(path), model_hint or _hint(steerer))


def to_easysteer(steerer: Steerer, path: str | Path, model_hint: str = "") -> Path:
    """Write a GGUF for EasySteer's "direct" algorithm at scale 1; as `to_gguf`, but layer 0 can be steered too.

    EasySteer adds "direction.N" to the output of decoder layer N, counted from 0. Raises InputError as `to_gguf`.
    """
    return _write(residual_vectors(steerer), Path(path), model_hint or _hint(steerer))


def _write(vectors: dict[int, Tensor], path: Path, model_hint: str) -> Path:
    gguf = _gguf()
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(partial, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"{PREFIX}{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def from_gguf(path: str | Path, name: str | None = None) -> Steerer:
    """A steerer from a control vector of llama.cpp or repeng; its strength 1 is what the file holds.

    Raises ArtefactError for a file that is no control vector or holds NaN.
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(path))
        found = {t.name: torch.tensor(t.data).float().flatten() for t in reader.tensors}
    except Exception as error:  # the reader raises whatever it stumbles over
        raise ArtefactError(f"{path} is no readable GGUF file ({error})") from error
    layers = sorted(int(n.removeprefix(PREFIX)) for n in found if n.startswith(PREFIX))
    if not layers:
        raise ArtefactError(f"{path} holds no control vector (no tensor named {PREFIX}N)")
    vectors = torch.stack([found[f"{PREFIX}{layer}"] for layer in layers])
    if not torch.isfinite(vectors).all():
        raise ArtefactError(f"{path} holds NaN or infinite values")
    term = Term("resid_post", tuple(layers), vectors)
    return Steerer((term,), name or Path(path).stem, provenance={"format": "gguf control vector"})


def residual_vectors(steerer: Steerer) -> dict[int, Tensor]:
    """Vectors [d_model] by layer, strength included; raises InputError for what is not constant at resid_post."""
    out: dict[int, Tensor] = {}
    for term in steerer.terms:
        _require_constant(term, steerer.name)
        for layer, vector in zip(term.layers, term.vectors):
            if layer < 0:
                raise InputError(f"other engines count layers from the front, but {steerer.name!r} has layer {layer}")
            out[layer] = out.get(layer, torch.zeros_like(vector, dtype=torch.float32)) + vector.float() * term.strength
    if not out:
        raise InputError(f"{steerer.name!r} has no vectors to write")
    return out


def _require_constant(term: Term, name: str) -> None:
    if term.mode != "add" or term.control is not None:
        how = "changes its strength as it goes" if term.mode == "add" else f"does {term.mode!r}"
        raise InputError(f"other engines add one constant vector per layer, but {name!r} {how}; attach it instead")
    if term.site != "resid_post" or term.positions != "all" or term.vectors.dim() != 2:
        raise InputError(
            f"a control vector is one vector per layer of resid_post at all positions; {name!r} has a term"
            f" at {term.site!r}, positions {term.positions!r}, vectors {list(term.vectors.shape)}"
        )


def _hint(steerer: Steerer) -> str:
    return str((steerer.fingerprint or {}).get("architecture") or "unknown")


def _gguf() -> Any:
    if find_spec("gguf") is None:
        raise MissingPackageError("control vectors need another package: pip install gguf")
    import gguf

    return gguf
