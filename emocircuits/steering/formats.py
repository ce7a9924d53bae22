"""Files of other tools, in and out: what they call a layer and a place, said in our words.

| source | its index | becomes |
|---|---|---|
| control vector of llama.cpp, repeng: `export.from_gguf` | "direction.N": after block N | resid_post, layer N |
| steering-vectors: `from_steering_vectors` | layer N of a layer type | resid_post, attn_out or mlp_out, layer N |
| persona vectors: `from_persona` | row N of hidden_states (row 0: the embeddings) | resid_post, layer N - 1 |
| TransformerLens: `from_hooks` | "blocks.N.hook_resid_post" and the like | the site of that name, layer N |
| nnsight and plain arrays: `from_array` | "layers[N].output" | resid_post, layer N |

Strength 1 is always what the source holds, at all positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations.edits import HEAD_SITES
from ..activations.sites import check_site
from ..errors import ArtefactError, InputError, unknown
from .steerer import Steerer
from .tensor_files import read_tensors
from .term import Term

LAYER_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
HOOKS = {
    **{f"hook_{site}": site for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{f"attn.hook_{site}": site for site in HEAD_SITES},
    "mlp.hook_post": "mlp_post",
}
IMPORTS = ("gguf", "steering-vectors", "persona", "array")
EXPORTS = ("safetensors", "gguf", "easysteer", "baked")


def read_steerer(
    path: str | Path, kind: str, layers: Sequence[int] = (), site: str = "resid_post", name: str | None = None
) -> Steerer:
    """A steerer from a file of one of IMPORTS; `layers` chooses among its layers, or says which an array's rows are.

    Raises InputError for an unknown format or missing layers, ArtefactError for a file that holds something else.
    """
    if kind not in IMPORTS:
        raise unknown("format", kind, IMPORTS)
    name = name or Path(path).stem
    if kind == "gguf":
        from .export import from_gguf

        return _only(from_gguf(path, name), layers)
    if kind == "steering-vectors":
        types = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        if site not in types:
            raise unknown("site of steering-vectors", site, types)
        return _only(from_steering_vectors(path, layer_type=types[site], name=name), layers)
    if kind == "persona":
        return from_persona(path, layers, name=name)
    found = read_tensors(path)
    if isinstance(found, Mapping):
        return _only(from_hooks({str(key): value for key, value in found.items()}, name=name), layers)
    return from_array(found, layers, site, name=name)


def write_steerer(steerer: Steerer, path: str | Path, kind: str, model: str | None = None) -> Path:
    """Write a steerer in one of EXPORTS; "baked" needs a model's name. Raises InputError before that is loaded."""
    if kind not in EXPORTS:
        raise unknown("format", kind, EXPORTS)
    if kind == "safetensors":
        return steerer.save(path)
    if kind != "baked":
        from .export import to_easysteer, to_gguf

        return (to_gguf if kind == "gguf" else to_easysteer)(steerer, path)
    if model is None:
        raise InputError("a baked folder holds the whole model; name it (model=, or --model)")
    from ..models.load import load
    from .bake import bake, require_free

    require_free(path)
    loaded = load(model)
    return bake(steerer, loaded.model, path, loaded.tokenizer)


def from_array(
    vectors: Any,
    layers: int | Sequence[int],
    site: str = "resid_post",
    *,
    heads: int | None = None,
    name: str = "array",
) -> Steerer:
    """A steerer from numpy or torch vectors [n_layers, width], or [width] for one layer, counted from 0.

    What nnsight reads at ``layers[N].output`` is resid_post of layer N, at ``layers[N].input`` resid_pre; on models
    without norms after the sublayers ``self_attn.output`` is attn_out and ``mlp.output`` mlp_out. q, k, v and z take
    [n_layers, heads, head_dim] too. Raises InputError for shapes that do not fit, NaN, or an unknown site.
    """
    check_site(site)
    rows = (layers,) if isinstance(layers, int) else tuple(layers)
    tensor = _finite(vectors, name)
    if site in HEAD_SITES and heads is None and tensor.dim() in (2, 3):  # [heads, head_dim], perhaps per layer
        heads, tensor = tensor.shape[-2], tensor.flatten(-2)
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    if not rows or tensor.dim() != 2 or len(tensor) != len(rows):
        raise InputError(f"vectors {list(tensor.shape)} do not fit {len(rows)} layers; give one row per layer")
    return Steerer((Term(site, rows, tensor, heads=heads),), name, provenance={"format": "array"})


