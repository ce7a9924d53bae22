"""How much each modality drives the answer: attention, ablation and gradient, and how far the three agree.

Papers report bias towards audio (arXiv 2508.01181) and towards text (2602.07054) in different models, so this measures
and assumes nothing. Attention says where a model looks, ablation what the answer needs, the gradient what would change
it at once; only ablation is a cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import capture
from ..activations.attention import Call, Proceed, around_attention, one_query, probabilities
from ..activations.forward import ForwardTracker, hook_point
from ..activations.reweigh import with_masses
from ..circuits.gradients import frozen
from ..errors import HookError, InputError, unknown
from ..evaluation.statistics import rank_correlation
from ..models.anatomy import resolve, unwrap
from ..models.spans import LiveSpans, ModalitySpans, placeholders
from ..steering.policies import Multiply
from ..steering.reallocation import Reallocation

QUERIES = ("last", "all")
MODES = ("mean", "resample", "knockout")


def spans_of(model: Any, inputs: Mapping[str, Any], spans: ModalitySpans | None = None) -> ModalitySpans:
    """The given spans, or those of the model's placeholders in the batch; raises InputError when there are none."""
    found = spans if spans is not None else ModalitySpans.of_ids(inputs["input_ids"], placeholders(model))
    if not found.present():
        raise InputError("no token of these prompts belongs to a modality; were the processor's placeholders expanded?")
    return found


@torch.no_grad()
def attention_mass(
    model: Any, inputs: Mapping[str, Any], spans: ModalitySpans | None = None, *, queries: str = "last"
) -> dict[str, Tensor]:
    """{name: [B, L, heads]} share of attention on each modality and on "text", from one forward pass.

    queries: "last", what the last real token of each row attends to, or "all", the mean over its real tokens. No
    attention matrix is made. NaN in layers without softmax attention. Raises InputError for prompts without spans.
    """
    if queries not in QUERIES:
        raise unknown("queries", queries, QUERIES)
    module, anatomy, found = unwrap(model), resolve(model), spans_of(model, inputs, spans)
    live, tracker = LiveSpans(None, found), ForwardTracker(module, anatomy)
    names = (*found.present(), found.names[0])
    values = torch.full((len(found.labels), anatomy.n_layers, anatomy.n_heads, len(names)), torch.nan)

    def look(call: Call, proceed: Proceed) -> Any:
        forward = tracker.current
        assert forward is not None
        live.follow(forward, call.query.device)
        regions = torch.stack([live.mask(name, call.key.shape[2]) for name in names], dim=1)
        if queries == "last":
            result, p = proceed(call), probabilities(one_query(call, forward.last(call.query.device)))
            mass = torch.einsum("bhqk,brk->bhr", p, regions.float())
        else:
            result, by_query = with_masses(call, proceed, regions)
            real = forward.real(call.query.device).float()[:, None, :, None]
            mass = (by_query * real).sum(2) / real.sum(2)
        values[:, call.layer] = mass.float().cpu()
        return result

    covered = [n for n, path in enumerate(anatomy.attention) if path]
    handles = tracker.install()
    try:
        with around_attention(module, anatomy, dict.fromkeys(covered, look)):
            capture(module, inputs, "attn_out", covered[-1])
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(names, values.unbind(-1)))


