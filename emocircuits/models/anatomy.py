"""One description of any decoder: which module and which tensor is each site.

Found by structure, not by a file per architecture: the text decoder is the module that owns a list of
blocks and the token embedding; inside a block, children are recognised by their names and checked by shape.
`Anatomy.validate` then proves the result on two tokens (sublayer outputs must add up to the residual).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError, unknown

if TYPE_CHECKING:  # `activations` is built on this module
    from ..activations.sites import Key

BLOCK_LISTS = ("layers", "h", "blocks", "decoder_layers")
ATTENTION = ("self_attn", "attention", "attn", "self_attention")
OTHER_MIXERS = ("linear_attn", "mamba", "conv")  # what stands in for attention in hybrid models
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
O_PROJ = ("o_proj", "dense", "c_proj", "out_proj", "wo")
DOWN_PROJ = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
PRE_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "post_attention_norm")
FINAL_NORM = ("norm", "final_layer_norm", "ln_f", "final_layernorm", "final_norm")
NOT_TEXT = ("vision", "visual", "audio", "talker", "code2wav", "code_predictor", "token2wav")


@dataclass(frozen=True)
class Point:
    """Where one site lives: a module, its input or output, and the view that names the units.

    `heads` views the last dimension as [heads, width]; `part` takes one of several tensors fused in a
    projection, either as consecutive slices (start, stop) or interleaved per head (index, count).
    """

    module: str
    io: str = "output"
    heads: int | None = None
    part: tuple[int, int] | None = None
    interleaved: tuple[int, int] | None = None

    def read(self, x: Tensor) -> Tensor:
        """The site's tensor [B, T, width] or [B, T, heads, width] as a view of the module's tensor."""
        if self.interleaved is not None:
            index, count = self.interleaved
            assert self.heads is not None
            return x.unflatten(-1, (self.heads, count, -1))[..., index, :]
        if self.part is not None:
            x = x[..., self.part[0] : self.part[1]]
        return x if self.heads is None or x.dim() == 4 else x.unflatten(-1, (self.heads, -1))

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        """The module's tensor with the site's part replaced by `value` (out of place)."""
        if self.interleaved is not None:
            index, count = self.interleaved
            assert self.heads is not None
            parts = list(x.unflatten(-1, (self.heads, count, -1)).unbind(-2))
            parts[index] = value
            return torch.stack(parts, dim=-2).flatten(-3)
        value = value.reshape(*value.shape[:2], -1) if self.heads is not None and x.dim() == 3 else value
        if self.part is None:
            return value
        start, stop = self.part
        return torch.cat([x[..., :start], value, x[..., stop:]], dim=-1)


@dataclass(frozen=True)
class Anatomy:
    """Names, shapes and sites of one model's text decoder (see `resolve`)."""

    family: str
    structure: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int | None
    vocab_size: int
    decoder: str
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    """Of each block; "" where a block has no softmax attention."""
    final_norm: str
    lm_head: str | None
    points: dict[Key, Point] = field(repr=False)
    missing: dict[str, str] = field(repr=False)
    linear_out: dict[Key, str] = field(repr=False)
    """(site, layer) -> Linear whose bias adds exactly there (pre-norm blocks only)."""
    hook_points: bool = False
    """Whether the points are TransformerLens HookPoints."""
    last: str = ""
    """Module whose return ends a forward pass; "" is the model itself."""

    def point(self, site: str, layer: int) -> Point:
        """The Point of a site; raises HookError when this architecture does not have it, with the reason."""
        from ..activations.sites import check_site

        check_site(site)
        layer = layer + self.n_layers if layer < 0 else layer
        key = (site, 0 if site == "final_norm" else layer)
        if key in self.points:
            return self.points[key]
        reason = self.missing.get(f"{site}.{layer}") or self.missing.get(site) or "it was not found in the block"
        raise HookError(f"site {site!r} is not defined at layer {layer} of this {self.family} model: {reason}")

    def has(self, site: str, layer: int) -> bool:
        """Whether a layer has this site."""
        return bool(self.attention[layer]) if site == "pattern" else (site, layer) in self.points

    def sites(self) -> list[str]:
        """Sites defined in at least one layer, in forward order."""
        from ..activations.sites import SITES

        present = {site for site, _ in self.points}
        if any(self.attention):
            present.add("pattern")
        return [site for site in SITES if site in present]

    def n_units(self, site: str) -> int:
        """How many units (dimensions, heads or neurons) a site has."""
        if site in ("q", "z", "pattern"):
            return self.n_heads
        if site in ("k", "v"):
            return self.n_kv_heads
        if site == "mlp_post":
            return self.d_mlp or 0
        return self.d_model

    @torch.no_grad()
    def validate(self, model: nn.Module, tolerance: float = 1e-3) -> float:
        """Prove the anatomy on two tokens: resid_post = resid_pre + attn_out + mlp_out in every layer.

        Returns the largest relative error; raises HookError naming the first layer that does not add up.
        """
        from ..activations.capture import capture

        ids = torch.tensor([[1, 2]], device=next(model.parameters()).device)
        acts = capture(model, {"input_ids": ids}, ["resid_pre", "attn_out", "mlp_out", "resid_post"], positions="all")
        worst = 0.0
        for layer in range(self.n_layers):
            total = sum(acts[s, layer].float() for s in ("resid_pre", "attn_out", "mlp_out"))
            target = acts["resid_post", layer].float()
            error = ((total - target).norm() / target.norm().clamp_min(1e-12)).item()
            worst = max(worst, error)
            if error > tolerance:
                raise HookError(
                    f"the block structure found for {self.family} does not add up at layer {layer} (relative error"
                    f" {error:.2g}); register it with emocircuits.models.register_structure"
                )
        return worst


