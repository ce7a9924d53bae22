"""Start a forward pass in its middle: from the residual entering a layer, with the attention there already decided.

A sweep over the heads of a layer changes one attention output many times. Everything before it is the same in every
pass, so it is computed once: earlier blocks hand on a stored residual, and the layer's attention hands on the output
it is given. The model's own code runs everything after, so masks, positions and norms are the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookError
from ..models.anatomy import child_named, resolve, unwrap
from . import forward as fw
from .capture import adapt_inputs, as_inputs, capture, moved

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


class Checkpoint:
    """One clean forward pass of a batch, from which `resume` starts anywhere.

    resid_pre [L][B, T, d] and attention [L][B, T, d] (each attention module's own output) are kept on the model's
    device. With `cached`, only the last column is kept and the earlier ones live in a KV cache: then an intervention
    can touch the last position only, and a pass costs one token per row. Rows must end at the same column (pad left).
    Raises HookError for a model without softmax attention modules in every layer.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any] | Tensor, *, cached: bool = False) -> None:
        self.module = unwrap(model)
        self.anatomy = resolve(self.module)
        if not all(self.anatomy.attention):
            layer = self.anatomy.attention.index("")
            raise HookError(f"layer {layer} of this {self.anatomy.family} model has no attention module to restart at")
        self.inputs = moved(self.module, adapt_inputs(self.module, as_inputs(inputs)))
        self.cached = cached
        self.resid_pre: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.z: list[Tensor] = []
        self._attention_form: list[int | None] = []
        self._block_form: list[int | None] = []
        self._prefix: Any = None
        with torch.no_grad():
            if cached:
                self._fill_prefix()
            self._record()

    @property
    def batch(self) -> int:
        return self.resid_pre[0].shape[0]

    def _fill_prefix(self) -> None:
        from transformers import DynamicCache

        ids, mask = self.inputs["input_ids"], self.inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise HookError("restarting at the last position needs rows that end in the same column; pad left")
        mask = torch.ones_like(ids) if mask is None else mask
        cache = DynamicCache()
        tokens = {"input_ids": ids}
        if "position_ids" in self.inputs:
            tokens["position_ids"] = self.inputs["position_ids"]
        before = {name: x[:, :-1] for name, x in tokens.items()} | {"attention_mask": mask[:, :-1]}
        before |= {"past_key_values": cache, "use_cache": True}
        capture(self.module, before, "resid_post", -1, positions="last")
        self._prefix = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]
        self.inputs = {name: x[:, -1:] for name, x in tokens.items()} | {"attention_mask": mask}

    def _record(self) -> None:
        with ExitStack() as stack:
            for path, forms, values in (
                *((p, self._attention_form, self.attention) for p in self.anatomy.attention),
                *((p, self._block_form, None) for p in self.anatomy.blocks),
            ):
                hook = self.module.get_submodule(path).register_forward_hook(_keep(forms, values))
                stack.callback(hook.remove)
            wanted = {"resid_pre": "all", "z": "all", "resid_post": -1}  # the last: let every attention return
            found = capture(self.module, self.rows(None), wanted, positions="all")
        layers = range(self.anatomy.n_layers)
        self.resid_pre = [found["resid_pre", layer] for layer in layers]
        self.z = [found["z", layer] for layer in layers]

    def rows(self, source: Tensor | None) -> dict[str, Any]:
        """Inputs of rows `source` [R] (None: all rows). Make them once for a sweep: copying the prefix costs most."""
        kept = {k: v if source is None or not isinstance(v, Tensor) else v[source] for k, v in self.inputs.items()}
        if self._prefix is not None:
            kept |= {"past_key_values": _shared(self._prefix, source), "use_cache": True}
        return kept

    def read(self, site: str, layer: int) -> Tensor:
        """`site` at the last position of the clean rows [B, width]."""
        return next(iter(capture(self.module, self.rows(None), site, layer).values()))

    def resume(
        self, layer: int, attention: Tensor, source: Tensor, site: str, at: int, inputs: dict[str, Any] | None = None
    ) -> Tensor:
        """`site` at layer `at`, last position [R, width], when layer `layer`'s attention module returns `attention`.

        attention: [R, T, d] for rows that continue the clean rows `source` [R]. Work that cannot reach the last
        position is left out: the MLP of the last block runs at that position only.
        """
        given = self.rows(source) if inputs is None else inputs
        with ExitStack() as stack:
            for i, path in enumerate(self.anatomy.blocks[:layer]):
                stack.enter_context(_handing_on(self.module.get_submodule(path), self._block_form[i]))
            block = self.module.get_submodule(self.anatomy.blocks[layer])
            resid = self.resid_pre[layer][source]
            stack.callback(fw.hook_point(block, "input", lambda _: resid).remove)
            module = self.module.get_submodule(self.anatomy.attention[layer])
            stack.enter_context(_returning(module, self._attention_form[layer], attention))
            last = self.anatomy.n_layers - 1 if site == "final_norm" else at
            if not self.cached and site != "mlp_post":
                stack.enter_context(self._last_only(last, given))
            return next(iter(capture(self.module, given, site, at).values()))

    def sweep(self, entering: Mapping[int, tuple[Tensor, Tensor]], site: str, at: int) -> Tensor:
        """`site` at layer `at`, last position, of rows that leave the clean pass at different layers, in one pass.

        entering: {layer: (source [n], attention [n, 1, d])} as for `resume`, by ascending layer; result [sum of n,
        width]. A row joins at its layer, so every block runs once, on all rows that have left by then. Only `cached`.
        """
        if not self.cached:
            raise HookError("a sweep over layers restarts at the last position; make the Checkpoint with cached=True")
        source = torch.cat([s for s, _ in entering.values()])
        joined = [sum(len(s) for at_, (s, _) in entering.items() if at_ <= i) for i in range(self.anatomy.n_layers)]
        inputs = {k: v[source] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        inputs |= {"past_key_values": _shared(self._prefix, [source[:n] for n in joined]), "use_cache": True}
        with ExitStack() as stack:
            for i, path in enumerate(self.anatomy.blocks):
                block = self.module.get_submodule(path)
                if not joined[i]:
                    stack.enter_context(_handing_on(block, self._block_form[i]))
                    continue
                stack.enter_context(_forward_replaced(block, self._widening(block, i, joined, source)))
                if i in entering:
                    module = self.module.get_submodule(self.anatomy.attention[i])
                    given = entering[i][1]
                    stack.callback(fw.hook_point(module, "output", _with_last_rows(given)).remove)
            return next(iter(capture(self.module, inputs, site, at).values()))

    def _widening(self, block: nn.Module, i: int, joined: Sequence[int], source: Tensor) -> Any:
        """The block's forward on the rows that have joined by layer i; the others enter the next layer clean."""
        real, n, total = type(block).forward, joined[i], len(source)
        first = i == 0 or not joined[i - 1]

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = self.resid_pre[i][source[:n]] if first else hidden[:n]
            new = fw.hidden_of(real(block, hidden, *_rows_of(args, n, total), **_rows_of(kwargs, n, total)))
            if n < total:
                new = torch.cat([new, self.resid_pre[i + 1][source[n:]]])
            return _shaped(self._block_form[i], new)

        return forward

    @contextmanager
    def _last_only(self, layer: int, inputs: dict[str, Any]) -> Iterator[None]:
        """The MLP of `layer` computes the last real position of each row; the others are read by nobody."""
        path = self.anatomy.blocks[layer]
        block = self.module.get_submodule(path)
        name = child_named(block, MLP_NAMES)
        if name is None:
            yield
            return
        mask = inputs.get("attention_mask")
        mlp = block.get_submodule(name)
        real = type(mlp).forward

        def trimmed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.dim() != 3:
                return real(mlp, x, *args, **kwargs)
            index = fw.last_real(mask, x)[:, None, None].expand(-1, 1, x.shape[-1])
            out = real(mlp, x.gather(1, index), *args, **kwargs)
            if not isinstance(out, Tensor):
                return real(mlp, x, *args, **kwargs)
            return torch.zeros_like(x).scatter_(1, index, out)

        with _forward_replaced(mlp, trimmed):
            yield


def _keep(forms: list[int | None], values: list[Tensor] | None) -> Any:
    def hook(_: nn.Module, __: tuple, output: Any) -> None:
        forms.append(len(output) if isinstance(output, tuple) else None)
        if values is not None:
            values.append(fw.hidden_of(output).detach())

    return hook


def _shaped(form: int | None, hidden: Tensor) -> Any:
    """`hidden` as the module returned it: alone, or first of a tuple whose other members nobody needs here."""
    return hidden if form is None else (hidden, *(None,) * (form - 1))


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


def _handing_on(block: nn.Module, form: int | None) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _shaped(form, args[0] if args else kwargs["hidden_states"])

    return _forward_replaced(block, forward)


def _returning(module: nn.Module, form: int | None, hidden: Tensor) -> Any:
    return _forward_replaced(module, lambda *_, **__: _shaped(form, hidden))


def _with_last_rows(given: Tensor) -> Any:
    """A hook that replaces the last len(given) rows of a module's output."""

    def replace(x: Tensor) -> Tensor:
        return torch.cat([x[: len(x) - len(given)], given.to(x.dtype)])

    return replace


def _rows_of(value: Any, n: int, total: int) -> Any:
    """The first n of `total` rows of every tensor in a block's arguments that has so many."""
    if isinstance(value, Tensor):
        return value[:n] if value.dim() and value.shape[0] == total else value
    if type(value) in (tuple, list):
        return type(value)(_rows_of(v, n, total) for v in value)
    return {k: _rows_of(v, n, total) for k, v in value.items()} if type(value) is dict else value


def _shared(prefix: list[tuple[Tensor, Tensor]], source: Tensor | Sequence[Tensor] | None) -> Any:
    """A KV cache holding the prefix of each row, with one free slot that every pass writes again.

    source: the rows, for all layers or for each; None: all rows.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = source if isinstance(source, Sequence) else [source] * len(prefix)
    cache.layers = [_slot(*((k, v) if r is None else (k[r], v[r]))) for (k, v), r in zip(prefix, rows)]
    return cache


def _slot(keys: Tensor, values: Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    class Slot(DynamicLayer):
        """Keys and values of a prefix and of one more token; nothing is copied when that token changes."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states  # type: ignore[index]
            return self.keys, self.values  # type: ignore[return-value]

        def get_seq_length(self, *_: Any) -> int:
            return self.keys.shape[-2] - 1  # type: ignore[union-attr]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
            return self.keys.shape[-2], 0  # type: ignore[union-attr]

    slot = Slot()
    slot.keys, slot.values = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
    slot.is_initialized, slot.dtype, slot.device = True, keys.dtype, keys.device
    return slot


@torch.no_grad()
def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """[N, vocabulary] what the model's own forward makes of final hidden states [N, d_model] (after the final norm).

    The decoder hands on `hidden` instead of computing, so head, scale and soft cap are the model's. Raises HookError
    for a model without LM head.
    """
    module, anatomy = unwrap(model), resolve(model)
    if anatomy.lm_head is None or not anatomy.decoder:
        raise HookError("this model has no LM head, so there are no logits to compute")
    given = _decoded(hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=next(module.parameters()).device)
    with _forward_replaced(module.get_submodule(anatomy.decoder), lambda *_, **__: given):
        return module(input_ids=ids).logits[0]


def _decoded(hidden: Tensor) -> Any:
    """A decoder's output that holds hidden states only: whatever else a model looks for in it is None."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Decoded(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Decoded(last_hidden_state=hidden)  # type: ignore[arg-type]
