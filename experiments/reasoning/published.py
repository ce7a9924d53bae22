"""Compute published Thought Anchors numbers again from published resamples: one table, one command.

    python experiments/reasoning/published.py FOLDER

FOLDER holds problems in the layout of the authors' website or hub ({model}/{kind}/problem_*). Writes
experiments/results/reasoning/published.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from emocircuits.artefact import write_json_atomic
from emocircuits.reasoning.importance import Similarity, different_trajectories, overdeterminedness
from emocircuits.reasoning.labels import THOUGHT_ANCHORS, EmbeddingLabeller, agreement, category_table
from emocircuits.reasoning.published import VALUES, load_published
from emocircuits.reasoning.steps import compat_split, cut_thinking, split

OUT = Path(__file__).parents[1] / "results" / "reasoning" / "published.json"


def main(folder: str) -> None:
    """All problems below the folder."""
    similarity, problems = Similarity(), []
    folders = sorted(Path(folder).glob("*/*/problem_*"))
    found = [load_published(p) for p in folders]
    labeller = EmbeddingLabeller(THOUGHT_ANCHORS)
    for place, published in zip(folders, found):
        trace, n = published.trace, len(published.trace) - 1  # the last step was never sampled: 0 by construction
        ours = {
            "different_trajectories_fraction": different_trajectories(trace, published.rollouts, similarity=similarity),
            "overdeterminedness": overdeterminedness(published.rollouts),
        }
        row = {"problem": trace.id, "steps": len(trace)}
        for name, values in ours.items():
            theirs = published.values[name][:n]
            gap = np.abs(values[:n] - theirs)
            row[name] = {
                "pearson": float(np.corrcoef(values[:n], theirs)[0, 1]), "largest_difference": float(gap.max()),
                "equal_to_1e-6": int((gap < 1e-6).sum()), "of": n,
            }  # fmt: skip
        reasoning = cut_thinking(json.loads((place / "base_solution.json").read_text("utf-8"))["solution"])[1]
        row["chunks_reproduced"] = compat_split(reasoning).texts == trace.steps.texts
        row["steps_of_our_splitter"] = len(split(reasoning))
        met = agreement(labeller.label(trace).labels, trace.labels, THOUGHT_ANCHORS)
        row["labeller"] = {"accuracy": met.accuracy, "kappa": met.kappa, "macro_f1": met.macro_f1}
        problems.append(row)
        print(row, flush=True)
    traces = [f.trace for f in found]
    categories = {
        name: [
            {"category": r.label, "n": r.n, "mean": r.mean.estimate, "position": r.position}
            for r in category_table(traces, [f.values[name] for f in found])
        ]
        for name in VALUES
    }
    write_json_atomic(OUT, {"problems": problems, "categories": categories})
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1])