@dataclass(frozen=True)
class Answers:
    """A forced choice: `labels` and the token each of them begins with."""

    labels: tuple[str, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of_words(cls, tokenizer: Any, words: Mapping[str, str]) -> Answers:
        """{label: its answer as it stands behind the prompt}; raises InputError when two begin with the same token."""
        tokens = tuple(tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words.values())
        if len(set(tokens)) < len(tokens):
            raise InputError("two answers begin with the same token; choose other words")
        return cls(tuple(words), tokens)

    def index(self, labels: Sequence[str]) -> Tensor:
        """[B] numbers of labels; raises InputError for an unknown one."""
        for label in labels:
            if label not in self.labels:
                raise unknown("answer", label, self.labels)
        return torch.tensor([self.labels.index(label) for label in labels])

    def scores(self, model: Any, inputs: Mapping[str, Any], grad: bool = False) -> Tensor:
        """[B, A] log-probability of each answer among all answers, at the last position."""
        acts = capture(model, inputs, "final_norm", positions="last", grad=grad)
        module, head = unwrap(model), resolve(model).lm_head
        if head is None:
            raise HookError("this model has no LM head, so its answers cannot be scored")
        weight = module.get_submodule(head).weight
        assert isinstance(weight, Tensor)
        hidden = acts["final_norm", 0]
        rows = weight[torch.tensor(self.tokens, device=weight.device)].float()
        return (hidden.float() @ rows.T).log_softmax(-1)

    def odds(self, scores: Tensor, rows: Tensor) -> Tensor:
        """[B] log-odds of one answer of each row against all others."""
        index = rows[:, None].to(scores.device)
        return scores.gather(1, index)[:, 0] - scores.scatter(1, index, -torch.inf).logsumexp(-1)


@contextmanager
def without(
    model: Any, spans: ModalitySpans, names: Sequence[str], mode: str, *, mean: Tensor | None = None, seed: int = 0
) -> Iterator[None]:
    """Take modalities out of every pass over the prompts in the block.

    mode: "mean" puts the mean embedding (mean [d_model] per name, else of the batch's own tokens) at their tokens,
    "resample" the tokens of another row's clip, "knockout" hides them from every later token in all layers. Raises
    InputError for one row with "resample", HookError where embeddings are injected again in later layers.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    module = unwrap(model)
    if mode == "knockout":
        with Reallocation(Multiply(dict.fromkeys(names, 0.0))).attach(module, spans):
            yield
        return
    vision = getattr(getattr(module, "config", None), "vision_config", None)
    if "audio" not in names and getattr(vision, "deepstack_visual_indexes", None):
        raise HookError("this model adds visual features again in later layers; use mode 'knockout'")
    rows = len(spans.labels)
    if mode == "resample" and rows < 2:
        raise InputError("taking another clip's tokens needs at least two rows")
    order = _shifted(rows, seed)

    def replaced(x: Tensor) -> Tensor:
        new = x.clone()
        for name in names:
            mask = spans.mask(name).to(x.device)
            if mode == "mean":
                new[mask] = (x[mask].mean(0) if mean is None else mean.to(x)).to(x.dtype)
                continue
            for row, other in enumerate(order):
                given = x[other][mask[other]]
                n = int(mask[row].sum())
                if n and len(given):  # another length is stretched or thinned out evenly
                    new[row, mask[row]] = given[torch.linspace(0, len(given) - 1, n).round().long()]
        return new

    point = resolve(module).point("resid_pre", 0)
    handle = hook_point(module.get_submodule(point.module), point.io, replaced)
    try:
        yield
    finally:
        handle.remove()


def _shifted(rows: int, seed: int) -> list[int]:
    """For each row another one."""
    order = np.random.default_rng(seed).permutation(rows)
    found = np.empty(rows, dtype=int)
    found[order] = np.roll(order, 1)
    return found.tolist()


@dataclass(frozen=True)
class Balance:
    """What drives the answers of a batch, for M modalities: see `measure`."""

    modalities: tuple[str, ...]
    answers: tuple[str, ...]
    scores: Tensor
    """[B, A] log-probabilities of the untouched model."""
    effects: Mapping[str, Tensor]
    """{mode: [B, M]} log-odds of the row's answer that the modality gives."""
    gradient: Tensor
    """[B, M] the same to first order, against the mean embedding."""
    mass: Mapping[str, Tensor]
    """{name: [B, L, heads]} attention of the last token."""
    changed: Mapping[str, Tensor]
    """{mode: [B, M]} whether the forced choice changes without (or with another clip's) modality."""
    prior: Tensor
    """[B, A] log-probabilities with every modality knocked out: what the text alone says."""

    def text_reliance(self) -> float:
        """Share of rows whose answer stays the same without any audio or video."""
        return float((self.prior.argmax(-1) == self.scores.argmax(-1)).float().mean())

    def agreement(self) -> dict[str, float]:
        """Spearman correlation over rows and modalities between the measures; NaN where one of them does not vary."""
        measures = {f"ablation ({mode})": effect for mode, effect in self.effects.items()}
        measures["gradient"] = self.gradient
        measures["attention"] = torch.stack([self.mass[m].nanmean((1, 2)) for m in self.modalities], dim=1)
        names = list(measures)
        return {
            f"{a} vs {b}": rank_correlation(measures[a].flatten(), measures[b].flatten())
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    answers: Answers,
    labels: Sequence[str] | None = None,
    spans: ModalitySpans | None = None,
    *,
    modes: Sequence[str] = MODES,
    seed: int = 0,
) -> Balance:
    """Attention, ablation and gradient of every modality in one batch.

    labels: the answer whose log-odds count in each row (default: what the model answers). Raises InputError for unknown
    answers or prompts without spans.
    """
    found = spans_of(model, inputs, spans)
    names = found.present()
    with torch.no_grad():
        clean = answers.scores(model, inputs)
        rows = clean.argmax(-1).cpu() if labels is None else answers.index(labels)
        odds = answers.odds(clean, rows)
        effects, changed = {}, {}
        for mode in modes:
            parts = []
            for name in names:
                with without(model, found, [name], mode, seed=seed):
                    parts.append(answers.scores(model, inputs))
            effects[mode] = torch.stack([odds - answers.odds(p, rows) for p in parts], dim=1).cpu()
            changed[mode] = torch.stack([p.argmax(-1) != clean.argmax(-1) for p in parts], dim=1).cpu()
        with without(model, found, names, "knockout"):
            prior = answers.scores(model, inputs).cpu()
    return Balance(
        names, answers.labels, clean.cpu(), effects, _gradient(model, inputs, answers, rows, found, names),
        attention_mass(model, inputs, found), changed, prior,
    )  # fmt: skip


def _gradient(
    model: Any, inputs: Mapping[str, Any], answers: Answers, rows: Tensor, spans: ModalitySpans, names: Sequence[str]
) -> Tensor:
    """[B, M] gradient of the log-odds at the modality's embeddings times their difference from the mean."""
    module, held = unwrap(model), []
    point = resolve(module).point("resid_pre", 0)

    def keep(x: Tensor) -> Tensor:
        held.append(x.detach().requires_grad_())
        return held[0]

    with torch.enable_grad(), frozen(module):
        handle = hook_point(module.get_submodule(point.module), point.io, keep)
        try:
            total = answers.odds(answers.scores(model, inputs, grad=True), rows).sum()
        finally:
            handle.remove()
        (grad,) = torch.autograd.grad(total, held)
    x, parts = held[0].detach(), []
    for name in names:
        mask = spans.mask(name).to(x.device)
        difference = x - x[mask].mean(0)
        parts.append(((grad * difference).sum(-1) * mask).sum(-1).cpu())
    return torch.stack(parts, dim=1)
