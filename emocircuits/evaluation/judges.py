"""Judges that say which emotion a text expresses: a forced choice, never told the target.

Four judges share one interface: a local embedding classifier, any Hugging Face text classifier, a language
model's own label likelihood, and an OpenAI-compatible endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from emocircuits.errors import InputError, unknown
from emocircuits.evaluation.embeddings import (
    SentenceEncoder,
    batches_by_length,
    cached,
    hash_texts,
)
from emocircuits.evaluation.expression import JUDGE_LABELS, score_expression
from emocircuits.evaluation.label_likelihood import LikelihoodJudge, softmax
from emocircuits.evaluation.remote import OpenAIJudge

__all__ = [
    "JUDGE_LABELS",
    "EmbeddingJudge",
    "Judge",
    "JudgeReport",
    "LikelihoodJudge",
    "OpenAIJudge",
    "TextClassificationJudge",
    "reliability",
]

Probabilities = NDArray[np.float64]


@runtime_checkable
class Judge(Protocol):
    """Anything that gives every text a probability per label; the forced choice is the argmax."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def name(self) -> str: ...

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Probabilities [n, n_labels], each row summing to 1, or all NaN where the judge gave no usable
        answer."""
        ...


@dataclass(frozen=True, eq=False)
class JudgeReport:
    """How far a judge can itself be trusted, on texts whose emotion is known.

    `confusion` [labels x labels] counts true (row) against predicted (column), without unparseable answers;
    `recall` is NaN for a label without texts, `accuracy` NaN without any. `method` says how it was measured.
    """

    labels: tuple[str, ...]
    method: str
    n_texts: int
    accuracy: float
    recall: dict[str, float]
    unparseable_rate: float
    confusion: NDArray[np.float64]

    def summary(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        counts = self.confusion.astype(int).tolist()
        return {**self.__dict__, "labels": list(self.labels), "confusion": counts}


def reliability(judge: Judge, texts: Sequence[str], truth: Sequence[str], method: str = "given texts") -> JudgeReport:
    """Measure any judge on n texts of known emotion. Raises InputError as `score_expression` does."""
    scores = score_expression(texts, truth, judge)
    share = scores.confusion(normalise=True)
    return JudgeReport(
        labels=scores.labels,
        method=method,
        n_texts=len(texts),
        accuracy=scores.expression_rate,
        recall=dict(zip(scores.labels, share.diagonal().tolist())),
        unparseable_rate=scores.unparseable_rate,
        confusion=scores.confusion(),
    )


class EmbeddingJudge:
    """Logistic regression over MiniLM's early layers, fitted on a labelled corpus in seconds.

    The corpus is JSON lines {"id", "emotion", "style", "text"}, by default the packaged one. Classes weigh
    the same. Stratified cross-validation, with rows of one "group" (default: "id") in one fold, chooses the
    regularisation C of lowest log loss and gives `report()`. Raises InputError for a corpus that cannot be
    used, MissingPackageError without MiniLM.
    """

    # MiniLM's last layer is about topic; wording, and with it tone, is still there before. On 1,400 replies
    # from outside the corpus these layers score 14 points above the last one, and 8 above it with n-grams.
    LAYERS = (0, 1, 2, 3)
    GRID = (1.0, 10.0, 100.0)  # a trial of 1000 had a higher loss, and takes a minute
    N_FOLDS = 5

    def __init__(
        self,
        corpus: str | Path | Sequence[Mapping[str, str]] | None = None,
        *,
        model_dir: str | Path | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        rows = corpus_rows(corpus)
        self.labels = _checked_labels(rows, self.N_FOLDS)
        self.name = "embedding"
        self._texts = [row["text"] for row in rows]
        self._truth = np.array([row["emotion"] for row in rows])
        self._groups = np.array([row.get("group") or row["id"] for row in rows])
        self._encoder = SentenceEncoder(model_dir, layers=self.LAYERS, device=device)
        self._seed = seed
        self._vectors = self._encoder.encode(self._texts, cache=True)
        key = hash_texts([*self._texts, *self._truth, *self._groups], self._encoder.fingerprint, seed, self.GRID)
        found = cached("judges", key, self._fit)
        self._regularisation, self._out_of_fold = float(found["regularisation"][0]), found["out_of_fold"]
        self._weights, self._intercept = found["weights"], found["intercept"]

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Probabilities [n, n_labels] of the texts; only the first 256 word pieces of a text reach MiniLM."""
        if not len(texts):
            return np.empty((0, len(self.labels)))
        return softmax(self._encoder.encode(texts) @ self._weights.T + self._intercept)

    def report(self) -> JudgeReport:
        """Cross-validated accuracy, recall per label and confusion matrix of this judge on its own corpus."""
        method = f"{self.N_FOLDS}-fold cross-validation, C = {self._regularisation:g}"
        return reliability(_Answered(self.labels, self._out_of_fold), self._texts, self._truth.tolist(), method)

    def _fit(self) -> dict[str, np.ndarray]:
        """Weights [n_labels, d], intercept [n_labels], C [1] and out-of-fold probabilities [n, n_labels]."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # problems this small lose more to threads than they gain
            regularisation, out_of_fold = self._cross_validate()
            weights, intercept = self._regression(np.arange(len(self._texts)), regularisation)
        return {
            "weights": weights,
            "intercept": intercept,
            "regularisation": np.array([regularisation]),
            "out_of_fold": out_of_fold,
        }

    def _cross_validate(self) -> tuple[float, Probabilities]:
        from sklearn.model_selection import StratifiedGroupKFold

        splitter = StratifiedGroupKFold(self.N_FOLDS, shuffle=True, random_state=self._seed)
        folds = list(splitter.split(self._vectors, self._truth, self._groups))
        true_column = np.array([self.labels.index(label) for label in self._truth])
        tried: list[tuple[float, float, Probabilities]] = []
        for regularisation in self.GRID:
            held_out = np.empty((len(self._texts), len(self.labels)))
            for train, test in folds:
                weights, intercept = self._regression(train, regularisation)
                held_out[test] = softmax(self._vectors[test] @ weights.T + intercept)
            loss = -np.log(held_out[np.arange(len(held_out)), true_column] + 1e-12).mean()
            tried.append((float(loss), regularisation, held_out))
        _, best, held_out = min(tried, key=lambda entry: entry[0])
        return best, held_out

    def _regression(self, rows: NDArray[np.intp], regularisation: float) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        head: Any = LogisticRegression(C=regularisation, max_iter=1000, class_weight="balanced")
        head.fit(self._vectors[rows], self._truth[rows])
        order = [head.classes_.tolist().index(label) for label in self.labels]
        if len(order) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
            coef = np.stack([np.zeros_like(head.coef_[0]), head.coef_[0]])
            return coef[order], np.array([0.0, head.intercept_[0]])[order]
        return head.coef_[order], head.intercept_[order]


@dataclass(frozen=True)
class _Answered:
    """A judge that has already given its answers."""

    labels: tuple[str, ...]
    answers: Probabilities
    name: str = "answered"

    def probabilities(self, texts: Sequence[str]) -> Probabilities:  # noqa: ARG002
        return self.answers


def corpus_rows(corpus: str | Path | Sequence[Mapping[str, str]] | None = None) -> list[Mapping[str, str]]:
    """Rows {"id", "emotion", "style", "text"} of a judge corpus; None reads the packaged one. Raises
    InputError."""
    if corpus is not None and not isinstance(corpus, (str, Path)):
        return list(corpus)
    source = resources.files("emocircuits.data") / "judge_texts.jsonl" if corpus is None else Path(corpus)
    if not source.is_file():
        raise InputError(f"no judge corpus at {source}; pass a file of JSON lines with id, emotion and text")
    try:
        return [json.loads(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not JSON lines ({error.msg}); write one JSON object per line") from error


def _checked_labels(rows: Sequence[Mapping[str, str]], n_folds: int) -> tuple[str, ...]:
    """The emotions of a corpus in the order of JUDGE_LABELS, once every row has been found usable."""
    for row in rows:
        if not isinstance(row, Mapping) or not all(isinstance(row.get(k), str) for k in ("id", "emotion", "text")):
            raise InputError(f"a judge corpus row needs the strings id, emotion and text; got {row!r:.120}")
        if row["emotion"] not in JUDGE_LABELS:
            raise unknown("emotion in the judge corpus", row["emotion"], JUDGE_LABELS)
    labels = tuple(label for label in JUDGE_LABELS if any(row["emotion"] == label for row in rows))
    if len(labels) < 2:
        raise InputError("the judge corpus needs at least two emotions; add texts of another emotion")
    for label in labels:
        groups = {row.get("group") or row["id"] for row in rows if row["emotion"] == label}
        if len(groups) < n_folds:
            raise InputError(f"the judge corpus has {len(groups)} groups of {label} texts; give at least {n_folds}")
    return labels


class TextClassificationJudge:
    """Any Hugging Face text-classification model, its labels mapped onto ours.

    `label_map` sends each of the model's labels to one of JUDGE_LABELS, or to None to leave it out; without
    it the package's own label table decides. Labels that meet add up; left-out mass is shared by
    renormalising. Raises InputError for labels without a place. Text beyond the model's maximum length is not
    read.
    """

    def __init__(
        self,
        model_id_or_path: str | Path,
        label_map: Mapping[str, str | None] | None = None,
        *,
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        source = str(model_id_or_path)
        config: Any = AutoConfig.from_pretrained(source)
        own = [str(config.id2label[i]) for i in range(len(config.id2label))]
        self._columns = _label_columns(own, label_map)
        covered = {label for label in self._columns if label is not None}
        self.labels = tuple(label for label in JUDGE_LABELS if label in covered)
        self.name = f"classifier:{source}"
        self._multi_label = config.problem_type == "multi_label_classification"
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForSequenceClassification.from_pretrained(source, use_safetensors=True)
        self._model = model.eval().to(device)
        self._max_length = min(self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        self._batch_size = batch_size

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Probabilities [n, n_labels] of the texts; a row without any mass on our labels is NaN."""
        import torch

        texts = list(texts)
        own = np.empty((len(texts), len(self._columns)))
        for chunk in batches_by_length(texts, self._batch_size, "Classifying texts"):
            batch = self._tokenizer(
                [texts[i] for i in chunk],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()
                scores = logits.sigmoid() if self._multi_label else logits.softmax(-1)
            own[chunk] = scores.cpu().numpy()
        onto = np.array([[label == column for label in self.labels] for column in self._columns], dtype=np.float64)
        mass = own @ onto
        total = mass.sum(axis=1, keepdims=True)
        return np.divide(mass, total, out=np.full_like(mass, np.nan), where=total > 0)


def _label_columns(own: list[str], label_map: Mapping[str, str | None] | None) -> list[str | None]:
    """Our label for each of the model's labels, in the model's order."""
    if label_map is None:
        from emocircuits.data.emotions import map_labels

        try:
            label_map = map_labels(own, JUDGE_LABELS)
        except InputError as error:
            raise InputError(f"the classifier's labels need a label_map onto our emotions: {error}") from error
    if missing := [label for label in own if label not in label_map]:
        raise InputError(f"the classifier's labels {', '.join(missing)} have no emotion; pass a label_map for them")
    for target in label_map.values():
        if target is not None and target not in JUDGE_LABELS:
            raise unknown("label_map target", target, JUDGE_LABELS)
    columns = [label_map[label] for label in own]
    if len({c for c in columns if c is not None}) < 2:
        raise InputError("the label_map leaves fewer than two emotions to choose from; map more of the labels")
    return columns