_CACHE: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()
_STRUCTURES: dict[str, dict[str, str]] = {}


def register_structure(model_type: str, **roles: str) -> None:
    """Teach `resolve` child names of a new architecture, for example ``attention="mixer"``.

    Roles: blocks, attention, mlp, o_proj, down_proj, pre_mlp_norm, final_norm. Raises InputError otherwise.
    """
    allowed = ("blocks", "attention", "mlp", "o_proj", "down_proj", "pre_mlp_norm", "final_norm")
    for role in roles:
        if role not in allowed:
            raise unknown("role", role, allowed)
    _STRUCTURES[model_type] = dict(roles)
    _CACHE.clear()


def unwrap(model: Any) -> nn.Module:
    """The torch module to hook: inside torch.compile, nnsight, peft, a TransformerBridge, or a module as it is."""
    libraries = {parent.__module__.split(".")[0] for parent in type(model).__mro__}
    if "nnsight" in libraries:
        return unwrap(object.__getattribute__(model, "_module"))
    if hasattr(model, "_orig_mod"):
        return unwrap(model._orig_mod)
    if "peft" in libraries and hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning:
        return unwrap(model.get_base_model())  # carries the adapters itself, and is what generate() runs
    if "transformer_lens" in libraries and "original_model" in vars(model):
        return unwrap(model.original_model)  # the transformers model that a TransformerBridge put its parts into
    if isinstance(model, nn.Module):
        return model
    if hasattr(model, "model"):
        return unwrap(model.model)  # a Loaded
    raise InputError(f"expected a torch model, got {type(model).__name__}")


def resolve(model: Any) -> Anatomy:
    """Anatomy of a Hugging Face model, the text tower of an MLLM, or a TransformerLens model; cached per model.

    Raises InputError when no decoder can be recognised, listing what was found.
    """
    from .lens import is_lens, lens_anatomy

    module = unwrap(model)
    known = _CACHE.get(module)
    if known is None or known.hook_points != is_lens(module.get_submodule(known.blocks[0])):  # bridged in place since
        lens = any(map(is_lens, module.modules()))
        known = _CACHE[module] = lens_anatomy(module) if lens else _from_structure(module)
    return known


def child_named(module: nn.Module, names: tuple[str, ...], registered: str | None = None) -> str | None:
    for name in (registered,) if registered else names:
        if isinstance(getattr(module, name, None), nn.Module):
            return name
    return None


