"""TransformerLens models: where each site is among their HookPoints.

A `TransformerBridge` puts its parts into a transformers model, so that model (`unwrap`) is hooked, at the HookPoints
inside it. A `HookedTransformer` is a model of its own, with other argument names (`hooked_inputs`). Nothing here
imports TransformerLens: whoever passes such a model has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import InputError
from .anatomy import FINAL_NORM, NOT_TEXT, Anatomy, Point, child_named, features, output_embeddings, text_config

if TYPE_CHECKING:
    from ..activations.sites import Key

HEADS = {"q": "hook_q", "k": "hook_k", "v": "hook_v", "z": "hook_z"}
RESIDUAL = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
PARALLEL = "attention and MLP read the same residual in parallel"
ORIGINAL = "_original_component"


def is_lens(module: nn.Module) -> bool:
    """Whether this very module (not one inside it) is TransformerLens'."""
    return any(parent.__module__.split(".")[0] == "transformer_lens" for parent in type(module).__mro__)


def is_hooked(module: nn.Module) -> bool:
    """Whether this is a HookedTransformer, whose forward takes `input` and has no transformers config."""
    return is_lens(module) and any(parent.__name__ == "HookedTransformer" for parent in type(module).__mro__)


def hooked_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Arguments of HookedTransformer's forward: `input` and `attention_mask`, from which it derives positions.

    Raises InputError for anything else, because it would be ignored.
    """
    kept = {name: value for name, value in batch.items() if name not in ("token_type_ids", "use_cache")}
    unknown_names = sorted(set(kept) - {"input", "input_ids", "attention_mask"})
    if unknown_names:
        raise InputError(
            f"a HookedTransformer takes input_ids and attention_mask only; drop {', '.join(unknown_names)}"
        )
    return {"input" if name == "input_ids" else name: value for name, value in kept.items()}


def lens_anatomy(module: nn.Module) -> Anatomy:
    """Anatomy of a HookedTransformer, or of the transformers model inside a TransformerBridge.

    Sites keep this package's definitions; what a model's HookPoints do not offer is `missing`, with the reason.
    Raises InputError for other TransformerLens models, such as encoders.
    """
    if is_hooked(module):
        return _hooked(module)
    if is_lens(module):
        raise InputError(f"{type(module).__name__} has no decoder; use a HookedTransformer or a TransformerBridge")
    return _bridged(module)


# ---------------------------------------------------------------- HookedTransformer


def _hooked(model: nn.Module) -> Anatomy:
    cfg: Any = model.cfg
    kv_heads = (
        cfg.n_key_value_heads if cfg.n_key_value_heads and not cfg.ungroup_grouped_query_attention else cfg.n_heads
    )
    heads = {"q": cfg.n_heads, "k": kv_heads, "v": kv_heads, "z": cfg.n_heads}
    wanted = {site: (hook, None) for site, hook in RESIDUAL.items()}
    wanted |= {site: (f"attn.{hook}", heads[site]) for site, hook in HEADS.items()}
    wanted |= {"pattern": ("attn.hook_pattern", None), "mlp_post": ("mlp.hook_post", None)}
    points, missing = {("final_norm", 0): Point("ln_final")}, {}
    for layer in range(cfg.n_layers):
        for site, (path, n_heads) in wanted.items():
            if _exists(model, f"blocks.{layer}.{path}"):
                points[site, layer] = Point(f"blocks.{layer}.{path}", heads=n_heads)
            else:
                missing[site] = PARALLEL if cfg.parallel_attn_mlp else f"this HookedTransformer has no {path}"
    sandwich = "sandwich" if cfg.use_normalization_before_and_after else "pre-norm"
    blocks = tuple(f"blocks.{layer}" for layer in range(cfg.n_layers))
    return Anatomy(
        family=cfg.model_name or cfg.original_architecture or "HookedTransformer",
        structure="parallel" if cfg.parallel_attn_mlp else sandwich,
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=kv_heads,
        head_dim=cfg.d_head,
        d_mlp=cfg.d_mlp if ("mlp_post", 0) in points else None,
        vocab_size=cfg.d_vocab,
        decoder="blocks.0",  # generate() bypasses the model's own hooks; the first block sees tokens, cache and mask
        blocks=blocks,
        attention=tuple(f"{block}.attn" for block in blocks),
        final_norm="ln_final",
        lm_head="unembed",
        points=points,
        missing=missing,
        linear_out={},
        hook_points=True,
        last="unembed",
    )


def _exists(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


# ---------------------------------------------------------------- TransformerBridge


def _bridged(model: nn.Module) -> Anatomy:
    path, blocks = _bridged_blocks(model)
    config = text_config(getattr(model, "config", None))
    decoder_path = path.rpartition(".")[0]
    decoder = model.get_submodule(decoder_path)
    reader = _BridgeReader(int(config.num_attention_heads))
    for layer, block in enumerate(blocks):
        reader.read(block, layer, f"{path}.{layer}")
    final = child_named(decoder, FINAL_NORM)
    if final is None:
        raise InputError(f"no final norm among {[n for n, _ in decoder.named_children()]} of this TransformerBridge")
    final = f"{decoder_path}.{final}" if decoder_path else final
    reader.points["final_norm", 0] = Point(final)
    return Anatomy(
        family=config.model_type,
        structure=reader.structure,
        n_layers=len(blocks),
        d_model=int(config.hidden_size),
        n_heads=reader.shapes.get("n_heads", 0),
        n_kv_heads=reader.shapes.get("n_kv_heads", 0),
        head_dim=reader.shapes.get("head_dim", 0),
        d_mlp=reader.shapes.get("d_mlp"),
        vocab_size=int(config.vocab_size),
        decoder=decoder_path,
        blocks=tuple(f"{path}.{layer}" for layer in range(len(blocks))),
        attention=tuple(reader.attention),
        final_norm=final,
        lm_head=output_embeddings(model),
        points=reader.points,
        missing=reader.missing,
        linear_out={},
        hook_points=True,
    )


def _bridged_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for path, module in model.named_modules():
        text = not any(word in path for word in NOT_TEXT)
        if text and isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "hook_aliases"):
            return path, module
    raise InputError("this TransformerBridge has no list of decoder blocks, so its sites are unknown")


class _BridgeReader:
    """Collects the HookPoints of one bridged model, through the names that TransformerLens itself gives them."""

    def __init__(self, n_heads: int) -> None:
        self.points: dict[Key, Point] = {}
        self.missing: dict[str, str] = {}
        self.attention: list[str] = []
        self.structure = "pre-norm"
        self.shapes: dict[str, int] = {"n_heads": n_heads}

    def read(self, block: nn.Module, layer: int, path: str) -> None:
        for site, hook in RESIDUAL.items():
            self._add(site, layer, path, _target(block, hook), PARALLEL)
        mid, norm = self.points.get(("resid_mid", layer)), hasattr(block, "ln1_post")
        post_norm = mid is not None and mid.module.endswith("mlp.hook_in")
        self.structure = "sandwich" if norm else "post-norm" if post_norm else "pre-norm" if mid else "parallel"
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if isinstance(attn, nn.Module):
            self._attention(attn, layer, f"{path}.attn")
        hook = _target(mlp, "hook_post") if isinstance(mlp, nn.Module) else None
        is_neurons = hook is not None and hook.endswith("out.hook_in")  # of experts, hook_post is the MLP's output
        self._add("mlp_post", layer, f"{path}.mlp", hook if is_neurons else None, "its neurons have no HookPoint")
        if is_neurons and mlp is not None and hook is not None:
            self.shapes["d_mlp"] = features(mlp.get_submodule(hook.removesuffix(".hook_in")))[0]

    def _attention(self, attn: nn.Module, layer: int, path: str) -> None:
        self.attention.append(path)
        reason = f"{type(attn).__name__} has no HookPoint there"
        output = _target(attn, "hook_z")
        if output is None:
            self.missing |= dict.fromkeys(HEADS, reason)
            return
        n_heads = self.shapes["n_heads"]
        head_dim = features(attn.get_submodule(output.removesuffix(".hook_in")))[0] // n_heads
        self.shapes["head_dim"] = head_dim
        for site, hook in HEADS.items():
            target = _target(attn, hook)
            heads = n_heads
            if site in "kv" and target is not None and target.endswith(".hook_out"):
                heads = features(attn.get_submodule(target.removesuffix(".hook_out")))[1] // head_dim
                self.shapes["n_kv_heads"] = heads
            self._add(site, layer, path, target, reason, heads)
        self._add("pattern", layer, path, _target(attn, "hook_pattern"), reason)

    def _add(self, site: str, layer: int, path: str, hook: str | None, reason: str, heads: int | None = None) -> None:
        if hook is None:
            self.missing[f"{site}.{layer}"] = reason
        else:
            self.points[site, layer] = Point(f"{path}.{hook}", heads=heads)


def _target(component: nn.Module, name: str) -> str | None:
    """Path below `component` of the HookPoint that TransformerLens calls `name` there."""
    aliases: Any = getattr(component, "hook_aliases", {})
    found = aliases.get(name, name)
    candidates = [found] if isinstance(found, str) else list(found)
    return next((path for path in candidates if _exists(component, path)), None)


def transformers_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """`named_parameters` as the model had them before a bridge changed it in place; other models: as they are.

    Every part that a bridge wrapped lies one level deeper, copies of split projections lie beside it, and the
    unembedding gets a bias.
    """
    if is_lens(model) or not any(map(is_lens, model.modules())):
        yield from model.named_parameters()
        return
    seen: set[int] = set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = _without_bridges(model, path)
        if name is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _without_bridges(model: nn.Module, path: str) -> str | None:
    """`path` without the bridges' own level; None for what is not the original model's."""
    module: Any = model
    kept, bridge = [], ""
    for part in path.split("."):
        if is_lens(module) != (part == ORIGINAL):
            return None
        bridge = type(module).__name__ if part == ORIGINAL else bridge
        kept += [part] if part != ORIGINAL else []
        module = getattr(module, part)
    added = bridge == "UnembeddingBridge" and path.endswith(f"{ORIGINAL}.bias") and not bool(module.any())
    return None if added else ".".join(kept)
