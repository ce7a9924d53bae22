"""What is known about the forward pass in progress: padding, cache length, positions. Shared by capture and edit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident, local
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import HookError, InputError, unknown
from ..models.anatomy import Anatomy
from .watch import GenerateWatch, Prompt

TOKEN_NAMES = ("input_ids", "inputs_embeds", "resid_pre")  # the last: a TransformerLens block

Span: TypeAlias = tuple[int, int]
Positions: TypeAlias = "str | int | Sequence[int] | Sequence[Span] | Sequence[Sequence[Span]] | Tensor"


@dataclass
class Forward:
    """One forward pass: `length` new columns after `past` cached ones; `mask` is True on real tokens."""

    batch: int
    length: int
    past: int
    mask: Tensor | None
    """[B, past + length] bool, or None when no token is padding."""
    prompt_length: int
    """Columns that belong to the prompt; later ones were generated."""
    repeats: int = 1
    """Consecutive rows of this pass that are one row of the batch generate() was given (beams, return sequences)."""
    ids: Tensor | None = None
    """[B, length] token ids of this pass, None when the model was given embeddings only."""
    beams: int = 1
    prompt_ids: Tensor | None = None
    """[rows, columns] what generate() was given, None outside it."""
    call: int = 0
    """Which generate() this pass belongs to; 0 outside."""

    @property
    def is_prompt(self) -> bool:
        return self.past < self.prompt_length

    def real(self, device: torch.device) -> Tensor:
        """[B, length] True on real tokens of this pass."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=device)
        return self.mask[:, -self.length :].to(device)

    def index(self, device: torch.device) -> Tensor:
        """[B, length] position of each column among the real tokens of its row, counted from the row's start."""
        if self.mask is None:
            return torch.arange(self.past, self.past + self.length, device=device).expand(self.batch, -1)
        return (self.mask.to(device).long().cumsum(-1) - 1)[:, -self.length :]

    def columns(self, device: torch.device) -> Tensor:
        return torch.arange(self.past, self.past + self.length, device=device)

    def last(self, device: torch.device) -> Tensor:
        """[B] column of the last real token in this pass."""
        if self.mask is None:
            return torch.full((self.batch,), self.length - 1, device=device)
        real = self.real(device)
        return torch.where(real, torch.arange(self.length, device=device), -1).max(-1).values.clamp_min(0)


outside_compiled: Any = torch.compiler.disable
"""What knows threads must run outside compiled code, where dynamo would take one thread's state for a constant."""


class _Seen(local):
    """What one thread's passes have shown so far; threads that share a model must not read each other's."""

    def __init__(self) -> None:
        self.current: Forward | None = None
        self.outer_mask: Any = None
        self.outer_ids: Any = None
        self.prompt_mask: Tensor | None = None
        self.calls: list[tuple[int, Prompt | None]] = []
        self.n_calls = 0
        self.previous: tuple[Tensor | None, int, int] | None = None


