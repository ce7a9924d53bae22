"""Run folders of `emocircuits anchors` and `emocircuits sae demo` with synthetic numbers, for pages that show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from synthetic_run import interval

from emocircuits.artefact import write_json_atomic, write_jsonl_atomic
from emocircuits.reasoning import parts as saved


def write_anchors(path: Path, steps: int = 5, n: int = 3) -> Path:
    """A run of `emocircuits anchors` with synthetic numbers, summed up by the library."""
    from emocircuits.reasoning.findings import page, summary
    from emocircuits.reasoning.study import _clean

    rng, emotions = np.random.default_rng(0), ["anger", "fear", "joy"]

    def rows(scale: float) -> list[dict[str, Any]]:
        names = ("value", "low", "high", "floor", "p", "headroom", "none_rate")
        made = [dict(zip(names, rng.uniform(0, scale, len(names)).tolist())) for _ in range(steps)]
        return [{**row, "n_without": 4, "n_with": 4, "reason": ""} for row in made]

    parts = []
    for i in range(n):
        shares = rng.dirichlet(np.ones(3), steps + 1).T
        lower = saved.Lower(rng.uniform(size=steps * (steps - 1) // 2).astype(np.float32), steps)
        found = {"shares": dict(zip(emotions, shares.tolist()))}
        part = {
            "id": f"p{i}", "steps": [f"Step {k} of <b>trace</b> {i}." for k in range(steps)],
            "labels": [("cause", "goal")[k % 2] for k in range(steps)], "truth": "fear", "answer": None,
            "named": [k % 2 for k in range(steps)], "tokens": [5] * steps, "forced": {**found, "kl": rows(1.0)},
            "sampled": {**found, "tokens": 40, "resampling": rows(1.0), "counterfactual": rows(1.0)},
            "receivers": {
                "kurtosis": rng.normal(size=(4, 4)).tolist(),
                "vertical": rng.uniform(size=(4, 4, steps)).astype(np.float32),
            },
            "suppression": {"kl": lower, "on_answer": rng.uniform(size=steps).tolist(), "noise": 1e-9},
            "emotion": {
                "layer": 2, "emotions": emotions, "carried": rng.normal(size=(steps, 3)).tolist(), "judged": "fear",
                "pushed": "joy", "doses": [-0.1, 0.1], "odds": rng.normal(size=(steps, 2)).tolist(),
                "everywhere": [-1.0, 1.0], "control": rng.normal(size=(steps, 2)).tolist(),
                "control_everywhere": [0.0, 0.1], "clean": 0.3,
            },
        }  # fmt: skip
        parts.append(_clean(part))
        saved.write(path / f"trace_p{i}.json", parts[-1])
        told = [
            {"boundary": 0, "index": k, "text": "So. <i>It</i> goes.", "step": "So.", "answer": "fear"} for k in (0, 1)
        ]
        write_jsonl_atomic(path / f"trace_p{i}.rollouts.jsonl", [{"kind": "rollouts", "version": 1}, *told])
    found = _clean(summary(parts))
    settings = {"kind": "anchors", "model": {"name": "synthetic/lm"}, "plan": {}, "seed": 0}
    write_json_atomic(path / "manifest.json", {"kind": "run", "settings": settings, "stages": {}})
    write_json_atomic(path / "anchors.json", found)
    (path / "report.html").write_text(page(found, parts, "synthetic/lm"))
    return path


def write_sae(path: Path) -> Path:
    """A run of `emocircuits sae demo` with synthetic numbers; one emotion's latent steers, another's does not."""

    def row(latent: int, **more: Any) -> dict[str, Any]:
        top = [{"activation": 3.0, "label": "fear", "text": f"<b>Shadow</b> {latent}"}]
        return {"latent": latent, "lift": 2.0, "z": 5.0, "q": 0.01, "words": ["dark", "run"], "top": top, **more}

    def cell(method: str, dose: float, value: float) -> dict[str, Any]:
        names = ("expression", "coherent", "degenerate")
        return {"method": method, "dose": dose, **{n: interval(value) for n in names}}

    quality = {
        "explained_variance": 0.6, "l0": 16.0, "dead": 0.1, "max_cosine_mean": 0.3,
        "density_histogram": {"log10_edges": [-3.0, -2.0, -1.0], "counts": [5, 2]},
    }  # fmt: skip
    cells = [
        cell("none", 0.0, 0.1),
        *(cell(m, d, 0.5) for m in ("steered", "random", "matched 5") for d in (-1.0, 1.0)),
    ]
    steered: dict[str, Any] = {
        "latent": 3, "matched": [5], "best_dose": 1.0, "cells": cells, "rises": 0.9,
        "confirmed": {
            "dose": 1.0, "scenarios": 30, "cells": [c for c in cells if c["dose"] != -1.0],
            "differences": {m: {"p": 0.01, **interval(0.4)} for m in ("none", "random", "matched 5")},
            "survives_every_control": True,
        },
    }  # fmt: skip
    weak = {**steered["confirmed"], "survives_every_control": False}
    weak["differences"] = {**weak["differences"], "random": {"p": 0.3, **interval(0.1)}}
    kept, lost = (
        {"held_out_lift": 1.5, "held_out_p": 0.01, "replicates": True},
        {"held_out_lift": None, "held_out_p": None, "replicates": False},
    )
    report = {
        "plan": {"layer": 2},
        "quality": {
            "vectors": 900, "held_out_themes": quality, "baselines": {"pca": quality}, "recovered": 0.9,
            "kl_recovered": 0.8, "tokens_scored": 50, "stability": {"mean_matched_cosine": 0.4, "random": 0.2},
        },
        "geometry": {
            "places": [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], "kinds": ["fear", None, "anger"],
            "separation": {"n": 2, "silhouette": 0.1, "by_label": {"fear": 0.1, "anger": 0.1}, "null_mean": 0.0,
                           "null_high": 0.05, "p": 0.01},
            "together": [{"a": 3, "b": 5, "both": 9, "expected": 2.0, "jaccard": 0.4, "cosine": 0.1, "q": 0.01,
                          "lift": 4.5}],
        },
        "features": {
            "emotions": {"fear": [row(3, **kept), row(4, **lost)], "joy": []},
            "counts": {"fear": 2, "joy": 0}, "appraisals": {"cause": [row(7)], "goal": []},
        },
        "steering": {"fear": steered, "anger": {**steered, "latent": 9, "confirmed": weak}},
    }  # fmt: skip
    settings = {"kind": "sae", "model": {"name": "synthetic/lm"}, "plan": {}, "seed": 0}
    write_json_atomic(path / "manifest.json", {"kind": "run", "settings": settings, "stages": {}})
    write_json_atomic(path / "sae.json", report)
    return path
