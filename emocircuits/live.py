"""For a person at the keyboard: text as it is written, what each of its tokens carries, and when a unit is active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations import batches, capture
from .circuits.readout import direct_logits
from .circuits.sublayers import attention_side, head_writes, mlp_side
from .data.prompts import encode_prompt
from .directions import DirectionSet
from .errors import InputError, unknown
from .generation import Decoding, _check_room, _generate_batch, context_length, end_tokens
from .models.anatomy import resolve, unwrap
from .reading import pad
from .serving.text import TextStream
from .steering import Steerer

UNITS = ("heads", "neurons")
Prompt = str | Sequence[dict[str, str]]
MAX_TOKENS = 1024
"""The longest text that is read: the logits of all its tokens are held at once."""


# ------------------------------------------------------------------------------------------------------- writing


def write(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    steerers: Sequence[Steerer | None],
    on_text: Callable[[int, str], None] = lambda _row, _text: None,
    *,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> list[str]:
    """Continue a prompt (text or chat messages) under each steerer at once (None: unsteered); returns the new texts.

    on_text(row, text so far) is called as tokens come, in the calling thread: what it raises stops the writing, and the
    model is clean again. All rows draw from the same random numbers, so that equal steerers write equal texts. Raises
    InputError for an empty prompt, one that leaves no room, or no steerers.
    """
    if not steerers:
        raise InputError("there is nothing to write: give at least one steerer, or None for an unsteered text")
    decoding = decoding or Decoding()
    ids = encode_prompt(tokenizer, prompt) if not isinstance(prompt, str) or prompt.strip() else []
    _check_room(model, [ids], decoding.max_new_tokens)
    rows = list(steerers)
    streamer = _Streamer(tokenizer, len(rows), end_tokens(unwrap(model)), on_text)
    return _generate_batch(model, tokenizer, [ids] * len(rows), rows, decoding, [seed] * len(rows), streamer)


class _Streamer:
    """What transformers' generate() tells of every token, as texts that grow; the prompt comes first and is skipped."""

    def __init__(self, tokenizer: Any, rows: int, ends: Sequence[int], on_text: Callable[[int, str], None]) -> None:
        self._decoders = [TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True)) for _ in range(rows)]
        self._texts, self._open, self._ends, self._on_text = [""] * rows, [True] * rows, set(ends), on_text

    def put(self, value: Tensor) -> None:
        for row, token in enumerate(value.tolist() if value.dim() == 1 else ()):
            self._open[row] = self._open[row] and token not in self._ends
            if self._open[row] and (piece := self._decoders[row].push(token)):
                self._texts[row] += piece
                self._on_text(row, self._texts[row])

    def end(self) -> None:
        for row, decoder in enumerate(self._decoders):
            if rest := decoder.flush():
                self._texts[row] += rest
                self._on_text(row, self._texts[row])


def blend(steerers: Sequence[tuple[Steerer, float]], name: str = "mix") -> Steerer | None:
    """The sum of steerers, each times its factor; None when all factors are 0. Parts may work against each other."""
    parts = [steerer * factor for steerer, factor in steerers if factor]
    if not parts:
        return None
    terms = tuple(term for part in parts for term in part.terms)
    return Steerer(terms, name, parts[0].fingerprint, None, {"mix": {s.name: f for s, f in steerers if f}})


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Along:
    """A text token by token: `pieces` [T] of its text, `scores` [T, n_layers, E] and `surprise` [T].

    Scores are projections on unit directions from the mean training reading, in residual norms; surprise is the
    negative log likelihood under the model in nats, NaN for a first token without context.
    """

    pieces: tuple[str, ...]
    emotions: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Tensor
    surprise: Tensor

    def at(self, layer: int) -> Tensor:
        """Scores [T, E] at one layer; raises InputError for a layer that was not read."""
        if layer not in self.layers:
            raise unknown("layer of this reading", layer, self.layers)
        return self.scores[:, self.layers.index(layer)]

    @property
    def perplexity(self) -> float:
        """Of the whole text; NaN when no token could be scored."""
        return math.exp(float(self.surprise.nanmean())) if len(self.surprise) else math.nan


