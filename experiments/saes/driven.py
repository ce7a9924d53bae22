"""How much of the demo's emotion latents is the doing of the demo's circuits, of random units, of other emotions'?

    make demo
    emocircuits sae demo --out runs/sae
    python experiments/saes/driven.py --run runs/sae --circuits runs/demo/circuits --out experiments/results/saes

Reads finished runs: the first SAE with the first latents of each emotion in sae.json, and every emotion's circuit.
Texts are replies to scenarios of held-out themes, in all emotions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from emocircuits.artefact import write_json_atomic, write_text_atomic
from emocircuits.circuits.assemble import Circuit
from emocircuits.circuits.units import Units
from emocircuits.data.scenarios import heldout
from emocircuits.evaluation.scoring import number
from emocircuits.evaluation.statistics import holm
from emocircuits.models.load import load
from saes.driven import driven_by
from saes.study import emotion_traces, scenario_of
from saes.tables import driven
from saes.train import Trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/sae"))
    parser.add_argument("--circuits", type=Path, default=Path("runs/demo/circuits"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/saes"))
    parser.add_argument("--latents", type=int, default=3, help="so many of each emotion")
    parser.add_argument("--scenarios", type=int, default=20)
    parser.add_argument("--draws", type=int, default=3, help="sets of random units")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = json.loads((args.run / "sae.json").read_text("utf-8"))
    named = {e: [r["latent"] for r in rows[: args.latents]] for e, rows in report["features"]["emotions"].items()}
    latents = list(dict.fromkeys(i for mine in named.values() for i in mine))
    trained = Trained.load(args.run / f"saes/seed_0/resid_post.{report['plan']['layer']}")
    units = Units.load(args.circuits / "units.safetensors")
    circuits = {e: Circuit.load(args.circuits / f"{e}.safetensors") for e in named}
    traces, loaded = emotion_traces(heldout(), args.scenarios), load("demo")
    by: dict[str, dict[int, Any]] = {}
    for emotion, circuit in circuits.items():
        found = driven_by(
            loaded.model, loaded.tokenizer, trained.sae, trained.key, traces, latents, circuit, units,
            draws=args.draws, clusters=[scenario_of({"trace": t.id}) for t in traces], seed=args.seed,
        )  # fmt: skip
        by[emotion] = {d.latent: asdict(d) for d in found}
        print(f"{emotion}: {len(circuit.heads)} heads, {len(circuit.neurons)} neurons", flush=True)
    rows = [
        {"emotion": e, **by[e][i], "others": {o: by[o][i]["lost"]["estimate"] for o in by if o != e}}
        for e, mine in named.items() for i in mine
    ]  # fmt: skip
    for row, p in zip(rows, holm(np.array([row["p"] for row in rows]))):
        row["p"] = number(p)
    about = {
        "model": loaded.name, "site": trained.key[0], "layer": trained.key[1], "texts": len(traces),
        "scenarios": args.scenarios, "draws": args.draws, "seed": args.seed, "rows": rows,
        "circuits": {e: {"heads": len(c.heads), "neurons": len(c.neurons)} for e, c in circuits.items()},
    }  # fmt: skip
    write_json_atomic(args.out / "driven.json", about)
    write_text_atomic(args.out / "driven.md", driven(about))


if __name__ == "__main__":
    main()
