"""From texts to feature vectors: where in a text the emotion is read, and how that is done cheaply.

Examples that share a prompt share its forward pass: the prompt's KV cache is computed once and its
continuations run on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from .activations import batches, capture
from .activations.sites import check_site, expand_layers
from .data.prompts import encode_prompt
from .errors import InputError, unknown
from .models.anatomy import resolve, unwrap

READING = ("last_prompt", "response_mean", "response_tokens")


@dataclass(frozen=True)
class Example:
    """One text to read: `prompt`, then `continuation` (part of the prompt's context), then `response`.

    `group` says which examples differ only in emotion (a scenario with one event); `cluster` is the scenario, the
    unit of analysis. `prompt` is shared between examples wherever possible: its forward pass then runs once.
    """

    prompt: str
    label: str
    group: str
    continuation: str = ""
    response: str = ""
    theme: str = ""
    cluster: str = ""
    wording: str = ""


@dataclass(frozen=True)
class Features:
    """Feature vectors x [N, n_layers, width] of N readings with their labels, groups, themes and clusters."""

    x: Tensor
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    themes: tuple[str, ...]
    clusters: tuple[str, ...]
    site: str
    layers: tuple[int, ...]
    position: str

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Sequence[bool] | Tensor) -> Features:
        """The readings for which `keep` is true."""
        index = [i for i, k in enumerate(keep) if k]
        pick = {n: tuple(getattr(self, n)[i] for i in index) for n in ("labels", "groups", "themes", "clusters")}
        return replace(self, x=self.x[index], **pick)

    def at(self, layers: Sequence[int]) -> Features:
        """The same readings at fewer layers; raises InputError for a layer that was not read."""
        for layer in layers:
            if layer not in self.layers:
                raise unknown("layer of these readings", layer, self.layers)
        return replace(self, x=self.x[:, [self.layers.index(layer) for layer in layers]], layers=tuple(layers))

    def complete(self, emotions: Sequence[str]) -> Features:
        """Only these emotions, and only groups that have every one of them (directions need balanced groups)."""
        have: dict[str, set[str]] = {}
        for group, label in zip(self.groups, self.labels):
            have.setdefault(group, set()).add(label)
        wanted = set(emotions)
        kept = self.where([wanted <= have[g] and lab in wanted for g, lab in zip(self.groups, self.labels)])
        if not len(kept):
            raise InputError(
                f"no group holds all of {', '.join(emotions)}; directions contrast emotions within a group, so give"
                " every scenario one text per emotion, or use one common group"
            )
        return kept


def read(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    site: str = "resid_post",
    layers: Sequence[int] | str | None = None,
    position: str = "response_mean",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Features:
    """Read every example at one site: features [N, n_layers, width] on the CPU, float32.

    position: "last_prompt" (last token before the response), "response_mean", or "response_tokens" (one row per
    response token). batch_size counts prompts; their continuations run together. Raises InputError when there is
    nothing to read or a text exceeds the model's context.
    """
    check_site(site)
    wanted = expand_layers(layers, resolve(model).n_layers)
    rows: list[tuple[int, Tensor]] = []
    for batch in reading_batches(
        model, tokenizer, examples, position=position, batch_size=batch_size, progress=progress, title=f"reading {site}"
    ):
        rows += list(zip(batch.index, _read_batch(model, batch, site, wanted, position)))
    return _assemble(rows, examples, site, wanted, position)


@dataclass(frozen=True)
class Batch:
    """Model inputs for the examples `index`, and the span [start, stop) of each row that is read.

    Spans count the row's real tokens; with a shared prefix in the KV cache the inputs begin at token `first` of a row.
    """

    index: list[int]
    inputs: dict[str, Any]
    spans: list[tuple[int, int]]
    first: list[int]

    def weights(self) -> Tensor:
        """[B, T] weights over the columns of the inputs that average the span of each row."""
        out = torch.zeros(self.inputs["input_ids"].shape)
        for row, ((start, stop), first) in enumerate(zip(self.spans, self.first)):
            out[row, start - first : stop - first] = 1 / (stop - start)
        return out


def reading_batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    position: str,
    batch_size: int = 16,
    progress: Progress | None = None,
    title: str = "reading",
) -> Iterator[Batch]:
    """Batches that together cover all examples, right-padded, with the prompts they share run once.

    batch_size counts prompts; their continuations run together. Raises InputError for a text that exceeds the context.
    """
    if position not in READING:
        raise unknown("reading position", position, READING)
    if not examples:
        raise InputError("there are no texts to read; check the filter or the file that should hold them")
    if position != "last_prompt" and any(not e.response for e in examples):
        raise InputError(f"position {position!r} reads the response, but some examples have none; use 'last_prompt'")
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    members: dict[str, list[int]] = {p: [] for p in prompts}
    for i, example in enumerate(examples):
        members[example.prompt].append(i)
    prefix = {p: encode_prompt(tokenizer, p) for p in prompts}
    suffixes = [_suffix(tokenizer, e) for e in examples]
    _check_context(model, [len(prefix[e.prompt]) + len(s) for e, (s, _) in zip(examples, suffixes)])
    task = progress.add_task(title, total=len(prompts)) if progress else None
    for batch in batches(len(prompts), [len(prefix[p]) for p in prompts], batch_size):
        index = [i for b in batch for i in members[prompts[b]]]
        owner = [slot for slot, b in enumerate(batch) for _ in members[prompts[b]]]
        tails = [suffixes[i] for i in index]
        yield _batch(model, tokenizer, [prefix[prompts[b]] for b in batch], tails, index, owner, position)
        if progress is not None and task is not None:
            progress.advance(task, len(batch))


def _suffix(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Token ids after the shared prompt, and where among them the response begins."""
    before = tokenizer(example.continuation, add_special_tokens=False)["input_ids"] if example.continuation else []
    after = tokenizer(example.response, add_special_tokens=False)["input_ids"] if example.response else []
    return [*before, *after], len(before)


def _check_context(model: Any, lengths: Sequence[int]) -> None:
    config = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max(lengths) > limit:
        worst = max(range(len(lengths)), key=lengths.__getitem__)
        raise InputError(
            f"text {worst} has {lengths[worst]} tokens, longer than the model's context of {limit}; shorten it"
        )


def pad(rows: Sequence[Sequence[int]], side: str, fill: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids, mask


def _batch(
    model: Any,
    tokenizer: Any,
    prefixes: list[list[int]],
    suffixes: list[tuple[list[int], int]],
    index: list[int],
    owner: list[int],
    position: str,
) -> Batch:
    fill = tokenizer.pad_token_id if getattr(tokenizer, "pad_token_id", None) is not None else 0
    starts = [len(prefixes[o]) for o in owner]
    inside = all(ids and (begin or position != "last_prompt") for ids, begin in suffixes)
    if inside and all(prefixes) and has_cache(model):
        ids, mask = pad(prefixes, "left", fill)
        cache = prefix_cache(model, ids, mask)
        cache.batch_select_indices(torch.tensor(owner, device=_device(model)))
        tail, tail_mask = pad([s for s, _ in suffixes], "right", fill)
        inputs = {"input_ids": tail, "attention_mask": torch.cat([mask[owner], tail_mask], dim=1)}
        inputs |= {"past_key_values": cache, "use_cache": True}
        first = starts
    else:
        ids, mask = pad([prefixes[o] + s for o, (s, _) in zip(owner, suffixes)], "right", fill)
        inputs, first = {"input_ids": ids, "attention_mask": mask}, [0] * len(owner)
    spans = [
        (start + begin - 1, start + begin) if position == "last_prompt" else (start + begin, start + len(ids))
        for start, (ids, begin) in zip(starts, suffixes)
    ]
    return Batch(index, inputs, spans, first)


def _read_batch(model: Any, batch: Batch, site: str, layers: list[int], position: str) -> list[Tensor]:
    """One tensor [n_readings, n_layers, width] per row."""
    if position == "response_tokens":
        stacked = capture(model, batch.inputs, site, layers, positions="all").stack(site).flatten(3).float().cpu()
        pairs = enumerate(zip(batch.spans, batch.first))
        return [stacked[:, i, a - o : b - o].transpose(0, 1) for i, ((a, b), o) in pairs]
    acts = capture(model, batch.inputs, site, layers, positions=batch.spans, reduce="mean")
    return [row[None] for row in acts.stack(site).flatten(2).float().cpu().transpose(0, 1)]


def _device(model: Any) -> torch.device:
    return next(unwrap(model).parameters()).device


def has_cache(model: Any) -> bool:
    """Rotary models take a shared prefix as it is; learned absolute positions would need position ids per row."""
    decoder = unwrap(model).get_submodule(resolve(model).decoder)
    return hasattr(unwrap(model), "generation_config") and hasattr(decoder, "rotary_emb")


@torch.no_grad()
def prefix_cache(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """KV cache of the prompts; the forward pass stops before the LM head."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    last = resolve(model).n_layers - 1
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    capture(model, inputs, "resid_post", last, positions="last")
    return cache


def _assemble(
    rows: list[tuple[int, Tensor]], examples: Sequence[Example], site: str, layers: list[int], position: str
) -> Features:
    rows.sort(key=lambda pair: pair[0])
    order = [i for i, found in rows for _ in range(len(found))]
    return Features(
        x=torch.cat([found for _, found in rows]),
        labels=tuple(examples[i].label for i in order),
        groups=tuple(examples[i].group for i in order),
        themes=tuple(examples[i].theme for i in order),
        clusters=tuple(examples[i].cluster or examples[i].group for i in order),
        site=site,
        layers=tuple(layers),
        position=position,
    )


@torch.no_grad()
def residual_norms(
    model: Any, tokenizer: Any, texts: Sequence[str], site: str = "resid_post", layers: Sequence[int] | None = None
) -> Tensor:
    """Mean norm of a token's activation at each layer [n_layers], first tokens left out (BOS norms are extreme)."""
    ids, mask = pad([encode_prompt(tokenizer, t) for t in texts], "right", 0)
    acts = capture(model, {"input_ids": ids, "attention_mask": mask}, site, layers, positions="all")
    norms = acts.stack(site).flatten(3).float().norm(dim=-1).cpu()
    keep = mask.bool().clone()
    keep[:, 0] = False
    return norms[:, keep].mean(-1)
