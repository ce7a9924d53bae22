"""Are the demo's emotion latents about a few tokens? Their own tokens in neutral replies, and out of their own steps.

    emocircuits sae demo --out runs/sae
    python experiments/saes/injection.py --run runs/sae --out experiments/results/saes

Reads a finished run of `emocircuits sae demo`: its first SAE, and the first three latents of each emotion in sae.json.
Cues are found in replies to training scenarios; own steps and neutral replies are of held-out themes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.data.emotions import NEUTRAL
from emocircuits.data.scenarios import discovery, heldout
from emocircuits.models.load import load
from saes.falsify import Settings, falsify
from saes.study import emotion_traces, scenario_of
from saes.tables import injection
from saes.train import Trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/sae"))
    parser.add_argument("--report", type=Path, help="which latents to test (default: the run's sae.json)")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/saes"))
    parser.add_argument("--latents", type=int, default=3, help="so many of each emotion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = json.loads((args.report or args.run / "sae.json").read_text("utf-8"))
    named = {e: [r["latent"] for r in rows[: args.latents]] for e, rows in report["features"]["emotions"].items()}
    trained, settings = (
        Trained.load(args.run / f"saes/seed_0/resid_post.{report['plan']['layer']}"),
        Settings(seed=args.seed),
    )
    unseen = emotion_traces(heldout())
    neutral = [t for t in unseen if t.id.endswith(f"/{NEUTRAL}")]
    loaded = load("demo")
    found = falsify(
        loaded.model, loaded.tokenizer, trained.sae, trained.key, [i for latents in named.values() for i in latents],
        emotion_traces(discovery()), unseen, neutral, settings, [scenario_of({"trace": t.id}) for t in neutral],
    )  # fmt: skip
    about: dict[str, Any] = {
        "model": loaded.name, "site": trained.key[0], "layer": trained.key[1], "settings": asdict(settings),
        "neutral_texts": len(neutral), "emotions": named, "latents": [f.as_dict() for f in found],
    }  # fmt: skip
    write_json_atomic(args.out / "injection.json", about)
    write_text_atomic(args.out / "injection.md", injection(about))


if __name__ == "__main__":
    main()