class ForwardTracker:
    """Keeps `current` up to date, for each thread, through pre-hooks on the model and on its decoder."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, thread: int | None = None) -> None:
        """thread: follow only the passes that this thread runs (see `activations.ownership`)."""
        self.model, self.decoder, self.thread = model, model.get_submodule(anatomy.decoder), thread
        self.count = 0
        self._seen = _Seen()
        self._signatures = {id(m): _positional_names(m) for m in (self.model, self.decoder)}

    @property
    def current(self) -> Forward | None:
        """The pass that this thread is running."""
        return self._seen.current

    def install(self) -> list[Any]:
        handles: list[Any] = [self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if self.model is not self.decoder:
            handles.insert(0, self.model.register_forward_pre_hook(self._outer, with_kwargs=True))
        return [*handles, GenerateWatch(self.model, self)]

    @property
    def elsewhere(self) -> bool:
        """Whether the pass in progress belongs to a thread that is not followed."""
        return self.thread is not None and self.thread != get_ident()

    def begin(self, prompt: Prompt | None) -> None:
        """A generate() starts on this prompt (None: it was given none)."""
        if self.elsewhere:
            return
        self._seen.n_calls += 1
        self._seen.calls.append((self._seen.n_calls, prompt))
        self._seen.previous = None

    def end(self) -> None:
        """The innermost generate() is over."""
        if self.elsewhere:
            return
        self._seen.calls.pop()
        self._seen.previous = None

    def _named(self, module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
        return dict(zip(self._signatures[id(module)], args)) | kwargs

    @outside_compiled
    def _outer(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        # Without kwargs: torch lost track of this hook, because another thread removes it just now.
        if self.elsewhere or kwargs is None:
            return
        named = self._named(module, args, kwargs)
        self._seen.outer_mask, self._seen.outer_ids = named.get("attention_mask"), named.get("input_ids")

    @outside_compiled
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if self.elsewhere or kwargs is None:
            return
        seen = self._seen
        named = self._named(module, args, kwargs)
        tokens = next((named[k] for k in TOKEN_NAMES if named.get(k) is not None), None)
        if tokens is None:
            raise HookError("the decoder was called without input_ids or inputs_embeds, so positions are unknown")
        batch, length, past = tokens.shape[0], tokens.shape[1], _cached_length(named)
        mask = self._key_mask((seen.outer_mask, named.get("attention_mask")), batch, past, length)
        number, call = seen.calls[-1] if seen.calls else (0, None)
        repeats = batch // call.rows if call is not None and batch % call.rows == 0 else 1
        prompt = self._guess_prompt(tokens, past, length) if call is None else call.columns
        ids = next((i for i in (named.get("input_ids"), seen.outer_ids) if isinstance(i, Tensor)), None)
        ids = ids if ids is not None and ids.shape == (batch, length) else None
        beams, given = (1, None) if call is None else (call.beams, call.ids)
        seen.current = Forward(batch, length, past, mask, prompt, repeats, ids, beams, given, number)
        self.count += 1
        seen.outer_mask = seen.outer_ids = None

    def _key_mask(self, masks: tuple[Any, Any], batch: int, past: int, length: int) -> Tensor | None:
        """[B, past + length] True on real tokens, from the first mask that says it.

        4-d masks of later passes hide what a sliding window has left behind, so there the prompt's padding is kept.
        """
        end = past + length
        plain = [m for m in masks if isinstance(m, Tensor) and m.dim() == 2 and m.shape[-1] >= end]
        full = [m for m in map(_attended, masks) if m is not None]
        if plain:
            mask: Tensor | None = plain[0][:, :end].bool()
        elif full and past and self._seen.prompt_mask is not None and len(self._seen.prompt_mask) == batch:
            mask = nn.functional.pad(self._seen.prompt_mask, (0, end - self._seen.prompt_mask.shape[1]), value=True)
        else:
            mask = next((m[:, :end] for m in full if m.shape[-1] >= end), None)
        if mask is not None and len(mask) != batch:  # one mask for every row
            mask = mask.expand(batch, -1)
        if not past:
            self._seen.prompt_mask = mask
        return mask

    def _guess_prompt(self, tokens: Tensor, past: int, length: int) -> int:
        """Columns of the prompt in a loop of the user's own: what its first pass held.

        Without a KV cache, a pass continues the last one when it is one column longer and has the same prompt.
        """
        previous = self._seen.previous
        if past:
            prompt = min(previous[1], past) if previous else past + length
            self._seen.previous = (None, prompt, past + length)
            return prompt
        if previous and previous[0] is not None and length == previous[2] + 1 and _starts_with(tokens, previous[0]):
            prompt = previous[1]
        else:
            prompt = length
        self._seen.previous = (tokens[:, :prompt].detach(), prompt, length)
        return prompt


def _starts_with(tokens: Tensor, prompt: Tensor) -> bool:
    head = tokens[:, : prompt.shape[1]]
    return head.shape == prompt.shape and head.dtype == prompt.dtype and torch.equal(head, prompt)


def _positional_names(module: nn.Module) -> list[str]:
    """Of the class, because libraries put wrappers with other signatures on the instance."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return [name for name in names if name not in ("args", "kwargs")]


