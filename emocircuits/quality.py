"""How good are directions, layer by layer, on scenarios and themes they have not seen, and against chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .directions import DirectionSet, fit
from .errors import InputError
from .evaluation.statistics import auroc, clustered_bootstrap
from .reading import Example, Features

NO_MODEL = "character n-grams, no model"


def held_out(
    directions: DirectionSet, features: Features, *, centred: bool = True, seed: int = 0
) -> list[dict[str, Any]]:
    """Accuracy and macro AUROC at each layer on readings the directions were not fitted on.

    One dict per layer: accuracy with a 95 % bootstrap interval clustered by scenario, auroc, recall per emotion.
    The largest projection is the predicted emotion; `centred` removes each scenario's own mean (see `scores`).
    """
    kept = features.complete(directions.emotions)
    scores, truth = directions.scores(kept, centred), _labels(kept, directions.emotions)
    rows = []
    for slot, layer in enumerate(directions.layers):
        found = scores[:, slot].numpy()
        correct = (found.argmax(1) == truth).astype(float)
        interval = clustered_bootstrap(correct, np.asarray(kept.clusters), seed=seed)
        rows.append(
            {
                "layer": layer,
                "accuracy": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "auroc": float(np.mean([auroc(found[:, e], truth == e) for e in range(len(directions.emotions))])),
                "recall": {name: float(correct[truth == e].mean()) for e, name in enumerate(directions.emotions)},
            }
        )
    return rows


def accuracy_by_layer(directions: DirectionSet, features: Features, *, centred: bool = True) -> np.ndarray:
    """[n_layers] share of readings whose largest projection is their own emotion."""
    kept = features.complete(directions.emotions)
    scores = directions.scores(kept, centred)
    return (scores.argmax(-1).numpy() == _labels(kept, directions.emotions)[:, None]).mean(0)


def shuffled_null(
    train: Features, test: Features, emotions: Sequence[str], *, method: str = "diff_means", n: int = 20, seed: int = 0
) -> dict[str, np.ndarray]:
    """Held-out accuracy when labels are shuffled within groups before fitting: {"mean", "high"} [n_layers].

    "high" is the 95th percentile of the n shuffles. Difference-of-means fits only; slower methods cost n fits.
    """
    rng = np.random.default_rng(seed)
    kept, runs = train.complete(emotions), []
    for _ in range(n):
        shuffled = replace(kept, labels=tuple(_shuffle_within(kept.groups, kept.labels, rng)))
        runs.append(accuracy_by_layer(fit(shuffled, emotions, method=method, seed=seed), test))
    return {"mean": np.mean(runs, 0), "high": np.quantile(runs, 0.95, axis=0)}


def _shuffle_within(groups: Sequence[str], labels: Sequence[str], rng: np.random.Generator) -> list[str]:
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    out = [str(label) for label in labels]
    for index in members.values():
        drawn = [out[i] for i in rng.permutation(index).tolist()]
        for target, label in zip(index, drawn):
            out[target] = label
    return out


def split_half(train: Features, emotions: Sequence[str], *, n: int = 10, seed: int = 0) -> np.ndarray:
    """Mean cosine between directions fitted on random halves of the scenarios, [E, n_layers].

    Raises InputError when there are fewer than four scenarios.
    """
    kept = train.complete(emotions)
    clusters = np.unique(np.asarray(kept.clusters))
    if len(clusters) < 4:
        raise InputError(f"split-half reliability needs at least four scenarios, got {len(clusters)}")
    rng, total = np.random.default_rng(seed), torch.zeros(len(emotions), len(kept.layers))
    for _ in range(n):
        half = set(rng.permutation(clusters)[: len(clusters) // 2])
        mine = [c in half for c in kept.clusters]
        a, b = fit(kept.where(mine), emotions), fit(kept.where([not k for k in mine]), emotions)
        total += (a.units * b.units).sum(-1)
    return (total / n).numpy()


def across_themes(train: Features, emotions: Sequence[str], *, method: str = "diff_means", seed: int = 0) -> np.ndarray:
    """Leave-one-theme-out accuracy at each layer [n_layers], from the training readings alone; chooses layers.

    Raises InputError when all readings come from one theme.
    """
    kept = train.complete(emotions)
    themes = sorted(set(kept.themes))
    if len(themes) < 2:
        raise InputError("leave-one-theme-out needs readings from at least two themes")
    scores = []
    for theme in themes:
        inside = [t == theme for t in kept.themes]
        model = fit(kept.where([not k for k in inside]), emotions, method=method, seed=seed)
        scores.append(accuracy_by_layer(model, kept.where(inside)))
    return np.mean(scores, 0)


def without_model(
    train: Sequence[Example], test: Sequence[Example], emotions: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What the words alone give: directions fitted on n-grams of the responses (2 to 5 characters, TF-IDF).

    The same fit and the same test as of activations (difference of means, held-out themes), so that an accuracy says
    what the model adds. A row of `held_out` with `across_themes`; its layer is None.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    counted = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    counted.fit([e.response for e in train])

    def features(examples: Sequence[Example]) -> Features:
        x = torch.from_numpy(counted.transform([e.response for e in examples]).toarray()).float()
        told = ([getattr(e, name) for e in examples] for name in ("label", "group", "theme", "cluster"))
        return Features(x[:, None], *map(tuple, told), site="text", layers=(0,), position="response")

    known = features(train)
    row = held_out(fit(known, emotions, seed=seed), features(test), seed=seed)[0]
    across = float(across_themes(known, emotions, seed=seed)[0])
    return {**row, "method": NO_MODEL, "layer": None, "across_themes": across}


def cosines(a: DirectionSet, b: DirectionSet) -> np.ndarray:
    """Cosine of each emotion's direction in two sets, [E, n_layers]: how far two ways of reading agree."""
    if (a.emotions, a.layers) != (b.emotions, b.layers):
        raise InputError("both direction sets need the same emotions and layers to be compared")
    return (a.units * b.units).sum(-1).numpy()


def geometry(directions: DirectionSet, layer: int) -> np.ndarray:
    """[E, E] cosines between the emotions' directions at one layer."""
    units: Tensor = directions.units[:, directions.slots(layer)[0]]
    return (units @ units.T).numpy()


def _labels(features: Features, emotions: Sequence[str]) -> np.ndarray:
    order = list(emotions)
    return np.asarray([order.index(lab) for lab in features.labels])
