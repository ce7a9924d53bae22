"""Names of the places in a transformer that can be read and written, and how users ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import InputError, unknown

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

Key: TypeAlias = tuple[str, int]
"""(site, layer); the layer of ``final_norm`` is always 0."""
SiteRequest: TypeAlias = "str | Key | Sequence[str | Key] | Mapping[str, int | Sequence[int] | str]"

SITES: dict[str, str] = {
    "resid_pre": "residual stream entering the block, [B, T, d_model]",
    "q": "queries before rotary embedding and q-norm, [B, T, n_heads, head_dim]",
    "k": "keys before rotary embedding and k-norm, [B, T, n_kv_heads, head_dim]",
    "v": "values, [B, T, n_kv_heads, head_dim]",
    "pattern": "attention probabilities, [B, n_heads, T_query, T_key]; read only",
    "z": "head outputs (the input of o_proj), [B, T, n_heads, head_dim]",
    "attn_out": "what attention adds to the residual stream, [B, T, d_model]",
    "resid_mid": "residual stream between attention and MLP, [B, T, d_model]",
    "mlp_post": "neuron activations (the input of down_proj), [B, T, d_mlp]",
    "mlp_out": "what the MLP adds to the residual stream, [B, T, d_model]",
    "resid_post": "residual stream leaving the block, before any final norm, [B, T, d_model]",
    "final_norm": "output of the final norm (what the unembedding reads), [B, T, d_model]",
}


def check_site(site: str) -> str:
    """Return `site` or raise InputError listing the choices."""
    if site not in SITES:
        raise unknown("site", site, SITES)
    return site


def expand_layers(layers: int | str | Iterable[int] | None, n_layers: int) -> list[int]:
    """Layer numbers from an int, a list, "all" or None; negative numbers count from the end.

    Raises InputError for a layer the model does not have.
    """
    if layers is None or layers == "all":
        return list(range(n_layers))
    if isinstance(layers, str):
        raise InputError(f"layers must be numbers or 'all', got {layers!r}")
    wanted = [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if not -n_layers <= int(layer) < n_layers:
            raise InputError(f"layer {layer} does not exist; this model has layers 0 to {n_layers - 1}")
    return [int(layer) % n_layers for layer in wanted]


def expand_sites(request: SiteRequest, layers: int | str | Iterable[int] | None, anatomy: Anatomy) -> list[Key]:
    """(site, layer) keys of a request such as "resid_post", ["z", ("q", 3)] or {"resid_post": [4, 5]}.

    `layers` applies to every site that does not name its own. Raises InputError for unknown names.
    """
    if isinstance(request, Mapping):
        pairs: list[Any] = list(request.items())
    else:
        single = isinstance(request, str) or (
            isinstance(request, tuple) and len(request) == 2 and isinstance(request[1], int)
        )
        items: list[Any] = [request] if single else list(request)
        pairs = [(item, layers) if isinstance(item, str) else item for item in items]
    keys: dict[Key, None] = {}
    for site, own in pairs:
        check_site(str(site))
        wanted = [0] if site == "final_norm" else expand_layers(own, anatomy.n_layers)  # type: ignore[arg-type]
        if own is None or own == "all":  # of a hybrid model, the layers that have this site
            wanted = [n for n in wanted if anatomy.has(str(site), n)] or wanted
        keys.update({(str(site), layer): None for layer in wanted})
    if not keys:
        raise InputError("no site was asked for; name at least one, for example 'resid_post'")
    return list(keys)