def _cached_length(named: dict[str, Any]) -> int:
    """Tokens already in the KV cache (transformers' caches, or one block's entry in TransformerLens)."""
    cache, entry = named.get("past_key_values"), named.get("past_kv_cache_entry")
    if entry is not None:
        return int(entry.past_keys.shape[1])
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def _attended(mask: Any) -> Tensor | None:
    """[B, S] True on keys that some query sees, from a 4-d mask or transformers' dict of masks; else None."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, 0].bool().any(1)


def last_real(mask: Tensor | None, like: Tensor) -> Tensor:
    """[B] column of the last real token of each row of `like` [B, T, ...]; mask [B, T] or None."""
    columns = torch.arange(like.shape[1], device=like.device).expand(like.shape[:2])
    return (columns if mask is None else torch.where(mask.to(like.device).bool(), columns, -1)).max(-1).values


def hidden_of(value: Any) -> Tensor:
    """The hidden-state tensor of a module's output: itself, or the first of a tuple (never row 0 of a batch)."""
    return value if isinstance(value, Tensor) else value[0]


def replace_hidden(value: Any, new: Tensor) -> Any:
    """The module's output with its hidden-state tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if type(value) is tuple:
        return (new, *value[1:])
    value[0] = new
    return value


def input_of(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def replace_input(args: tuple, kwargs: dict, new: Tensor) -> tuple[tuple, dict]:
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def hook_point(module: nn.Module, io: str, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Register `fn` on a module's input or output tensor; a returned tensor replaces it, None leaves it."""
    if io == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
            if kwargs is None:  # torch lost track of this hook, because another thread removes it just now
                return None
            new = fn(input_of(args, kwargs))
            return None if new is None else replace_input(args, kwargs, new)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple, output: Any) -> Any:
        new = fn(hidden_of(output))
        return None if new is None else replace_hidden(output, new)

    return module.register_forward_hook(after)


