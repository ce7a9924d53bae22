"""Does thinking lose sight of the instructions? Attention from generated tokens to the constraints of a prompt.

"When Thinking Fails" (arXiv 2505.11423) follows the mean attention on constraint tokens. That falls with every token of
context, so beside it stand the lift over uniform attention, the share of what the prompt gets at all, the same without
the attention sink, and spans of the same lengths elsewhere in the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..activations.attention import Call
from ..activations.rows import by_queries, read_attention, visible
from ..errors import InputError, unknown
from ..models.anatomy import resolve, unwrap
from .tokens import Span, one_text, shift_of

MEASURES = ("alpha", "mass", "lift", "share")


@dataclass(frozen=True)
class SpanAttention:
    """Attention of T rows, each the pass that chose one generated token, to a set of prompt tokens.

    mass, prompt, rest: [L, H, T] attention on the set, on the prompt without token 0, and on all tokens but token 0.
    seen, keys, others: [L, T] how many tokens of the set, of the text, and of the text without token 0 the row sees in
    that layer (a sliding window hides some). NaN in layers without softmax attention.
    """

    spans: tuple[Span, ...]
    mass: Tensor
    prompt: Tensor
    rest: Tensor
    seen: Tensor
    keys: Tensor
    others: Tensor

    def __len__(self) -> int:
        return self.mass.shape[-1]

    @property
    def n_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def measure(self, name: str = "alpha", *, sink: bool = True, per_head: bool = False) -> Tensor:
        """[L, T] mean over heads (or [L, H, T]) of a measure.

        "mass": attention on the set; "alpha": that by token, as published; "lift": mass over what uniform attention to
        the visible tokens would give; "share": of the prompt's attention without token 0. sink=False renormalises
        attention as if token 0 were not there. NaN where a window hides the whole set (lift) or nothing is left to
        share.
        """
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
        if name == "share":
            mass, whole = (x if per_head else x.mean(1) for x in (self.mass, self.prompt))
            return mass / whole.masked_fill(whole == 0, torch.nan)
        mass = self.mass if sink else self.mass / self.rest.masked_fill(self.rest == 0, torch.nan)
        mass = mass if per_head else mass.mean(1)
        if name == "mass":
            return mass
        if name == "alpha":
            return mass / self.n_tokens
        uniform = self.seen / (self.keys if sink else self.others)
        uniform = uniform.masked_fill(self.seen == 0, torch.nan)
        return mass / (uniform[:, None] if per_head else uniform)

    def phase(self, start: int, stop: int | None = None) -> SpanAttention:
        """The rows of generated tokens start..stop-1 only, such as those of the answer. Raises InputError for none."""
        fields = ("mass", "prompt", "rest", "seen", "keys", "others")
        cut = replace(self, **{name: getattr(self, name)[..., start:stop] for name in fields})
        if not len(cut):
            raise InputError(f"generated tokens {start} to {stop} hold none of the {len(self)} that there are")
        return cut

    def by_layer(self, name: str = "alpha", **options: bool) -> Tensor:
        """[L] (or [L, H]) mean of a measure over the rows: the paper's beta."""
        return self.measure(name, **options).nanmean(-1)


@dataclass(frozen=True)
class ConstraintAttention:
    """Attention to the constraints of a prompt, and to each draw of control spans."""

    constraints: SpanAttention
    controls: tuple[SpanAttention, ...]

    def excess(self, name: str = "alpha", **options: bool) -> Tensor:
        """[L, T] (or [L, H, T]) the measure on the constraints less its mean over the controls."""
        if not self.controls:
            raise InputError("there are no control spans to compare with; compute it with controls=10")
        others = torch.stack([c.measure(name, **options) for c in self.controls])
        return self.constraints.measure(name, **options) - others.nanmean(0)


def drop(base: SpanAttention, thinking: SpanAttention, name: str = "alpha", **options: bool) -> Tensor:
    """[L] by how much a run with thinking attends less to the constraints than one without: the paper's delta beta.

    Pass the answer's rows of both (`SpanAttention.phase`). With "alpha" a longer context alone makes it positive, so
    look at "lift" and "share" as well.
    """
    return base.by_layer(name, **options) - thinking.by_layer(name, **options)


