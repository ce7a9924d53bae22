"""What a run measures about its directions, its texts and its judge."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from . import artefact, quality
from .directions import DirectionSet, fit
from .evaluation import scoring
from .evaluation.statistics import clustered_bootstrap
from .examples import reply_examples
from .projection import readings_plane
from .reading import Features

if TYPE_CHECKING:
    from .demo import Demo


def measure(demo: Demo) -> dict[str, Any]:
    """The content of quality.json: two direction sets, each with its tests, null and reliability."""
    emotions = demo.plan.emotions
    replies, prompts = demo.directions("response_mean"), demo.directions("last_prompt")
    tests = {
        "replies": ("held-out themes, replies", "unseen scenarios of unseen themes; replies never name the emotion"),
        "prompts": ("held-out themes, prompts", "unseen scenarios of unseen themes; wordings seen in training"),
        "nounfree": (
            "held-out themes, noun-free wording",
            "a wording without any emotion word, never seen in training",
        ),
    }
    data = {"replies": demo.replies(True), "prompts": demo.prompts("heldout"), "nounfree": demo.prompts("nounfree")}
    sets = [
        _one_set(demo, "response_mean", replies, demo.replies(False), "replies", data, tests),
        _one_set(demo, "last_prompt", prompts, demo.prompts("train"), "prompts", data, tests),
    ]
    agreement = quality.cosines(replies, prompts)
    plane = readings_plane(demo.replies(False), demo.replies(True), emotions, sets[0]["best_layer"])
    artefact.write_json_atomic(demo.run.file("embedding.json"), plane)
    return {
        "emotions": list(emotions),
        "layers": list(replies.layers),
        "sets": sets,
        **_fits(demo, sets[0], data["replies"]),
        "confounds": _confounds(demo, sets, replies, agreement),
        "cosines": {"response_mean vs last_prompt": agreement.tolist()},
        "geometry": {
            "layer": sets[0]["best_layer"],
            "cosines": quality.geometry(replies, sets[0]["best_layer"]).tolist(),
        },
    }


def _one_set(
    demo: Demo, name: str, made: DirectionSet, train: Features, own: str, data: dict[str, Features], tests: dict
) -> dict[str, Any]:
    emotions, seed = demo.plan.emotions, demo.plan.seed
    across = quality.across_themes(train, emotions, seed=seed)
    null = quality.shuffled_null(train, data[own], emotions, n=10, seed=seed)
    order = [own, *(k for k in data if k != own)]
    rows = [
        {"name": tests[k][0], "what": tests[k][1], "rows": quality.held_out(made, data[k], seed=seed)} for k in order
    ]
    alone = quality.held_out(made, data[own], centred=False, seed=seed)
    rows.append(
        {
            "name": f"{tests[own][0]}, standing alone",
            "what": "no other emotion of the same scenario is known",
            "rows": alone,
        }
    )
    return {
        "name": name,
        "trained_on": f"{len(set(train.clusters))} scenarios of {len(set(train.themes))} themes",
        "method": made.method,
        "best_layer": made.layers[int(np.argmax(across))],
        "across_themes": across.tolist(),
        "null": {k: v.tolist() for k, v in null.items()},
        "split_half": quality.split_half(train, emotions, seed=seed).tolist(),
        "tests": rows,
    }


def _fits(demo: Demo, plain: dict[str, Any], test: Features) -> dict[str, Any]:
    """Other ways to fit the reply directions, and the read-out: the method and layer that training themes chose."""
    emotions, seed, train = demo.plan.emotions, demo.plan.seed, demo.replies(False)
    # LDA inverts a covariance per theme and layer, so it only looks around the layer the plain method chose.
    near = [layer for layer in train.layers if abs(layer - plain["best_layer"]) <= 3]
    across = quality.across_themes(train.at(near), emotions, method="lda", seed=seed)
    lda = _fit(train.at(near), test, emotions, "lda", across, seed)
    logistic = _fit(train.at([lda["layer"]]), test.at([lda["layer"]]), emotions, "logistic", None, seed)
    at_best = next(r for r in plain["tests"][0]["rows"] if r["layer"] == plain["best_layer"])
    diff_means = {"method": "diff_means", "layer": plain["best_layer"], "across_themes": max(plain["across_themes"])}
    diff_means |= {k: at_best[k] for k in ("accuracy", "low", "high", "auroc")}
    chosen = max((diff_means, lda), key=lambda found: found["across_themes"])
    known, unseen = (reply_examples(scenarios, emotions) for scenarios in (demo.train, demo.heldout))
    words = quality.without_model(known, unseen, emotions, seed=seed)
    kept = ("method", "layer", "across_themes", "accuracy", "low", "high", "auroc")
    return {"fits": [diff_means, lda, logistic, {k: words[k] for k in kept}], "readout": chosen}


def _fit(
    train: Features, test: Features, emotions: tuple[str, ...], method: str, across: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """One method at its best layer by `across` [n_layers] (leave-one-theme-out), scored on held-out themes."""
    slot = 0 if across is None else int(np.argmax(across))
    at = [train.layers[slot]]
    row = quality.held_out(fit(train.at(at), emotions, method=method, seed=seed), test.at(at), seed=seed)[0]
    kept = {k: row[k] for k in ("layer", "accuracy", "low", "high", "auroc")}
    return {"method": method, "across_themes": None if across is None else float(across[slot]), **kept}


def _confounds(
    demo: Demo, sets: list[dict[str, Any]], replies: DirectionSet, agreement: np.ndarray
) -> list[dict[str, Any]]:
    def at_best(index: int, test: str) -> float:
        chosen = sets[index]
        rows = next(t for t in chosen["tests"] if t["name"] == test)["rows"]
        return next(r["accuracy"] for r in rows if r["layer"] == chosen["best_layer"])

    layer = sets[0]["best_layer"]
    tails = quality.held_out(replies.select([layer]), demo.reply_tails().at([layer]), seed=demo.plan.seed)[0]
    return [
        {
            "name": "emotion noun",
            "what": "accuracy of prompt directions on a wording without emotion words, less that on seen wordings",
            "value": at_best(1, "held-out themes, noun-free wording") - at_best(1, "held-out themes, prompts"),
            "note": "a large loss means that the word for the emotion was learnt; reply directions avoid it",
        },
        {
            "name": "opening of the reply",
            "what": "accuracy of reply directions on replies without their first three words, less that on whole ones",
            "value": tails["accuracy"] - at_best(0, "held-out themes, replies"),
            "note": "a large loss means that the opener was learnt, not the emotion",
        },
        {
            "name": "opening token",
            "what": "accuracy of prompt directions (read one step before the reply) on whole replies",
            "value": at_best(1, "held-out themes, replies"),
            "note": "low transfer means that the next opener was learnt; reply directions read the whole reply",
        },
        {
            "name": "agreement",
            "what": f"mean cosine of reply and prompt directions at layer {layer}",
            "value": float(agreement[:, layer].mean()) if layer < agreement.shape[1] else None,
            "note": "1 would mean that both ways of reading find the same direction",
        },
    ]


def evaluate(demo: Demo) -> dict[str, Any]:
    """The content of evaluation.json."""
    from .evaluation.embeddings import SentenceEncoder

    rows, seed = demo.texts(), demo.plan.seed
    by_method = {m: [r for r in rows if r["method"] == m] for m in ("unsteered", "steered", "prompted", "random")}
    unsteered = {r["skeleton_id"]: r["text"] for r in by_method["unsteered"]}
    embed, labels = SentenceEncoder().encode, list(demo.judge.labels)
    steered = by_method["steered"]
    # An unsteered text is scored once per emotion: how often it would pass as that emotion by itself.
    as_target = [
        {**r, "emotion": e, "expressed": r["predicted"] == e, "named": False,
         "coherent": r["predicted"] == e and not r["degenerate"]}
        for e in demo.plan.emotions for r in by_method["unsteered"]
    ]  # fmt: skip
    scored = {"unsteered": as_target, **{m: by_method[m] for m in ("prompted", "random", "steered")}}
    return {
        "methods": {
            m: scoring.summarise(r, demo.plan.emotions, labels, unsteered, embed, seed) for m, r in scored.items()
        },
        "comparisons": [
            scoring.compare(steered, scored[other], "coherent", ("steered", other), seed)
            for other in ("unsteered", "prompted", "random")
        ],
        "kl_on_neutral": demo.kl(),
        "thresholds": demo.run.json_stage("thresholds", dict),
        "judge": _judge_card(demo, scored),
        "unsteered_labels": dict(Counter(r["predicted"] for r in by_method["unsteered"])),
    }


def _judge_card(demo: Demo, scored: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How far the judge can be trusted: on its own corpus, and on held-out replies whose emotion is known."""
    pairs = [
        (group.skeleton_id, emotion, text)
        for group, replies in demo.heldout.reply_groups()
        for emotion, text in replies.items()
    ]
    truth, texts = np.asarray([p[1] for p in pairs]), [p[2] for p in pairs]
    names = np.asarray(demo.judge.labels)
    correct = (names[demo.judge.probabilities(texts).argmax(1)] == truth).astype(float)
    without = (names[demo.judge.probabilities(list(map(_unpunctuated, texts))).argmax(1)] == truth).mean()
    report = demo.judge.report()
    return {
        "name": demo.judge.name,
        "cv_accuracy": float(report.accuracy),
        "recall": {k: float(v) for k, v in dict(report.summary()["recall"]).items()},
        "held_out_replies": {
            "accuracy": scoring.as_json(
                clustered_bootstrap(correct, np.asarray([p[0] for p in pairs]), seed=demo.plan.seed)
            ),
            "recall": {str(e): float(correct[truth == e].mean()) for e in names},
            "accuracy_without_punctuation": float(without),
        },
        "second": _without_punctuation(demo, scored),
    }


def _unpunctuated(text: str) -> str:
    return re.sub(r"[^\w\s']", " ", text)


def _without_punctuation(demo: Demo, scored: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The judge's verdicts on the same texts without punctuation: what is left is not due to ! and ?."""
    names, found = np.asarray(demo.judge.labels), {}
    for method, rows in scored.items():
        verdicts = names[demo.judge.probabilities([_unpunctuated(r["text"]) for r in rows]).argmax(1)]
        again = [
            {**r, "coherent": r["emotion"] == v and not (r["named"] or r["degenerate"])} for r, v in zip(rows, verdicts)
        ]
        found[method] = scoring.interval(again, "coherent", demo.plan.seed)
    return {"name": f"{demo.judge.name}, punctuation removed from every text", "coherent": found}