def position_weights(positions: Positions, forward: Forward, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Columns to read, as (columns [B, P], valid [B, P], squeeze), for "last", "all", an int, a list or a tensor.

    Integers are positions among the real tokens of each row (negative from its end). Raises InputError when a
    row is too short, naming the row.
    """
    if isinstance(positions, str):
        if positions == "all":
            columns = torch.arange(forward.length, device=device).expand(forward.batch, -1)
            return columns, forward.real(device), False
        if positions == "last":
            columns = forward.last(device)[:, None]
            return columns, torch.ones_like(columns, dtype=torch.bool), True
        raise InputError(f"unknown positions {positions!r}; choose from 'last', 'all', integers or (start, stop) spans")
    wanted = torch.as_tensor(positions, device=device)
    if wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise InputError(f"positions must be whole numbers, got {wanted.dtype}; give indices, not a mask")
    squeeze = wanted.dim() == 0
    wanted = wanted.reshape(1, -1).expand(forward.batch, -1) if wanted.dim() < 2 else wanted
    if wanted.shape[0] != forward.batch:
        raise InputError(f"positions are given for {wanted.shape[0]} rows, but the batch has {forward.batch}")
    real = forward.real(device)
    count = real.sum(-1, keepdim=True)
    short = ((wanted >= count) | (wanted < -count)).any(-1).nonzero().flatten()
    if len(short):
        row = int(short[0])
        raise InputError(f"row {row} has {int(count[row])} tokens, too few for position(s) {wanted[row].tolist()}")
    order = torch.argsort((~real).to(torch.int8), dim=-1, stable=True)  # real columns first, in order
    return order.gather(1, wanted % count), torch.ones_like(wanted, dtype=torch.bool), squeeze


def is_spans(positions: Positions) -> bool:
    """Whether positions are (start, stop) spans: one tuple per row, or a list of tuples per row."""
    if isinstance(positions, (str, Tensor)) or not isinstance(positions, Sequence) or not len(positions):
        return False
    first = positions[0]
    if isinstance(first, tuple):
        return True
    return isinstance(first, Sequence) and bool(len(first)) and isinstance(first[0], tuple)


def span_weights(spans: Sequence[Any], forward: Forward, device: torch.device) -> tuple[Tensor, bool]:
    """Averaging weights [B, S, T] of each row's spans (positions among real tokens), and whether S is one per row.

    Rows with fewer spans get NaN weights, read back as NaN. Raises InputError for empty or too long spans.
    """
    single = isinstance(spans[0], tuple)
    rows = [[s] if single else list(s) for s in spans]
    if len(rows) != forward.batch:
        raise InputError(f"spans are given for {len(rows)} rows, but the batch has {forward.batch}")
    index, real = forward.index(device), forward.real(device)
    weights = torch.full((forward.batch, max(map(len, rows)), forward.length), torch.nan, device=device)
    stops = (index * real).max(-1).values + 1
    starts = stops - real.sum(-1)
    for row, row_spans in enumerate(rows):
        first, end = int(starts[row]), int(stops[row])
        for slot, (start, stop) in enumerate(row_spans):
            if not first <= start < stop <= end:
                raise InputError(f"span ({start}, {stop}) of row {row} is empty or outside its tokens {first} to {end}")
            inside = (index[row] >= start) & (index[row] < stop) & real[row]
            weights[row, slot] = inside / inside.sum()
    return weights, single


@dataclass(frozen=True)
class Plan:
    """What to keep of [B, T, ...]: `columns` [B, P] of each row, or means by `weights` [B, S, T], or everything."""

    valid: Tensor
    columns: Tensor | None = None
    weights: Tensor | None = None
    squeeze: bool = False
    """Whether the dimension of positions (or spans) has length one and is dropped."""

    def select(self, x: Tensor) -> Tensor:
        """The wanted positions of x [B, T, ...], or their means."""
        return select(x, self.columns, self.weights, self.squeeze)


def plan(positions: Positions, reduce: str | None, forward: Forward, device: torch.device) -> Plan:
    """How to read `positions` of one forward pass. Raises InputError for positions its rows do not have."""
    if reduce not in (None, "mean"):
        raise unknown("reduction", reduce, ("mean", "None"))
    if is_spans(positions):
        if reduce is None:
            raise InputError("spans need reduce='mean'; to keep every token, read positions='all' and slice")
        weights, single = span_weights(positions, forward, device)  # type: ignore[arg-type]
        return Plan(weights.sum(-1) > 0, weights=weights, squeeze=single)
    columns, valid, squeeze = position_weights(positions, forward, device)
    if reduce == "mean":
        chosen = nn.functional.one_hot(columns, forward.length) * valid[..., None]
        return Plan(valid, weights=chosen.sum(1, keepdim=True) / valid.sum(-1)[:, None, None], squeeze=True)
    if isinstance(positions, str) and positions == "all":
        return Plan(valid)
    return Plan(valid, columns=columns, squeeze=squeeze)


def is_finite(site: str, value: Tensor, valid: Tensor | None) -> Tensor:
    """Whether values are finite wherever they are defined (padding and absent spans are not), as a 0-d tensor."""
    finite = torch.isfinite(value)
    if site != "pattern" and valid is not None and value.dim() > 2 and value.shape[:2] == valid.shape:
        finite = finite.flatten(2).all(-1) | ~valid.to(value.device)
    return finite.all()


def select(x: Tensor, columns: Tensor | None, weights: Tensor | None, squeeze: bool) -> Tensor:
    """`Plan.select` as a function of tensors only, because it also travels to remote servers as source."""
    if weights is not None:
        wide = torch.promote_types(x.dtype, weights.dtype)  # 1/n is not exact in half precision
        kept = torch.einsum("bst,bt...->bs...", weights.to(x.device, wide), x.to(wide)).to(x.dtype)
    elif columns is not None:
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        kept = x[rows, columns.to(x.device)]
    else:
        return x
    return kept[:, 0] if squeeze else kept
