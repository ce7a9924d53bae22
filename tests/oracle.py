"""Brute force, written without the library: patched `forward` methods and the arithmetic of a block.

`read` gives every site of a model; `write` runs the model with one site changed. Both know the zoo's architectures
by their class attributes only, and replace methods instead of registering hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[str, int]
Change = Callable[[Tensor], Tensor]

# ---------------------------------------------------------------- structure


def decoder(model: Any) -> Any:
    """The module that owns both the input embedding and the blocks."""
    embedding = model.get_input_embeddings()
    owners = [m for m in model.modules() if any(child is embedding for child in m.children())]
    return next(m for m in owners if hasattr(m, "layers") or hasattr(m, "h"))


def blocks(model: Any) -> nn.ModuleList:
    found = decoder(model)
    return found.layers if hasattr(found, "layers") else found.h


def first(module: Any, *names: str) -> Any:
    """The first of these attributes that the module has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def attention(block: Any) -> Any:
    return first(block, "self_attn", "attn", "attention", "linear_attn")


def is_sandwich(block: Any) -> bool:
    return hasattr(block, "post_feedforward_layernorm")


def is_parallel(block: Any) -> bool:
    return bool(getattr(block, "use_parallel_residual", False))


def added(block: Any) -> dict[str, Any]:
    """The modules whose outputs are added to the residual stream."""
    if is_sandwich(block):
        return {"attn_out": block.post_attention_layernorm, "mlp_out": block.post_feedforward_layernorm}
    return {"attn_out": attention(block), "mlp_out": block.mlp}


def out_projection(block: Any) -> Any:
    return first(attention(block), "o_proj", "dense", "c_proj")


def down_projection(block: Any) -> Any:
    return None if hasattr(block.mlp, "experts") else first(block.mlp, "down_proj", "dense_4h_to_h", "c_proj")


