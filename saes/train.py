"""Train sparse autoencoders on step vectors, one per layer, in folders that SAELens loads as they are.

A layer's folder holds SAELens's `cfg.json` and `sae_weights.safetensors`, our `training.json` (recipe, history,
quality) and, while it is not finished, `checkpoint.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emocircuits.activations.sites import Key
from emocircuits.artefact import package_version, write_json_atomic
from emocircuits.errors import ArtefactError, InputError

from ._run import Run
from .lens import SAE
from .metrics import quality
from .recipe import Recipe
from .vectors import Vectors

RECORD, CHECKPOINT = "training.json", "checkpoint.safetensors"
Report = Callable[[Key, Mapping[str, float]], None]


@dataclass(frozen=True)
class Trained:
    """A finished SAE: where it lies, how it was trained, and its quality on held-out traces (see `metrics.Quality`)."""

    path: Path
    key: Key
    recipe: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = field(repr=False)
    best_epoch: int
    quality: Mapping[str, Any]
    held_out: Sequence[int] = field(repr=False)  # rows of the vectors that were never trained on
    source: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Trained:
        """The result in a layer's folder. Raises ArtefactError when there is none, or it is unreadable."""
        path = Path(path).expanduser()
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            return cls(path, (str(record["site"]), int(record["layer"])), *(record[name] for name in _FIELDS))
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError(f"{path} holds no finished training run ({error}); check the path") from error

    @property
    def sae(self) -> SAE[Any]:
        """The SAE as SAELens loads it."""
        return SAE.load_from_disk(self.path)


_FIELDS = ("recipe", "history", "best_epoch", "quality", "held_out", "source")


def train(
    vectors: Vectors | Sequence[Vectors],
    recipe: Recipe,
    path: str | Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 5,
    device: str = "cpu",
    report: Report | None = None,
    progress: bool = True,
) -> dict[Key, Trained]:
    """Train one SAE per layer's vectors into `path`/"site.layer", with the same recipe and the same held-out traces.

    resume: skip layers that are finished and go on with a started one, bit for bit as if it had not stopped; a
    checkpoint is written every `checkpoint_every` epochs. `report` receives each epoch's record. Raises InputError for
    vectors that cannot be trained on (too few, NaN, constant), all of them checked before the first layer is trained.
    """
    sets = [vectors] if isinstance(vectors, Vectors) else list(vectors)
    folders = {one.key: Path(path).expanduser() / f"{one.key[0]}.{one.key[1]}" for one in sets}
    if len(folders) < len(sets):
        raise InputError("two sets of vectors are from the same site and layer; train them into different folders")
    for folder in folders.values():
        taken = [name for name in (RECORD, CHECKPOINT) if (folder / name).exists()]
        if taken and not resume:
            raise InputError(f"{folder} holds a run already ({taken[0]}); pass resume=True, or choose another folder")
    finished = {key: Trained.load(folder) for key, folder in folders.items() if (folder / RECORD).exists()}
    for trained in finished.values():
        if trained.recipe != recipe.as_dict():
            raise InputError(f"{trained.path} was trained by another recipe; choose another folder for this one")
    wanted = [one for one in sets if one.key not in finished]
    for one in wanted:
        recipe.check(len(one.split(recipe.held_out, recipe.split_seed)[0]), one.d)
        one.read()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bars:
        for one in wanted:
            run, folder = Run(one, recipe, device), folders[one.key]
            if (folder / CHECKPOINT).exists():
                run.load(folder / CHECKPOINT)
            task = bars.add_task(f"SAE at {folder.name}", total=recipe.epochs, completed=run.epochs_done)
            while not run.finished:
                record = run.epoch()
                bars.update(task, advance=1, description=f"SAE at {folder.name}: EV {record['explained_variance']:.3f}")
                if run.epochs_done % checkpoint_every == 0:
                    run.save(folder / CHECKPOINT)
                if report is not None:
                    report(one.key, record)
            bars.update(task, total=run.epochs_done)
            _finish(run, folder)
    return {key: Trained.load(folder) for key, folder in folders.items()}


def _finish(run: Run, folder: Path) -> None:
    """Write SAELens's two files, measure what they hold on the held-out vectors, and put the record last."""
    vectors, sae = run.vectors, run.result()
    held_out = vectors.split(run.recipe.held_out, run.recipe.split_seed)[1]
    about = {
        "site": vectors.key[0],
        "layer": vectors.key[1],
        "source": dict(vectors.source),
        "scaling": {"factor": run.scaling.factor, "centre_norm": float(run.scaling.centre.norm())},
        "package_version": package_version(),
    }
    sae.cfg.metadata.emocircuits = about | {"units": "vectors as collected; decoder rows of unit norm"}
    sae.save_inference_model(folder)
    record = about | {
        "recipe": run.recipe.as_dict(),
        "history": run.history,
        "best_epoch": run.best_epoch,
        "quality": quality(SAE.load_from_disk(folder), vectors.rows[held_out].float()).as_dict(),
        "n_train": len(run.train),
        "held_out": held_out.tolist(),
    }
    write_json_atomic(folder / RECORD, record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