def from_hooks(vectors: Mapping[str, Any], *, name: str = "hooks") -> Steerer:
    """A steerer from vectors keyed by TransformerLens hook names, such as {"blocks.5.hook_resid_post": [d_model]}.

    TransformerLens may have centred the weights that write to the residual stream of a LayerNorm model; such a model
    reads the same from both. Raises InputError for a hook that is no site of ours.
    """
    terms = []
    for key, value in vectors.items():
        site, layer = hook_site(key)
        terms += from_array(value, layer, site, name=name).terms
    if not terms:
        raise InputError(f"{name} holds no vectors")
    return Steerer(tuple(terms), name, provenance={"format": "TransformerLens hooks"})


def hook_site(hook: str) -> tuple[str, int]:
    """(site, layer) of a TransformerLens hook name; raises InputError when it is no site of ours."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if found is None or found[2] not in HOOKS:
        raise unknown("TransformerLens hook", hook, [f"blocks.N.{each}" for each in HOOKS])
    return HOOKS[found[2]], int(found[1])


def from_steering_vectors(source: Any, *, layer_type: str = "decoder_block", name: str = "steering-vector") -> Steerer:
    """A steerer from the steering-vectors package: its SteeringVector, its dict {layer: [width]}, or a file of that.

    Layer types self_attn and mlp mean attn_out and mlp_out, which is exact only on models without a norm after the
    sublayers. Raises InputError for other layer types, ArtefactError for files that hold more than tensors.
    """
    if isinstance(source, (str, Path)):
        source = read_tensors(source)
    layer_type = getattr(source, "layer_type", layer_type)
    found = getattr(source, "layer_activations", source)
    if layer_type not in LAYER_TYPES:
        raise unknown("layer type", layer_type, LAYER_TYPES)
    if not isinstance(found, Mapping) or not found or not all(re.fullmatch(r"-?\d+", str(key)) for key in found):
        raise InputError(f"{name} should hold one vector per layer number, in a dict such as {{5: vector}}")
    by_layer = {int(key): _finite(value, name).flatten() for key, value in found.items()}
    if len({len(vector) for vector in by_layer.values()}) > 1:
        raise InputError(f"{name} holds vectors of different widths; they were made for different models")
    term = Term(LAYER_TYPES[layer_type], tuple(by_layer), torch.stack(list(by_layer.values())))
    return Steerer((term,), name, provenance={"format": "steering-vectors"})


def from_persona(source: Any, layers: int | Sequence[int], *, name: str = "persona") -> Steerer:
    """A steerer from a persona vector: a tensor [n_layers + 1, d_model] or its .pt file, of which `layers` are used.

    Its rows are transformers' hidden_states, so block N is row N + 1 (what that project's scripts call layer N + 1).
    The last row was read after the final norm. Raises InputError for other shapes or layers the file does not have.
    """
    found = read_tensors(source) if isinstance(source, (str, Path)) else source
    if isinstance(found, Mapping):
        raise ArtefactError(f"{name} holds several tensors; a persona vector is one tensor [n_layers + 1, d_model]")
    rows = (layers,) if isinstance(layers, int) else tuple(layers)
    tensor = _finite(found, name)
    if tensor.dim() != 2 or len(tensor) < 2:
        raise InputError(f"{name} has shape {list(tensor.shape)}; a persona vector is [n_layers + 1, d_model]")
    blocks = len(tensor) - 1
    if not rows or not all(0 <= row < blocks for row in rows):
        raise InputError(f"choose layers of {name} from 0 to {blocks - 1}, got {list(rows)}")
    term = Term("resid_post", rows, tensor[[row + 1 for row in rows]])
    return Steerer((term,), name, provenance={"format": "persona vector"})


def _only(steerer: Steerer, layers: Iterable[int]) -> Steerer:
    """The terms' rows at these layers; all of them when none are named."""
    wanted, kept = set(layers), []
    for term in steerer.terms if wanted else ():
        rows = [i for i, layer in enumerate(term.layers) if layer in wanted]
        if rows:
            kept.append(replace(term, layers=tuple(term.layers[i] for i in rows), vectors=term.vectors[rows]))
    held = {layer for term in steerer.terms for layer in term.layers}
    if missing := sorted(wanted - held):
        raise unknown("layer", missing[0], sorted(held))
    return Steerer(tuple(kept), steerer.name, provenance=steerer.provenance) if wanted else steerer


def _finite(vectors: Any, name: str) -> Tensor:
    try:
        tensor = vectors.detach() if isinstance(vectors, Tensor) else torch.from_numpy(np.asarray(vectors, np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds no numbers ({error})") from error
    tensor = tensor.float().cpu().clone()
    if not torch.isfinite(tensor).all():
        raise ArtefactError(f"{name} holds NaN or infinite values")
    return tensor