def final_norm(model: Any) -> Any:
    return first(decoder(model), "norm", "final_layer_norm", "ln_f")


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def is_conv(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


def linear(module: Any, x: Tensor) -> Tensor:
    """The projection computed from its weights."""
    y = x @ (module.weight if is_conv(module) else module.weight.T)
    return y if module.bias is None else y + module.bias


# ---------------------------------------------------------------- patched methods


@contextmanager
def patched(module: Any, around: Callable[[Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
    """Inside the block, module.forward(*args) is around(original forward, args, kwargs)."""
    original = module.forward
    module.forward = lambda *args, **kwargs: around(original, args, kwargs)
    try:
        yield
    finally:
        del module.forward


def hidden(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def changed_output(change: Change) -> Callable[[Callable[..., Any], tuple, dict], Any]:
    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        out = forward(*args, **kwargs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return around


def changed_input(change: Change) -> Callable[[Callable[..., Any], tuple, dict], Any]:
    def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if args:
            return forward(change(args[0]), *args[1:], **kwargs)
        return forward(**{**kwargs, "hidden_states": change(kwargs["hidden_states"])})

    return around


class Seen:
    """First argument and output of modules, by id, during the block of `watching`."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Any] = {}

    def around(self, module: Any) -> Callable[[Callable[..., Any], tuple, dict], Any]:
        def around(forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            self.inputs[id(module)] = (args[0] if args else kwargs["hidden_states"]).clone()
            self.outputs[id(module)] = forward(*args, **kwargs)
            return self.outputs[id(module)]

        return around


# ---------------------------------------------------------------- reading


@torch.no_grad()
def read(model: Any, inputs: dict[str, Any]) -> dict[Key, Tensor]:
    """Every defined site of every layer [B, T, ...], with eager attention for the patterns."""
    seen, config, found = Seen(), text_config(model), dict[Key, Tensor]()
    before, config._attn_implementation = config._attn_implementation, "eager"
    with ExitStack() as stack:
        for block in blocks(model):
            for module in (block, attention(block), block.mlp, *added(block).values()):
                if "forward" not in vars(module):
                    stack.enter_context(patched(module, seen.around(module)))
        stack.enter_context(patched(final_norm(model), seen.around(final_norm(model))))
        model(**inputs)
    config._attn_implementation = before
    for layer, block in enumerate(blocks(model)):
        for site, value in _block_sites(block, seen, config).items():
            found[site, layer] = value
    found["final_norm", 0] = seen.outputs[id(final_norm(model))]
    return found


def _block_sites(block: Any, seen: Seen, config: Any) -> dict[str, Tensor]:
    attn = attention(block)
    made = {site: hidden(seen.outputs[id(module)]) for site, module in added(block).items()}
    made |= {"resid_pre": seen.inputs[id(block)], "resid_post": hidden(seen.outputs[id(block)])}
    if not hasattr(block, "linear_attn"):
        made |= _attention_sites(attn, seen, config)
    if not is_parallel(block):
        made["resid_mid"] = made["resid_pre"] + made["attn_out"]
    if down_projection(block) is not None:
        made["mlp_post"] = neurons(block.mlp, seen.inputs[id(block.mlp)])
    return made


def _attention_sites(attn: Any, seen: Seen, config: Any) -> dict[str, Tensor]:
    x = seen.inputs[id(attn)]
    made = dict(zip("qkv", queries_keys_values(attn, x, config)))
    made["pattern"] = seen.outputs[id(attn)][1]
    groups = config.num_attention_heads // made["v"].shape[2]
    made["z"] = torch.einsum("bhqk,bkhd->bqhd", made["pattern"], made["v"].repeat_interleave(groups, dim=2))
    if hasattr(attn, "q_proj") and made["q"].shape[2] == 2 * config.num_attention_heads:
        gate = linear(attn.q_proj, x).unflatten(-1, (config.num_attention_heads, 2, -1))[..., 1, :]
        made["z"] = made["z"] * gate.sigmoid()  # its queries come with a gate, so q is no site
        del made["q"]
    return made


def queries_keys_values(attn: Any, x: Tensor, config: Any) -> tuple[Tensor, ...]:
    """q, k, v [B, T, heads, head_dim] from the weights of the projections."""
    heads = config.num_attention_heads
    if hasattr(attn, "q_proj"):
        parts: Any = [linear(m, x) for m in (attn.q_proj, attn.k_proj, attn.v_proj)]
        width = parts[1].shape[-1] // config.num_key_value_heads
        return tuple(p.unflatten(-1, (-1, width)) for p in parts)
    if hasattr(attn, "query_key_value"):
        return linear(attn.query_key_value, x).unflatten(-1, (heads, 3, -1)).unbind(-2)
    fused = linear(first(attn, "qkv_proj", "c_attn"), x)
    width = config.hidden_size // heads
    kv_heads = (fused.shape[-1] // width - heads) // 2
    return fused.unflatten(-1, (-1, width)).split([heads, kv_heads, kv_heads], dim=-2)


def neurons(mlp: Any, x: Tensor) -> Tensor:
    """What enters the down projection, from the weights of the MLP."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = linear(mlp.gate_up_proj, x).chunk(2, dim=-1)
        return up * first(mlp, "activation_fn", "act_fn")(gate)
    if hasattr(mlp, "gate_proj"):
        return mlp.act_fn(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x)
    return mlp.act(linear(first(mlp, "dense_h_to_4h", "c_fc"), x))


# ---------------------------------------------------------------- writing


@contextmanager
def writing(model: Any, site: str, layer: int, change: Change) -> Iterator[None]:
    """Inside the block, the site's tensor (heads split, where it has heads) is what `change` makes of it."""
    block = blocks(model)[layer]
    with ExitStack() as stack:
        for module, around in _patches(model, block, site, change):
            stack.enter_context(patched(module, around))
        yield


def write(model: Any, inputs: dict[str, Any], site: str, layer: int, change: Change) -> Tensor:
    """Logits of the model with one site changed."""
    with torch.no_grad(), writing(model, site, layer, change):
        return model(**inputs).logits


def _patches(model: Any, block: Any, site: str, change: Change) -> list[tuple[Any, Any]]:
    attn, heads = attention(block), text_config(model).num_attention_heads
    if site in ("resid_pre", "resid_post"):
        return [(block, (changed_input if site == "resid_pre" else changed_output)(change))]
    if site in ("attn_out", "mlp_out"):
        return [(added(block)[site], changed_output(change))]
    if site == "final_norm":
        return [(final_norm(model), changed_output(change))]
    if site == "resid_mid":  # what attention adds becomes the changed stream minus the stream before
        entered: list[Tensor] = []
        keep = changed_input(lambda x: (entered.clear(), entered.append(x), x)[2])
        return [
            (block, keep),
            (added(block)["attn_out"], changed_output(lambda x: change(entered[0] + x) - entered[0])),
        ]  # noqa: E501
    if site == "mlp_post":
        return [(down_projection(block), changed_input(change))]
    if site == "z":
        return [(out_projection(block), changed_input(lambda x: change(x.unflatten(-1, (heads, -1))).flatten(-2)))]
    return [_qkv_patch(attn, site, heads, text_config(model).hidden_size, change)]


def _qkv_patch(attn: Any, site: str, heads: int, hidden_size: int, change: Change) -> tuple[Any, Any]:
    index = "qkv".index(site)
    if hasattr(attn, "q_proj"):
        width = attn.q_proj.weight.shape[0] // heads
        module = (attn.q_proj, attn.k_proj, attn.v_proj)[index]
        return module, changed_output(lambda x: change(x.unflatten(-1, (-1, width))).flatten(-2))
    if hasattr(attn, "query_key_value"):

        def by_head(x: Tensor) -> Tensor:
            parts = list(x.unflatten(-1, (heads, 3, -1)).unbind(-2))
            parts[index] = change(parts[index])
            return torch.stack(parts, dim=-2).flatten(-3)

        return attn.query_key_value, changed_output(by_head)

    def by_part(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (-1, hidden_size // heads))
        kv_heads = (split.shape[-2] - heads) // 2
        parts = list(split.split([heads, kv_heads, kv_heads], dim=-2))
        parts[index] = change(parts[index])
        return torch.cat(parts, dim=-2).flatten(-2)

    return first(attn, "qkv_proj", "c_attn"), changed_output(by_part)


# ---------------------------------------------------------------- traces


def traces(model: Any) -> dict[str, Any]:
    """Everything a tool could leave behind on a model; equal dicts mean that nothing did."""
    return {
        "hooks": [
            tuple(map(id, (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))) for m in model.modules()
        ],  # noqa: E501
        "parameters": {name: (id(p), p._version) for name, p in model.named_parameters()},
        "methods": [name for m in model.modules() for name in ("forward", "generate") if name in vars(m)],
        "attention": text_config(model)._attn_implementation,
        "training": model.training,
    }
