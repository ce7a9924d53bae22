"""Which tokens of a sequence stand for audio, images, video or text, per row, also while the sequence grows.

Processors expand one placeholder into as many tokens as the encoder gives, so positions of placeholder ids are the
positions of the modality in the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, unknown
from .anatomy import unwrap

if TYPE_CHECKING:
    from ..activations.forward import Forward

TEXT = "text"
MODALITIES = ("audio", "image", "video")


def placeholders(model: Any) -> dict[str, int]:
    """{modality: placeholder token id} of a model, from its config, wherever the family keeps it.

    Raises InputError for a model without any, with what to do.
    """
    config = getattr(unwrap(model), "config", None)
    configs = [config, *(getattr(config, f"{part}_config", None) for part in ("audio", "vision", "text"))]
    found: dict[str, int] = {}
    for modality in MODALITIES:
        names = (f"{modality}_token_id", f"{modality}_token_index")
        ids = [getattr(c, name, None) for c in configs if c is not None for name in names]
        first = next((i for i in ids if isinstance(i, int)), None)
        if first is not None:
            found[modality] = first
    if not found:
        raise InputError(
            f"{type(unwrap(model)).__name__} has no audio, image or video placeholder in its config; give spans of"
            " your own with ModalitySpans.of_positions"
        )
    return found


@dataclass(frozen=True)
class ModalitySpans:
    """`labels` [B, T]: for each token the number of its name in `names` (0 is always "text")."""

    names: tuple[str, ...]
    labels: Tensor

    @classmethod
    def of_ids(cls, ids: Tensor, tokens: Mapping[str, int]) -> ModalitySpans:
        """Spans of placeholder ids {name: token id} in ids [B, T]."""
        labels = torch.zeros_like(ids, dtype=torch.int8)
        for number, token in enumerate(tokens.values(), 1):
            labels[ids == token] = number
        return cls((TEXT, *tokens), labels)

    @classmethod
    def of_positions(cls, spans: Mapping[str, Sequence[Any]], shape: tuple[int, int]) -> ModalitySpans:
        """Spans of your own: {name: (start, stop) columns, the same for every row, or one list of them for each row}.

        shape: (rows, columns) of the prompt, padding included. Raises InputError for spans that are empty, outside the
        prompt, or over each other.
        """
        labels = torch.zeros(shape, dtype=torch.int8)
        for number, (name, given) in enumerate(spans.items(), 1):
            by_row = list(given)
            if all(len(s) == 2 and all(isinstance(i, int) for i in s) for s in by_row):
                by_row = [by_row] * shape[0]
            if len(by_row) != shape[0]:
                raise InputError(f"spans of {name!r} are given for {len(by_row)} rows, but the prompt has {shape[0]}")
            for row, pieces in enumerate(by_row):
                for start, stop in pieces:
                    if not 0 <= start < stop <= shape[1]:
                        raise InputError(f"span ({start}, {stop}) of {name!r} is not inside the {shape[1]} columns")
                    if bool(labels[row, start:stop].any()):
                        raise InputError(f"span ({start}, {stop}) of {name!r} overlaps another one in row {row}")
                    labels[row, start:stop] = number
        return cls((TEXT, *spans), labels)

    @classmethod
    def of_roles(cls, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> ModalitySpans:
        """Spans "system", "user" and "assistant" of one conversation, as its chat template lays it out.

        A message takes the tokens that it adds to the conversation before it. Raises InputError for a template
        that does not only append.
        """
        roles = tuple(dict.fromkeys(str(m["role"]) for m in messages))
        whole = _templated(tokenizer, messages)
        labels, start = torch.zeros(1, len(whole), dtype=torch.int8), 0
        for i, message in enumerate(messages, 1):
            ids = _templated(tokenizer, messages[:i])
            if whole[: len(ids)] != ids:
                raise InputError(
                    "this chat template rewrites earlier messages, so roles have no fixed place; give spans"
                )
            labels[0, start : len(ids)] = 1 + roles.index(str(message["role"]))
            start = len(ids)
        return cls((TEXT, *roles), labels)

    def mask(self, name: str) -> Tensor:
        """[B, T] True on the tokens of one name; raises InputError for an unknown one."""
        if name not in self.names:
            raise unknown("modality", name, self.names)
        return self.labels == self.names.index(name)

    def count(self, name: str) -> Tensor:
        """[B] tokens of one name in each row."""
        return self.mask(name).sum(-1)

    def present(self) -> tuple[str, ...]:
        """Names other than "text" that have a token in some row."""
        return tuple(n for n in self.names[1:] if bool(self.mask(n).any()))

    def dealt(self, generator: torch.Generator) -> ModalitySpans:
        """A random control: in each row, names other than "text" dealt out at random among the tokens that have one.

        Numbers of tokens stay; only which of them is which is lost. A row of one modality stays as it is.
        """
        labels = self.labels.clone()
        for row in labels:
            media = (row > 0).nonzero()[:, 0].cpu()
            row[media] = row[media[torch.randperm(len(media), generator=generator)]]
        return ModalitySpans(self.names, labels)


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("this tokenizer has no chat template, so there are no roles; give spans of your own")
    made = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=False)
    return list(made["input_ids"] if isinstance(made, Mapping) else made)


class _Kept(local):
    labels: Tensor | None = None
    call: int = 0


class LiveSpans:
    """The spans of the pass in progress: those of the prompt, then text, cut back when a cache is.

    given: spans of the prompt; when None they are read from its ids by `tokens`. One instance serves one model.
    """

    def __init__(self, tokens: Mapping[str, int] | None, given: ModalitySpans | None = None) -> None:
        self.tokens, self.given, self._kept = dict(tokens or {}), given, _Kept()
        self.names = given.names if given is not None else (TEXT, *self.tokens)

    def follow(self, forward: Forward, device: torch.device) -> None:
        """Take in a new pass; call once for each, before asking."""
        kept, end = self._kept.labels, forward.past + forward.length
        if self.given is not None:
            labels = self._rows(self.given.labels, forward).to(device)
            self._kept.labels = torch.nn.functional.pad(labels, (0, max(0, end - labels.shape[1])))[:, :end]
            return
        new = self.of_pass(forward, device)
        old = torch.zeros(forward.batch, 0, dtype=torch.int8, device=device)
        if forward.past:
            fits = kept is not None and len(kept) == forward.batch and self._kept.call == forward.call
            old = kept[:, : forward.past].to(device) if fits and kept is not None else self._of_prompt(forward, device)
            old = torch.nn.functional.pad(old, (0, forward.past - old.shape[1]))
        self._kept.labels, self._kept.call = torch.cat([old, new], dim=1), forward.call

    def of_pass(self, forward: Forward, device: torch.device) -> Tensor:
        """[B, length] labels of the columns of this pass alone; nothing is remembered."""
        if self.given is not None:
            labels, end = self._rows(self.given.labels, forward).to(device), forward.past + forward.length
            return torch.nn.functional.pad(labels, (0, max(0, end - labels.shape[1])))[:, forward.past : end]
        if forward.ids is not None:
            return ModalitySpans.of_ids(forward.ids, self.tokens).labels.to(device)
        if not forward.past:
            raise InputError("the model was given embeddings without input_ids; give the spans with ModalitySpans")
        return torch.zeros(forward.batch, forward.length, dtype=torch.int8, device=device)

    def _of_prompt(self, forward: Forward, device: torch.device) -> Tensor:
        if forward.prompt_ids is None:
            raise InputError(
                "the KV cache was filled before reallocation was attached; attach it before the prompt runs"
            )
        labels = ModalitySpans.of_ids(forward.prompt_ids, self.tokens).labels.to(device)
        return self._rows(labels, forward)[:, : forward.past]

    def _rows(self, labels: Tensor, forward: Forward) -> Tensor:
        if len(labels) in (1, forward.batch):
            return labels.expand(forward.batch, -1)
        if forward.batch % len(labels):
            raise InputError(f"spans are given for {len(labels)} rows, but the model runs {forward.batch}")
        return labels.repeat_interleave(forward.batch // len(labels), dim=0)

    def mask(self, name: str, width: int) -> Tensor:
        """[B, width] True on the keys of one name, for keys and values of `width` columns.

        More columns than tokens are slots still free (a static cache); fewer, the last ones (a sliding window).
        """
        labels = self._kept.labels
        assert labels is not None
        return aligned(labels == self.names.index(name), width)


def aligned(columns: Tensor, width: int) -> Tensor:
    """[B, T] of all tokens so far as [B, width] of the keys that a layer holds; see `LiveSpans.mask`."""
    n = columns.shape[1]
    return columns[:, n - width :] if n > width else torch.nn.functional.pad(columns, (0, width - n))
