"""Conflict clips as a batch for `emocircuits balance`, with their pictures and sounds for the explorer.

python experiments/nano_mllm/batch.py --out runs/nano-balance
emocircuits balance --model experiments/nano_mllm/checkpoint --inputs runs/nano-balance/conflict.safetensors \\
    --answers anger,sadness,happiness,fear,surprise,disgust --out runs/nano-balance/run
emocircuits explore runs/nano-balance/run

The model answers with a word of its own vocabulary, so --prefix is not needed. Clips are held-out people's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evaluate import recipe_of
from gallery import write_media
from model import CHECKPOINT, collate
from safetensors.torch import save_file
from sets import HELD_OUT, clip_seeds, evaluation_sets

NAME = "conflict"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the batch, and the clips where a run beside it will look for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/nano-balance"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--persons", type=int, default=5, help="six clips of each")
    options = parser.parse_args(arguments)
    recipe = recipe_of(json.loads((options.checkpoint / "training.json").read_text()))
    clips = evaluation_sets(HELD_OUT, options.persons, options.seed, recipe, (NAME,))[NAME]
    media = options.out / "clips"
    media.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(clip_seeds(NAME, options.persons, options.seed)):
        write_media(media / f"{NAME}, row {i}", clips, i, int(seed), recipe)
    save_file({k: v.contiguous() for k, v in collate(clips.items).items()}, options.out / f"{NAME}.safetensors")
    print(f"{len(clips.items)} prompts: {options.out / NAME}.safetensors; copy {media} into the run to see them")


if __name__ == "__main__":
    main()
