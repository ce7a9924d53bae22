"""A synthetic run folder: every number comes from a seeded generator, so nothing in it is a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from emocircuits.artefact import write_json_atomic, write_jsonl_atomic
from emocircuits.data.emotions import EKMAN6

RATES = {"unsteered": 0.10, "prompted": 0.42, "random": 0.09, "steered": 0.80}
FILES = ("quality", "embedding", "tuning", "evaluation", "dose")


def write_run(
    path: Path, *, emotions: tuple[str, ...] = EKMAN6, layers: int = 18, scenarios: int = 12, seed: int = 0
) -> Path:
    """Write a whole run folder of synthetic values; returns `path`."""
    rng = np.random.default_rng(seed)
    stages = {
        name: {"files": [f"{name}.json"], "sha256": "0" * 64, "seconds": float(rng.uniform(5, 90))} for name in FILES
    }
    settings = {"model": "synthetic/model-0", "seed": seed, "tokens": 60, "emotions": list(emotions)}
    manifest = {"kind": "run", "package_version": "0.0", "python": "3.11", "versions": {"torch": "0"}}
    write_json_atomic(path / "manifest.json", {**manifest, "settings": settings, "stages": stages})
    write_json_atomic(path / "quality.json", quality(rng, emotions, layers))
    write_json_atomic(path / "embedding.json", embedding(rng, emotions))
    write_json_atomic(path / "tuning.json", tuning(rng, emotions))
    write_json_atomic(path / "dose.json", dose(rng, emotions))
    write_json_atomic(path / "evaluation.json", evaluation(rng, emotions))
    write_jsonl_atomic(path / "texts.jsonl", texts(rng, emotions, scenarios))
    for name, value in circuits(rng, emotions, layers).items():
        write_json_atomic(path / "circuits" / f"{name}.json", value)
    return path


def write_usable_run(path: Path) -> Path:
    """A run whose model can be loaded: a tiny one with random weights beside it, with real artefacts read from it.

    Directions, steerers, circuits and units fit the model; the JSON files are synthetic, as in `write_run`.
    """
    import zoo

    from emocircuits.circuits.assemble import top
    from emocircuits.circuits.units import collect
    from emocircuits.demo import save_features
    from emocircuits.directions import fit
    from emocircuits.models.fingerprint import fingerprint
    from emocircuits.reading import Example, read

    emotions = ("anger", "fear", "joy")
    model, tokenizer = zoo.build("llama"), letters()
    home = path.parent / "tiny-model"
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    write_run(path, emotions=emotions, layers=4, scenarios=4)
    manifest = json.loads((path / "manifest.json").read_text())
    write_json_atomic(path / "manifest.json", manifest | {"settings": manifest["settings"] | {"model": str(home)}})
    texts = [
        Example(f"one day {i} ", e, str(i), response=f"{e} and more {e}", theme=str(i % 2), cluster=str(i))
        for i in range(4) for e in emotions
    ]  # fmt: skip
    readings = read(model, tokenizer, texts)
    for name in ("train", "heldout"):
        save_features(path / "features" / f"replies_{name}.safetensors", readings)
    made = fit(readings, emotions, fingerprint=fingerprint(model))
    made.save(path / "directions_response_mean.safetensors")
    units = collect(model, tokenizer, texts, made, position="response_mean")
    units.save(path / "circuits" / "units.safetensors")
    for i, emotion in enumerate(emotions):
        made.steerer(emotion, 0.2, [1, 2]).save(path / "steerers" / f"{emotion}.safetensors")
        top(emotion, units.heads()[i], units.neurons()[i], 2, 6, fingerprint=fingerprint(model)).save(
            path / "circuits" / f"{emotion}.safetensors"
        )
    write_json_atomic(path / "thresholds.json", {"perplexity": 200.0, "repetition": 0.9, "min_words": 1})
    return path


def write_balance(path: Path) -> Path:
    """A run of `emocircuits balance` with synthetic numbers."""
    names, modes = ("audio", "image"), ("mean", "knockout", "gradient")
    effect = {"audio": interval(0.8), "image": interval(0.3)}
    found = {
        "n_rows": 6, "modalities": list(names), "answers": ["anger", "fear"], "effects": dict.fromkeys(modes, effect),
        "differences": {m: {"image": interval(0.5)} for m in modes}, "changed": dict.fromkeys(modes[:2], effect),
        "mass": {n: [[0.2, None], [0.4, 0.1]] for n in names}, "mass_mean": dict.fromkeys(names, 0.3),
        "agreement": {"attention vs knockout": 0.3, "mean vs gradient": None}, "text_reliance": 0.25,
    }  # fmt: skip
    settings = {"model": {"name": "synthetic/mllm"}, "batches": ["batch.safetensors"], "answers": {}, "seed": 0}
    write_json_atomic(path / "manifest.json", {"kind": "run", "settings": settings, "stages": {}})
    write_json_atomic(path / "balance.json", found)
    way, sure, unsure = "share of <b>audio</b>'s attention to image", [0.9, 0.1], [0.4, 0.6]
    rows = [{"name": f"batch, row {i}", "before": sure, "after": {way: [sure, unsure]}} for i in range(6)]
    moved = {"answers": ["anger", "fear"], "strengths": {way: [0.5, 1.0]}, "rows": rows,
             "changed": {way: [interval(0.0), interval(0.9)]},
             "random": {way: [interval(0.0), interval(0.1)]}}  # fmt: skip
    write_json_atomic(path / "reallocation.json", moved)
    return path


def letters() -> Any:
    """A real fast tokenizer of the zoo's vocabulary: letters, a few signs, and a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    signs = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"\n<>()-"
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {sign: 4 + i for i, sign in enumerate(signs)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def circuits(rng: np.random.Generator, emotions: tuple[str, ...], layers: int) -> dict[str, Any]:
    """circuits/circuits.json, curves.json, evaluation.json and what the full comparison adds."""
    n, heads, ranks = len(emotions), 4, [1, 4, 16, 64]
    effects = rng.normal(0, 0.1, (n, layers, heads)).tolist()
    effects[0][layers - 1] = [None] * heads
    influence = rng.uniform(0, 2, (n, layers)).tolist()
    members = {"heads": 2, "neurons": 8, "negative": 0, "top_heads": [[1, 2]], "top_neurons": [[3, 17], [0, 4]]}
    shared = {"jaccard": 0.4, "chance": 0.2, "excess": 0.25}
    found = {
        "emotions": list(emotions), "position": "response_mean",
        "heads": {"direct": effects, "total": effects, "gradient": effects, "agreement": {"direct vs total": 0.3}},
        "neurons": {"ranks": ranks, "scores": (1 / np.outer(np.ones(n), ranks)).tolist(), "share_of_layer": influence},
        "influence": {"attn": influence, "mlp": influence, "cosine": {}, "correlation_with_cosine": 0.9},
        "members": dict.fromkeys(emotions, members), "overlap": {"heads": shared, "neurons": shared},
        "stability": {"heads": 0.7, "neurons": None},
        "reads": {emotions[0]: [{"head": [1, 2], "tokens": [["<bos>", 0.5], [" <b>", 0.2]]}]},
    }  # fmt: skip
    rows = [
        {"size": i, "n_heads": k, "n_neurons": 8 * k, "control": control, "action": action,
         **interval(0.2 * (i + 1) if control == "circuit" else 0.05)}
        for i, k in enumerate((1, 2, 4))
        for control in ("circuit", "layer-matched random", "another emotion's")
        for action in ("keep", "ablate", "enhance")
    ]  # fmt: skip
    excess = {"excess": 0.5, "least": None, "least_emotion": emotions[0]}
    base = evaluation(rng, emotions)["methods"]
    names = {"circuit": "steered", "random units": "random", "directions, same sites": "random",
             "direction steering": "steered", "prompting": "prompted", "random direction": "random"}  # fmt: skip
    gaps = [
        {"a": "circuit", "b": b, "what": "coherent", "difference": interval(0.2), "p": 0.001} for b in list(names)[1:]
    ]
    compared = {
        "methods": {k: base[v] for k, v in names.items()},
        "comparisons": gaps,
        "strengths": {},
        "n_scenarios": 10,
    }
    return {
        "circuits": found,
        "curves": {"rows": rows, "areas": {"circuit, keep": 0.4}, "n_texts": 24, "readout": "projection", "chosen": 2},
        "evaluation": compared,
        "rank_curves": {
            "rows": [
                {"rule": "direct", "kind": "neurons", "scope": scope, "k": k, "control": control, "action": action,
                 **interval(0.1 * k)}
                for scope in ("anywhere", "in each layer") for k in (1, 4) for control in ("best", "random")
                for action in ("ablate", "enhance")
            ],
        },
        "graphs": {"graphs": dict.fromkeys(emotions, graph()), "readout": "projection"},
        "stability": {
            "rows": [{"what": "wording <b>", "n_pairs": 3, "heads": excess, "neurons": excess}], "n_scenarios": 8,
        },
    }  # fmt: skip


def graph() -> dict[str, Any]:
    """Two heads and a neuron, with one edge that lowers the score."""
    places = (("heads", 0, 1), ("neurons", 1, 40), ("heads", 2, 3))
    nodes = [{"kind": k, "layer": n, "unit": u, "effect": 0.2 * n, "direct": 0.1} for k, n, u in places]
    return {"nodes": nodes, "edges": [[0, 1, 0.2], [0, 2, -0.1]]}


def interval(estimate: float, half: float = 0.05, n: int = 240) -> dict[str, Any]:
    """An interval around a rate or a difference of rates that is not negative, kept inside [0, 1]."""
    low, high = max(estimate - half, 0.0), min(estimate + half, 1.0)
    return {"estimate": estimate, "low": low, "high": high, "n": n, "n_clusters": n // 6, "confidence": 0.95}


def quality(rng: np.random.Generator, emotions: tuple[str, ...], layers: int) -> dict[str, Any]:
    n, at = len(emotions), np.arange(layers)
    chance = 1 / n

    def curve(top: float) -> list[float]:
        rise = 1 / (1 + np.exp(-(at - layers / 4)))
        return np.clip(chance + (top - chance) * rise + rng.normal(0, 0.01, layers), 0, 1).tolist()

    def rows(top: float) -> list[dict[str, Any]]:
        return [
            {
                "layer": i,
                "accuracy": a,
                "low": max(a - 0.05, 0),
                "high": min(a + 0.05, 1),
                "auroc": min(0.5 + a / 2, 1),
            }
            | {"recall": {e: float(np.clip(a + rng.normal(0, 0.05), 0, 1)) for e in emotions}}
            for i, a in enumerate(curve(top))
        ]

    def one(name: str, top: float) -> dict[str, Any]:
        return {
            "name": name,
            "trained_on": "replies in each emotion" if name == "response_mean" else "prompts that ask for it",
            "method": "diff_means",
            "best_layer": layers * 2 // 3,
            "across_themes": curve(top - 0.02),
            "null": {"mean": [chance] * layers, "high": [chance + 0.08] * layers},
            "split_half": (0.9 * np.ones((n, layers)) + rng.normal(0, 0.04, (n, layers))).clip(-1, 1).tolist(),
            "tests": [
                {"name": "held-out themes", "what": "replies on themes never used", "rows": rows(top)},
                {
                    "name": "other template",
                    "what": "the same scenarios in other words",
                    "rows": rows(top - 0.1),
                },
            ],
        }

    def fit(method: str, accuracy: float) -> dict[str, Any]:
        scores = {"accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.02, "auroc": 0.98}
        return {"method": method, "layer": layers * 2 // 3, "across_themes": accuracy - 0.02, **scores}

    cosines = rng.uniform(-0.5, 0.4, (n, n))
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, 1.0)
    return {
        "emotions": list(emotions),
        "layers": at.tolist(),
        "sets": [one("response_mean", 0.93), one("last_prompt", 0.97)],
        "fits": [
            fit("diff_means", 0.93),
            fit("lda", 0.94),
            fit("logistic", 0.92),
            {**fit("character n-grams, no model", 0.6), "layer": None},
        ],
        "readout": fit("lda", 0.94),
        "confounds": [
            {
                "name": "noun wording",
                "what": "cosine to a noun-based direction",
                "value": 0.21,
                "note": "low is good",
            },
            {
                "name": "opener token",
                "what": "accuracy without the first token",
                "value": 0.90,
                "note": "little lost",
            },
            {
                "name": "punctuation",
                "what": "accuracy without ! and ?",
                "value": None,
                "note": "too few texts remain",
            },
        ],
        "cosines": {"response_mean vs last_prompt": rng.uniform(0, 0.7, (n, layers)).tolist()},
        "geometry": {"layer": layers * 2 // 3, "cosines": cosines.tolist()},
    }


def embedding(rng: np.random.Generator, emotions: tuple[str, ...]) -> dict[str, Any]:
    points = [
        {"x": float(x), "y": float(y), "emotion": e, "theme": "Work", "held_out": i % 4 == 0}
        for k, e in enumerate(emotions)
        for i, (x, y) in enumerate(rng.normal((3 * np.cos(k), 3 * np.sin(k)), 0.9, (40, 2)))
    ]
    return {"layer": 12, "variance": [0.31, 0.17], "points": points}


def tuning(rng: np.random.Generator, emotions: tuple[str, ...]) -> dict[str, Any]:
    candidates = []
    for emotion in emotions:
        for layers in ([6, 7, 8], [9, 10, 11, 12], [12]):
            for strength in (0.05, 0.1, 0.2, 0.4):
                rate = float(np.clip(strength * 4 * rng.uniform(0.6, 1.1), 0, 0.95))
                broken = float(np.clip((strength - 0.2) * 3, 0, 1))
                row = {
                    "emotion": emotion,
                    "layers": layers,
                    "strength": strength,
                    "expression": rate,
                    "n": 24,
                }
                row |= {"coherent": rate * (1 - broken), "named": 0.05, "degenerate": broken}
                candidates.append(row | {"perplexity": float(9 * np.exp(2.5 * strength) * rng.uniform(0.9, 1.1))})
    chosen = {}
    for emotion in emotions:
        best = max((c for c in candidates if c["emotion"] == emotion), key=lambda c: c["coherent"])
        chosen[emotion] = {key: best[key] for key in ("layers", "strength", "coherent")}
    return {
        "candidates": candidates,
        "chosen": chosen,
        "n_scenarios": 24,
        "prompting": {"wording": "plain", "coherent": {"plain": 0.4, "asked": 0.35}},
    }


def dose(rng: np.random.Generator, emotions: tuple[str, ...]) -> dict[str, Any]:
    rows = []
    for emotion in emotions:
        for relative in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0):
            rate = float(np.clip(0.1 + 0.65 * relative * rng.uniform(0.8, 1.1), 0.01, 0.95))
            broken = float(np.clip(abs(relative) - 1.1, 0, 1))
            row = {
                "emotion": emotion,
                "strength": 0.2 * relative,
                "relative": relative,
                "expression": rate,
                "n": 24,
            }
            row |= {"coherent": rate * (1 - broken), "named": 0.04, "degenerate": broken}
            rows.append(row | {"perplexity": float(9 * np.exp(0.5 * abs(relative)) * rng.uniform(0.95, 1.05))})
    return {"rows": rows}


def evaluation(rng: np.random.Generator, emotions: tuple[str, ...]) -> dict[str, Any]:
    labels = [*emotions, "neutral"]
    return {
        "methods": {name: _method(rng, rate, emotions, labels) for name, rate in RATES.items()},
        "comparisons": [
            {"a": "steered", "b": other, "difference": interval(RATES["steered"] - RATES[other]), "p": p}
            for other, p in (("prompted", 0.0001), ("random", 0.0001), ("unsteered", 0.0002))
        ],
        "kl_on_neutral": {e: float(rng.uniform(0.1, 0.6)) for e in emotions},
        "thresholds": {"min_words": 8, "max_repetition": 0.35, "perplexity_limit": None},
        "judge": {
            "name": "embedding",
            "cv_accuracy": 0.88,
            "recall": {e: float(rng.uniform(0.75, 0.95)) for e in labels},
            "held_out_replies": {
                "accuracy": interval(0.84, 0.03),
                "recall": {e: float(rng.uniform(0.65, 0.95)) for e in emotions},
                "accuracy_without_punctuation": 0.79,
            },
            "second": {"name": "likelihood", "coherent": {"steered": interval(0.66), "random": interval(0.1)}},
        },
        "unsteered_labels": dict(zip(labels, rng.multinomial(40, np.ones(len(labels)) / len(labels)).tolist())),
    }


def _method(rng: np.random.Generator, rate: float, emotions: tuple[str, ...], labels: list[str]) -> dict[str, Any]:
    per = {e: float(np.clip(rate + rng.normal(0, 0.12), 0.02, 0.98)) for e in emotions}
    shares = [[per[e] if e == c else (1 - per[e]) / len(emotions) for c in labels] for e in emotions]
    return {
        "coherent": interval(rate),
        "expression": interval(min(rate + 0.04, 1.0)),
        "named": interval(0.05, 0.02),
        "degenerate": interval(0.03, 0.02),
        "perplexity": {"median": 8 + 5 * rate, "q25": 6 + 4 * rate, "q75": 11 + 7 * rate},
        "distinct_2": 0.91,
        "opener_concentration": 0.12,
        "repetition": 0.04,
        "length_words": 41.0,
        "similarity_to_unsteered": None if rate == RATES["unsteered"] else 0.48,
        "by_emotion": {
            e: {
                "coherent": interval(per[e], 0.13, 40),
                "expression": interval(min(per[e] + 0.03, 1), 0.13, 40),
                "named": 0.05,
                "degenerate": 0.02,
                "perplexity": 8 + 5 * rate,
            }
            for e in emotions
        },
        "confusion": {
            "rows": list(emotions),
            "columns": labels,
            "counts": [rng.multinomial(40, np.array(row) / sum(row)).tolist() for row in shares],
        },
    }


def texts(rng: np.random.Generator, emotions: tuple[str, ...], scenarios: int) -> list[dict[str, Any]]:
    words = ["paper", "window", "kettle", "morning", "letter", "garden", "road", "engine", "winter", "table"]
    rows = []
    for i in range(scenarios):
        theme, valence = ("Work", "Travel", "Family")[i % 3], ("positive", "neutral", "negative")[i // 3 % 3]
        prompt = f"Synthetic scenario {i}: the " + " ".join(rng.choice(words, 14)) + "."
        base = {"skeleton_id": f"{theme.lower()}_{i:02d}", "theme": theme, "valence": valence}
        for method, rate in RATES.items():
            for emotion in [None] if method == "unsteered" else emotions:
                named, broken = bool(rng.random() < 0.08), bool(rng.random() < 0.06)
                expressed = emotion is not None and bool(rng.random() < rate)
                asked = f"{prompt} Answer with {emotion}." if method == "prompted" else prompt
                rows.append(
                    {**base, "method": method, "emotion": emotion, "prompt": asked, "named": named}
                    | {
                        "text": "Synthetic text: the " + " ".join(rng.choice(words, 36)) + ".",
                        "degenerate": broken,
                    }
                    | {
                        "predicted": emotion if expressed else "neutral",
                        "target_probability": float(rng.random()),
                    }
                    | {"expressed": expressed, "coherent": expressed and not (named or broken)}
                    | {
                        "reason": "one word repeats" if broken else "",
                        "perplexity": float(rng.uniform(6, 20)),
                    }
                )
    return rows