def _block_lists(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in model.named_modules():
        if any(word in path for word in NOT_TEXT):
            continue
        for name in names:
            blocks = getattr(module, name, None)
            has_embedding = any(isinstance(child, nn.Embedding) for child in module.children())
            if isinstance(blocks, nn.ModuleList) and len(blocks) and has_embedding:
                yield path, module, name


def text_config(config: Any) -> Any:
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return config


def _from_structure(model: nn.Module) -> Anatomy:
    config = text_config(getattr(model, "config", None))
    family = getattr(config, "model_type", type(model).__name__)
    roles = _STRUCTURES.get(family, {})
    found = list(_block_lists(model, (roles["blocks"],) if "blocks" in roles else BLOCK_LISTS))
    if not found:
        children = ", ".join(f"{n}: {type(m).__name__}" for n, m in model.named_children())
        raise InputError(
            f"no decoder with a list of blocks and a token embedding was found in {type(model).__name__} (children:"
            f" {children}); describe it with emocircuits.models.register_structure({family!r}, blocks=...)"
        )
    path, decoder, list_name = found[0]
    blocks = getattr(decoder, list_name)
    prefix = f"{path}." if path else ""
    reader = _BlockReader(roles, config, family)
    for layer, block in enumerate(blocks):
        reader.read(block, layer, f"{prefix}{list_name}.{layer}")
    final = child_named(decoder, FINAL_NORM, roles.get("final_norm"))
    if final is None:
        raise InputError(f"no final norm among {[n for n, _ in decoder.named_children()]} of {family}; register it")
    reader.points["final_norm", 0] = Point(f"{prefix}{final}")
    return reader.finish(path, len(blocks), f"{prefix}{final}", output_embeddings(model), decoder)


def output_embeddings(model: nn.Module) -> str | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return next((name for name, module in model.named_modules() if module is head), None) if head else None


class _BlockReader:
    """Collects the points of one model, block by block."""

    def __init__(self, roles: dict[str, str], config: Any, family: str) -> None:
        self.roles, self.config, self.family = roles, config, family
        self.points: dict[Key, Point] = {}
        self.missing: dict[str, str] = {}
        self.linear_out: dict[Key, str] = {}
        self.blocks: list[str] = []
        self.attention: list[str] = []
        self.structure = "pre-norm"
        self.shapes: dict[str, int] = {}

    def read(self, block: nn.Module, layer: int, path: str) -> None:
        self.blocks.append(path)
        attn = child_named(block, ATTENTION, self.roles.get("attention"))
        mlp = child_named(block, MLP, self.roles.get("mlp"))
        if mlp is None:
            names = [n for n, _ in block.named_children()]
            raise InputError(
                f"block {path} of {self.family} has no MLP that is recognised (children: {', '.join(names)});"
                f" name it with emocircuits.models.register_structure({self.family!r}, mlp=...)"
            )
        self.points["resid_pre", layer] = Point(path, "input")
        self.points["resid_post", layer] = Point(path, "output")
        self._residual(block, layer, path, attn, mlp)
        if hasattr(block, "altup"):
            for site in ("resid_pre", "resid_mid", "resid_post"):
                del self.points[site, layer]
                self.missing[site] = "its blocks pass on several residual streams (AltUp); use attn_out or mlp_out"
        if attn is None:
            self.attention.append("")
            for site in ("q", "k", "v", "z", "pattern", "attn_out"):
                self.missing[f"{site}.{layer}"] = "this block has no softmax attention"
            if mixer := child_named(block, OTHER_MIXERS):
                self.points["attn_out", layer] = Point(f"{path}.{mixer}")
        else:
            self.attention.append(f"{path}.{attn}")
            self._attention(getattr(block, attn), layer, f"{path}.{attn}")
        self._mlp(getattr(block, mlp), layer, f"{path}.{mlp}")

    def _residual(self, block: nn.Module, layer: int, path: str, attn: str | None, mlp: str) -> None:
        post_mlp = child_named(block, ("post_feedforward_layernorm",))
        pre_mlp = child_named(block, PRE_MLP_NORM, self.roles.get("pre_mlp_norm"))
        if post_mlp:  # the sublayer output passes a norm before it is added
            self.structure = "sandwich" if pre_mlp == "pre_feedforward_layernorm" else "post-norm"
            self.points["attn_out", layer] = Point(f"{path}.post_attention_layernorm")
            self.points["mlp_out", layer] = Point(f"{path}.{post_mlp}")
            reader = pre_mlp if self.structure == "sandwich" else mlp
            self.points["resid_mid", layer] = Point(f"{path}.{reader}", "input")
            return
        if attn:
            self.points["attn_out", layer] = Point(f"{path}.{attn}")
        self.points["mlp_out", layer] = Point(f"{path}.{mlp}")
        if getattr(block, "use_parallel_residual", False) or pre_mlp is None:
            self.structure = "parallel"
            self.missing["resid_mid"] = "attention and MLP read the same residual in parallel"
        else:
            self.points["resid_mid", layer] = Point(f"{path}.{pre_mlp}", "input")

    def _attention(self, attn: nn.Module, layer: int, path: str) -> None:
        name = child_named(attn, O_PROJ, self.roles.get("o_proj"))
        if name is None:
            self.missing[f"z.{layer}"] = "its attention has no output projection module"
            return
        o_proj = getattr(attn, name)
        width = features(o_proj)[0]
        n_heads = int(self.config.num_attention_heads)
        head_dim = width // n_heads
        self.points["z", layer] = Point(f"{path}.{name}", "input", heads=n_heads)
        self._qkv(attn, layer, path, n_heads, head_dim)
        self.shapes |= {"d_model": features(o_proj)[1], "n_heads": n_heads, "head_dim": head_dim}
        if self.structure == "pre-norm" and isinstance(o_proj, nn.Linear):
            self.linear_out["attn_out", layer] = f"{path}.{name}"

    def _qkv(self, attn: nn.Module, layer: int, path: str, n_heads: int, head_dim: int) -> None:
        kv_heads = n_heads
        fused_by_head = child_named(attn, ("query_key_value",))
        if getattr(attn, "is_kv_shared_layer", False):
            self.points["q", layer] = Point(f"{path}.q_proj", heads=n_heads)
            self.missing |= {f"{s}.{layer}": "it reads the keys and values of an earlier layer" for s in "kv"}
            return
        if all(hasattr(attn, f"{site}_proj") for site in "qkv"):
            kv_heads = features(attn.get_submodule("k_proj"))[1] // head_dim
            for site, heads in (("q", n_heads), ("k", kv_heads), ("v", kv_heads)):
                if features(attn.get_submodule(f"{site}_proj"))[1] == heads * head_dim:
                    self.points[site, layer] = Point(f"{path}.{site}_proj", heads=heads)
                else:
                    self.missing[f"{site}.{layer}"] = f"{site}_proj holds more than {heads} heads of width {head_dim}"
        elif fused_by_head and features(getattr(attn, fused_by_head))[1] == 3 * n_heads * head_dim:
            for index, site in enumerate("qkv"):
                self.points[site, layer] = Point(f"{path}.query_key_value", heads=n_heads, interleaved=(index, 3))
        elif fused := child_named(attn, ("qkv_proj", "c_attn", "Wqkv")):
            total, q_width = features(getattr(attn, fused))[1], n_heads * head_dim
            kv_width = (total - q_width) // 2
            kv_heads = kv_width // head_dim
            edges = {"q": (0, q_width), "k": (q_width, q_width + kv_width), "v": (q_width + kv_width, total)}
            for site, part in edges.items():
                heads = n_heads if site == "q" else kv_heads
                self.points[site, layer] = Point(f"{path}.{fused}", heads=heads, part=part)
        else:
            self.missing |= {site: "its query, key and value projections were not recognised" for site in "qkv"}
        self.shapes["n_kv_heads"] = kv_heads

    def _mlp(self, mlp: nn.Module, layer: int, path: str) -> None:
        name = child_named(mlp, DOWN_PROJ, self.roles.get("down_proj"))
        if name is None:
            self.missing[f"mlp_post.{layer}"] = (
                "its experts are one fused parameter without a down_proj module; use mlp_out instead"
                if hasattr(mlp, "experts")
                else "its MLP has no down projection that is recognised"
            )
            return
        down = getattr(mlp, name)
        self.points["mlp_post", layer] = Point(f"{path}.{name}", "input")
        self.shapes["d_mlp"] = features(down)[0]
        if self.structure in ("pre-norm", "parallel") and isinstance(down, nn.Linear):
            self.linear_out["mlp_out", layer] = self.linear_out["resid_post", layer] = f"{path}.{name}"

    def finish(self, path: str, n_layers: int, final_norm: str, lm_head: str | None, decoder: nn.Module) -> Anatomy:
        embedding = next(child for child in decoder.children() if isinstance(child, nn.Embedding))
        return Anatomy(
            family=self.family,
            structure=self.structure,
            n_layers=n_layers,
            d_model=self.shapes.get("d_model", embedding.embedding_dim),
            n_heads=self.shapes.get("n_heads", 0),
            n_kv_heads=self.shapes.get("n_kv_heads", 0),
            head_dim=self.shapes.get("head_dim", 0),
            d_mlp=self.shapes.get("d_mlp"),
            vocab_size=embedding.num_embeddings,
            decoder=path,
            blocks=tuple(self.blocks),
            attention=tuple(self.attention),
            final_norm=final_norm,
            lm_head=lm_head,
            points=self.points,
            missing=self.missing,
            linear_out=self.linear_out,
        )


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a Linear, a transformers Conv1D (weight [in, out]) or a quantised Linear."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight.shape[1])


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored as integers, or as a tensor subclass that only its own library can compute with."""
    return not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter)
