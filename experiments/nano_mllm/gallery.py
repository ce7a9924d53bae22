"""A few conflict clips to look at and listen to, and how the answer moves as attention is reallocated.

python experiments/nano_mllm/gallery.py     # writes reallocation.json and clips/; a minute on one thread

The explorer's Modality page shows them. Clips are held-out people's; the six of a person differ in what the voice says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rebalance
import torch
from clips import EMOTIONS, RATE, face, voice
from evaluate import RESULTS, recipe_of
from model import CHECKPOINT, label_probabilities, load
from PIL import Image
from scipy.io import wavfile
from sets import HELD_OUT, VALIDATION, EvaluationSet, Recipe, clip_seeds, evaluation_sets

from emocircuits.artefact import write_json_atomic

SCALE = 6
"""Screen pixels to one of the picture."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, speak and answer, for every policy of the evaluation and every strength."""
    options = _options(arguments)
    torch.set_num_threads(1)
    model = load(options.checkpoint)
    recipe = recipe_of(json.loads((options.checkpoint / "training.json").read_text()))
    conflict = evaluation_sets(HELD_OUT, options.persons, options.seed, recipe, ("conflict",))["conflict"]
    validation = evaluation_sets(VALIDATION, 10, options.seed, recipe, ("conflict",))["conflict"]
    source, target = ("audio", "image") if _gap(model, validation) > 0 else ("image", "audio")
    tried = [
        s for s in rebalance.settings(source, target, rebalance.sink_size(model, validation))
        if not isinstance(s.made, rebalance.Contrast)
    ]  # fmt: skip
    before = label_probabilities(model, conflict.items)
    answers = [rebalance.probabilities(model, conflict, s.made) for s in tried]
    folder, made = options.out / "clips", []
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(clip_seeds("conflict", options.persons, options.seed)):
        heard, seen = write_media(folder / f"{i:02d}", conflict, i, int(seed), recipe)
        made.append({
            "name": f"{i:02d}", "voice": heard, "face": seen, "before": _plain(before[i]),
            "after": {w: [_plain(p[i]) for s, p in zip(tried, answers) if s.way == w] for w in _ways(tried)},
        })  # fmt: skip
    strengths = {way: [s.strength for s in tried if s.way == way] for way in _ways(tried)}
    way = f"Attention moved from {source} to {target} by"
    found = {"answers": list(EMOTIONS), "way": way, "strengths": strengths, "rows": made}
    print(write_json_atomic(options.out / "reallocation.json", found))


def write_media(stem: Path, clips: EvaluationSet, i: int, seed: int, recipe: Recipe) -> tuple[str, str]:
    """Picture (.png) and sound (.wav) of one clip; returns the emotions of its voice and its face."""
    heard, seen, person = EMOTIONS[clips.heard[i]], EMOTIONS[clips.seen[i]], int(clips.persons[i])
    picture = face(seen, person, seed, recipe.faces)
    scaled = Image.fromarray(picture).resize([SCALE * n for n in picture.shape[:2]], Image.Resampling.NEAREST)
    scaled.save(stem.with_name(f"{stem.name}.png"))
    sound = voice(heard, person, seed, recipe.voices)
    wavfile.write(stem.with_name(f"{stem.name}.wav"), RATE, (sound * 32767).astype(np.int16))
    return heard, seen


def _gap(model: Any, clips: EvaluationSet) -> float:
    return float(rebalance.gaps(label_probabilities(model, clips.items), clips).mean())


def _ways(tried: Sequence[rebalance.Setting]) -> list[str]:
    return list(dict.fromkeys(s.way for s in tried))


def _plain(p: Any) -> list[float]:
    return [round(float(x), 4) for x in p]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--persons", type=int, default=1, help="six clips of each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