@torch.no_grad()
def along(model: Any, tokenizer: Any, directions: DirectionSet, text: str, prompt: Prompt = "") -> Along:
    """Read a text after a prompt token by token, in one pass of the model as it is.

    Raises InputError for an empty text or one of more than `MAX_TOKENS` tokens.
    """
    before = encode_prompt(tokenizer, prompt)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError("there is no text to read; write at least one word")
    limit = min(MAX_TOKENS, context_length(model) or MAX_TOKENS)
    if len(before) + len(ids) > limit:
        raise InputError(f"the text has {len(before) + len(ids)} tokens with its prompt; at most {limit} can be read")
    start, whole = len(before), torch.tensor([before + ids])
    acts = capture(model, whole, directions.site, directions.layers, positions="all", logits="all")
    x = acts.stack(directions.site).flatten(3)[:, 0, start:].float().cpu().transpose(0, 1)
    scores = torch.einsum("tld,eld->tle", x - directions.center, directions.units) / directions.norms[None, :, None]
    assert acts.logits is not None
    known = max(start, 1)
    predicted = acts.logits[0, known - 1 : -1].float()
    surprise = torch.full((len(ids),), math.nan)
    surprise[known - start :] = nn.functional.cross_entropy(
        predicted, whole[0, known:].to(predicted.device), reduction="none"
    ).cpu()
    return Along(pieces(tokenizer, ids), directions.emotions, directions.layers, scores, surprise)


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token as it stands behind its predecessors (decoders treat a first token differently)."""
    out = []
    for i in range(len(ids)):
        before = list(ids[max(0, i - 4) : i])
        out.append(tokenizer.decode([*before, ids[i]])[len(tokenizer.decode(before)) if before else 0 :])
    return tuple(out)


@dataclass(frozen=True)
class Pattern:
    """How much each token of a text attends to each one: `weights` [T, T], a row per token; `left_off` were cut."""

    pieces: tuple[str, ...]
    weights: Tensor
    left_off: int = 0


@torch.no_grad()
def pattern(model: Any, tokenizer: Any, text: str, layer: int, head: int, *, longest: int = 48) -> Pattern:
    """The attention pattern of one head on a text, of which the first `longest` tokens are read.

    Raises InputError for an empty text or a head that does not exist, HookError for a layer without attention.
    """
    _check_unit(model, "heads", layer, head)
    if not text.strip():
        raise InputError("there is no text to read; write at least one word")
    ids = encode_prompt(tokenizer, text)
    kept = ids[: min(longest, context_length(model) or longest)]
    weights = capture(model, torch.tensor([kept]), "pattern", layer)["pattern", layer][0, head].float().cpu()
    return Pattern(pieces(tokenizer, kept), weights, len(ids) - len(kept))


def promoted(model: Any, tokenizer: Any, vector: Tensor, top: int = 10) -> dict[str, list[tuple[str, float]]]:
    """The tokens that a push [d_model] on the last residual makes likelier ("up") and less likely ("down").

    With their logits by the direct path; raises as `direct_logits` does.
    """
    logits = direct_logits(model, vector[None])[0].cpu()
    found = {"up": logits.topk(top), "down": (-logits).topk(top)}
    return {way: [(tokenizer.decode([int(i)]), float(logits[i])) for i in best.indices] for way, best in found.items()}


# ------------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True)
class Context:
    """A stretch of text around the token `peak` at which a unit was most active, with the unit's `values` [T]."""

    pieces: tuple[str, ...]
    values: tuple[float, ...]
    peak: int

    @property
    def value(self) -> float:
        """The unit's value at the peak."""
        return self.values[self.peak]


@torch.no_grad()
def contexts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    kind: str,
    layer: int,
    unit: int,
    *,
    direction: Tensor | None = None,
    top: int = 6,
    width: int = 16,
) -> list[Context]:
    """The `top` texts in which one unit has its largest value, each `width` tokens before and a third of that after.

    kind "neurons": the activation at mlp_post. "heads": what the head adds along `direction` [d_model] (as given, so
    divide it by the residual norm). Each row's first token is left out: its residual is not like the others'. Raises
    InputError for a unit that does not exist, texts without tokens, or a head without a direction. Texts are cut at the
    model's context.
    """
    value_of = _unit_value(model, kind, layer, unit, direction)
    longest = min(MAX_TOKENS, context_length(model) or MAX_TOKENS)
    rows = [encode_prompt(tokenizer, text)[:longest] for text in dict.fromkeys(texts)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise InputError("there are no texts in which to look; give some of at least two tokens")
    found: dict[tuple[str, ...], Context] = {}  # many texts begin with the same prompt: show what it did there once
    for index in batches(len(rows), [len(r) for r in rows], 16):
        ids, mask = pad([rows[i] for i in index], "right", 0)
        for row, values in zip(index, value_of({"input_ids": ids, "attention_mask": mask})):
            context = _around(tokenizer, rows[row], values[: len(rows[row])].tolist(), width)
            found.setdefault(context.pieces[: context.peak + 1], context)
    return sorted(found.values(), key=lambda c: -c.value)[:top]


def _around(tokenizer: Any, ids: Sequence[int], values: list[float], width: int) -> Context:
    peak = max(range(1, len(ids)), key=values.__getitem__)
    first = max(1, peak - width)
    shown = slice(first, peak + 1 + width // 3)
    return Context(pieces(tokenizer, ids)[shown], tuple(values[shown]), peak - first)


def _unit_value(
    model: Any, kind: str, layer: int, unit: int, direction: Tensor | None
) -> Callable[[dict[str, Tensor]], Iterator[Tensor]]:
    """A function from a batch to the unit's value [T] in each of its rows."""
    _check_unit(model, kind, layer, unit)
    if kind == "neurons":
        return lambda batch: iter(
            capture(model, batch, "mlp_post", layer, positions="all")["mlp_post", layer][..., unit].float().cpu()
        )
    if direction is None:
        raise InputError("what a head adds needs a direction to look along; pass direction=")
    side = attention_side(model, layer)
    along_it = side.gain().float() * direction.to(side.weight.device).float()

    def value(batch: dict[str, Tensor]) -> Iterator[Tensor]:
        z = capture(model, batch, "z", layer, positions="all")["z", layer]
        for row in z:
            writes = head_writes(side, row)[:, unit].float()
            scale = side.scale(side.written(row.flatten(1)))
            yield (scale.float() * (writes @ along_it)).cpu()

    return value


def _check_unit(model: Any, kind: str, layer: int, unit: int) -> None:
    anatomy = resolve(model)
    widths = {"heads": anatomy.n_heads, "neurons": anatomy.d_mlp}
    if kind not in widths:
        raise unknown("kind of unit", kind, UNITS)
    if not (0 <= layer < anatomy.n_layers and 0 <= unit < widths[kind]):
        raise InputError(
            f"{kind[:-1]} {layer}.{unit} does not exist; the model has {anatomy.n_layers} layers of {widths[kind]}"
        )


def written_by(model: Any, layer: int, neuron: int) -> Tensor:
    """What a neuron writes into the residual stream per unit of activation [d_model], up to the scale of a norm."""
    side = mlp_side(model, layer)
    return (side.gain() * side.weight[:, neuron]).float().cpu()