def constraint_attention(
    model: Any,
    ids: Tensor | Sequence[int],
    prompt_length: int,
    spans: Sequence[Span],
    *,
    controls: int = 10,
    seed: int = 0,
    align: str = "predict",
) -> ConstraintAttention:
    """Attention from every generated token to the prompt's constraint spans, from one pass over ids [T] or [1, T].

    spans: token positions in the prompt (`token_spans`). controls: draws of other prompt spans of the same lengths.
    align: "predict" reads the rows that chose the generated tokens, from prompt_length-1 on; "compat" their own rows.
    Rows are reduced to masses inside the attention call, a few at a time. Raises InputError for spans outside the
    prompt or a prompt without room for controls, HookError as `read_attention` does.
    """
    tokens, shift = one_text(ids), shift_of(align)
    if not 1 <= prompt_length < tokens.shape[1]:
        raise InputError(f"the prompt has {prompt_length} tokens, so of {tokens.shape[1]} none was generated")
    own = _union(spans, prompt_length)
    sets = [own, *control_spans(own, prompt_length, controls, seed)]
    start, stop = prompt_length - shift, tokens.shape[1] - shift
    columns = torch.zeros(stop, 3 + len(sets))
    columns[:, 0], columns[1:, 1], columns[1:prompt_length, 2] = 1, 1, 1
    for i, chosen in enumerate(sets):
        for a, b in chosen:
            columns[a:b, 3 + i] = 1
    anatomy = resolve(model)
    mass = torch.full((columns.shape[1], anatomy.n_layers, anatomy.n_heads, stop - start), torch.nan)
    seen = torch.full((columns.shape[1], anatomy.n_layers, stop - start), torch.nan)

    def look(call: Call) -> None:
        groups = columns.to(call.query.device)
        for queries, keys, part, p in by_queries(call, start, stop):
            rows = slice(queries.start - start, queries.stop - start)
            mass[:, call.layer, :, rows] = (p[0] @ groups[keys]).permute(2, 0, 1).cpu()
            seen[:, call.layer, rows] = (visible(part)[0, 0].float() @ groups[keys]).T.cpu()

    read_attention(unwrap(model), tokens[:, :stop], look)
    found = [
        SpanAttention(tuple(chosen), mass[3 + i], mass[2], mass[1], seen[3 + i], seen[0], seen[1])
        for i, chosen in enumerate(sets)
    ]
    return ConstraintAttention(found[0], tuple(found[1:]))


def _union(spans: Sequence[Span], prompt_length: int) -> list[Span]:
    """Spans in order, overlapping ones joined."""
    if not spans:
        raise InputError("no constraint span was given; name token positions (start, stop) of the prompt")
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if not 0 < start < stop <= prompt_length:
            raise InputError(
                f"constraint span ({start}, {stop}) must hold a token and lie within tokens 1 to {prompt_length} of the"
                " prompt (token 0 is the attention sink)"
            )
        if joined and start < joined[-1][1]:
            before = joined.pop()
            start, stop = before[0], max(stop, before[1])
        joined.append((start, stop))
    return joined


def control_spans(spans: Sequence[Span], prompt_length: int, draws: int = 10, seed: int = 0) -> list[list[Span]]:
    """`draws` sets of prompt spans with the lengths of `spans`, apart from them, from one another and from token 0.

    Raises InputError when the prompt has no room for them.
    """
    rng = random.Random(seed)
    return [_elsewhere(spans, prompt_length, rng) for _ in range(draws)]


def _elsewhere(spans: Sequence[Span], prompt_length: int, rng: random.Random, tries: int = 200) -> list[Span]:
    lengths = sorted((stop - start for start, stop in spans), reverse=True)  # the longest first, while there is room
    for _ in range(tries):
        taken, made = [(0, 1), *spans], []
        for length in lengths:
            free = [a for a in range(1, prompt_length - length + 1) if all(a + length <= b or a >= c for b, c in taken)]
            if not free:
                break
            start = rng.choice(free)
            made.append((start, start + length))
            taken.append(made[-1])
        else:
            return sorted(made)
    raise InputError(
        f"a prompt of {prompt_length} tokens has no room for control spans of {lengths} tokens beside the constraints;"
        " pass controls=0 to go without"
    )
