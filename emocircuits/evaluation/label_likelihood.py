"""A judge that asks a causal language model how likely each emotion word is after a text."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emocircuits.errors import InputError
from emocircuits.evaluation.embeddings import batches_by_length
from emocircuits.evaluation.expression import JUDGE_LABELS

Probabilities = NDArray[np.float64]
Tokens = tuple[int, ...]
Member = tuple[int, Tokens]  # a label's column and its tokens


class LikelihoodJudge:
    """A causal language model's own likelihood of each label after a text, calibrated on empty content.

    score(label) = log p(label | text) - mean over content-free texts of log p(label | content-free text),
    summed over the label's tokens; probabilities are its softmax. Zhao et al. 2021 (arXiv 2102.09690). Raises
    InputError if the template lacks {text} or its end would merge with a label's first token.
    """

    TEMPLATE = 'Text: "{text}"\nThe one emotion that the speaker of this text expresses is'
    CONTENT_FREE = ("N/A", "[MASK]", "")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = TEMPLATE,
        *,
        labels: Sequence[str] = JUDGE_LABELS,
        content_free: Sequence[str] = CONTENT_FREE,
        batch_size: int = 16,
    ) -> None:
        if template.count("{text}") != 1:
            raise InputError("the judge's template must hold {text} exactly once")
        if getattr(model, "training", False):
            raise InputError("the judging model is in training mode; call model.eval() first")
        if not content_free:
            raise InputError("calibration needs at least one content-free text, such as 'N/A'")
        self.labels = tuple(labels)
        self.name = f"likelihood:{getattr(model, 'name_or_path', '') or type(model).__name__}"
        self._model, self._tokenizer = model, tokenizer
        self._template, self._batch_size = template, batch_size
        self._rows = _label_rows([_label_ids(tokenizer, template, label) for label in self.labels])
        self._prior = self.log_likelihoods(content_free).mean(axis=0)

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Calibrated probabilities [n, n_labels] of the texts."""
        return softmax(self.log_likelihoods(texts) - self._prior)

    def log_likelihoods(self, texts: Sequence[str]) -> Probabilities:
        """Uncalibrated log p(label | text) [n, n_labels] in nats. Raises InputError if not finite."""
        prompts = [self._template.replace("{text}", text) for text in texts]
        found = np.empty((len(prompts), len(self.labels)))
        for chunk in batches_by_length(prompts, self._batch_size, "Judging texts"):
            ids = [list(self._tokenizer(prompts[i])["input_ids"]) for i in chunk]
            for prefix, members in self._rows.items():
                found[np.ix_(chunk, [column for column, _ in members])] = self._score(ids, prefix, members)
        if not np.isfinite(found).all():
            raise InputError("the judging model gave non-finite likelihoods; load it in float32 or bfloat16")
        return found

    def _score(self, prompts: list[list[int]], prefix: Tokens, members: list[Member]) -> Probabilities:
        """Log-likelihoods [rows, members] of the labels that are `prefix` plus one token each."""
        import torch

        rows = [prompt + list(prefix) for prompt in prompts]
        steps = len(prefix) + 1
        logits = _last_logits(self._model, rows, steps, self._tokenizer)
        logs = logits.float().log_softmax(-1).cpu()
        shared = sum((logs[:, step, token] for step, token in enumerate(prefix)), torch.zeros(len(rows)))
        last = logs[:, -1, [ids[-1] for _, ids in members]]
        return (shared[:, None] + last).double().numpy()


def softmax(scores: NDArray[np.floating]) -> Probabilities:
    """Rows [n, k] of scores as probabilities, in float64."""
    scores = np.asarray(scores, dtype=np.float64)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _label_ids(tokenizer: Any, template: str, label: str) -> Tokens:
    """Tokens of the label where it follows the template, whatever the tokenizer does at the space between."""
    stem = template.replace("{text}", "text")
    before, after = tokenizer(stem)["input_ids"], tokenizer(f"{stem} {label}")["input_ids"]
    if after[: len(before)] != before or len(after) == len(before):
        raise InputError(
            f"the label {label!r} does not follow the template as separate tokens; end the template at a "
            "word and use a tokenizer that adds no end token"
        )
    return tuple(after[len(before) :])


def _label_rows(label_ids: Sequence[Tokens]) -> dict[Tokens, list[Member]]:
    """Labels by all their tokens but the last, so that all single-token labels share one row per text."""
    rows: dict[Tokens, list[Member]] = {}
    for column, ids in enumerate(label_ids):
        rows.setdefault(ids[:-1], []).append((column, ids))
    return rows


def _last_logits(model: Any, rows: list[list[int]], steps: int, tokenizer: Any) -> Any:
    """Logits [rows, steps, vocabulary] of the last `steps` positions only, under left padding."""
    import torch

    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    accepted = signature(model.forward).parameters
    extra = {"position_ids": positions, "logits_to_keep": steps}
    device = model.get_input_embeddings().weight.device
    keyed = {"input_ids": ids, "attention_mask": mask, **{k: v for k, v in extra.items() if k in accepted}}
    with torch.inference_mode():
        out = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keyed.items()})
    return out.logits[:, -steps:]
