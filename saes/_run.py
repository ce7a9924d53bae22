"""One layer's training run: SAELens's trainer fed by epochs, able to stop after any and to go on as if it had not.

Nothing about the order of the data or the schedules is stored: both are functions of the seed and the step.
"""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emocircuits import artefact
from emocircuits.errors import ArtefactError, InputError

from .lens import SAEMetadata, SAETrainer, SAETrainerConfig, TrainStepInput, hook_name
from .recipe import Recipe
from .vectors import Scaling, Vectors, digest

KIND = "sae_checkpoint"
COUNTERS = ("n_forward_passes_since_fired", "act_freq_scores")  # tensors of the trainer
COUNTS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")  # its numbers


class Run:
    """Vectors, the SAE that trains on them, and how far it is: `epoch` advances it, `save` and `load` carry it over."""

    def __init__(self, vectors: Vectors, recipe: Recipe, device: str) -> None:
        self.vectors, self.recipe, self.device = vectors, recipe, device
        x = vectors.read()
        train, test = vectors.split(recipe.held_out, recipe.split_seed)
        recipe.check(len(train), vectors.d)
        self.scaling = Scaling.of(x[train])
        self.train, self.test = self.scaling(x[train]).to(device), self.scaling(x[test]).to(device)
        self.digest = digest(x)
        self.batch = min(recipe.batch_size, len(train))
        self.steps = len(train) // self.batch  # of an epoch: its incomplete batch is another one every time
        self.trainer = self._trainer(recipe.epochs * self.steps)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    def _trainer(self, total: int) -> SAETrainer[Any, Any]:
        warm_up = int(self.recipe.warm_up * total)
        metadata = SAEMetadata(
            model_name=(self.vectors.source.get("model") or {}).get("name"), hook_name=hook_name(self.vectors.key)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            sae = self.recipe.sae(self.vectors.d, warm_up, metadata).to(self.device)
        config = SAETrainerConfig(
            total_training_samples=total * self.batch,
            train_batch_size_samples=self.batch,
            lr=self.recipe.lr,
            lr_end=0.0,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=warm_up,
            dead_feature_window=self.steps,  # a latent is dead once it was silent for an epoch
            device=self.device,
        )
        return SAETrainer(config, sae, data_provider=iter(()))

    # -------------------------------------------------------------------------------------------- training

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind us."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The epoch with the least held-out loss since the warm-up (-1 before the first)."""
        first = min(math.ceil(self.recipe.warm_up * self.recipe.epochs), self.epochs_done - 1)
        losses = [record["held_out_loss"] for record in self.history[first:]]
        return first + losses.index(min(losses)) if losses else -1

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last `patience` of them brought no better held-out loss."""
        waited = self.epochs_done - 1 - self.best_epoch
        return self.epochs_done >= self.recipe.epochs or (self.epochs_done > 0 and waited >= self.recipe.patience)

    def epoch(self) -> dict[str, float]:
        """One pass over the training vectors, in an order of this epoch's own; the record it adds to `history`."""
        order = np.random.default_rng([self.recipe.seed, self.epochs_done]).permutation(len(self.train))
        loss = torch.zeros((), device=self.device)
        for rows in torch.from_numpy(order).split(self.batch)[: self.steps]:
            loss += self.trainer.step(self.train[rows]).loss.detach()
            self.trainer.n_training_steps += 1
        record = {"epoch": self.epochs_done, "loss": float(loss) / self.steps, **self._held_out()}
        if not math.isfinite(record["loss"] + record["held_out_loss"]):
            raise InputError(f"training diverged in epoch {self.epochs_done}: the loss is not finite; lower lr")
        self.history.append(record)
        if self.best_epoch == self.epochs_done - 1:
            self.best = {name: value.clone() for name, value in self.trainer.sae.state_dict().items()}
        return record

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        """Loss (penalties at full strength, nothing for dead latents), explained variance, L0 and dead share."""
        sae = self.trainer.sae
        full = {name: value if isinstance(value, float) else value[0] for name, value in sae.get_coefficients().items()}
        loss = error = active = 0.0
        for x in self.test.split(self.batch):
            acts, pre = sae.encode_with_hidden_pre(x)
            out = sae.decode(acts)
            step = TrainStepInput(x, full, None, self.trainer.n_training_steps, False)
            aux = sae.calculate_aux_loss(step_input=step, feature_acts=acts, hidden_pre=pre, sae_out=out)
            squared = float((out - x).pow(2).sum())
            loss += squared + len(x) * sum(map(float, aux.values() if isinstance(aux, dict) else [aux]))
            error, active = error + squared, active + float((acts != 0).sum())
        n, total = len(self.test), float((self.test - self.test.mean(0)).pow(2).sum())
        return {
            "held_out_loss": loss / n,
            "explained_variance": 1 - error / total if total > 0 else math.nan,
            "l0": active / n,
            "dead": float(self.trainer.dead_neurons.float().mean()),
        }

    # -------------------------------------------------------------------------------------------- the result

    @torch.no_grad()
    def result(self) -> Any:
        """The best epoch's SAE in the vectors' own units: it takes and returns them unscaled.

        Decoder rows have unit norm, so an activation times its row is what the latent adds to the residual stream.
        """
        sae = deepcopy(self.trainer.sae)
        sae.load_state_dict(self.best)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = self._threshold(sae)
        sae.fold_W_dec_norm()
        if hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
            sae.cfg.rescale_acts_by_decoder_norm = False  # folded just now
        centre, factor = self.scaling.centre.to(self.device), self.scaling.factor
        sae.b_enc /= factor
        sae.b_dec.copy_(sae.b_dec / factor + centre)
        for name in ("threshold", "topk_threshold"):
            if hasattr(sae, name):
                getattr(sae, name).div_(factor)
        return sae

    def _threshold(self, sae: Any) -> Tensor:
        """The mean, over batches of training vectors, of the least activation that BatchTopK keeps.

        SAELens's running mean starts at zero and needs hundreds of steps to forget it, which a small set may not have.
        """
        least = [acts[acts > 0].min() for x in self.train.split(self.batch) if (acts := sae.encode(x)).any()]
        return torch.stack(least).double().mean() if least else sae.topk_threshold

    # -------------------------------------------------------------------------------------------- checkpoints

    def _identity(self) -> dict[str, Any]:
        return {"key": list(self.vectors.key), "recipe": self.recipe.as_dict(), "data": self.digest}

    def save(self, path: Path) -> None:
        """Write all that the next epoch depends on: weights, Adam's moments, counters and the history."""
        adam = self.trainer.optimizer.state_dict()["state"]
        tensors = {f"sae.{name}": value for name, value in self.trainer.sae.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"adam.{i}.{name}": value for i, state in adam.items() for name, value in state.items()}
        tensors |= {f"count.{name}": getattr(self.trainer, name) for name in COUNTERS}
        counts = {name: getattr(self.trainer, name) for name in COUNTS}
        artefact.save(path, KIND, tensors, {**self._identity(), "history": self.history, "counts": counts})

    def load(self, path: Path) -> None:
        """Go on where `save` left off. Raises ArtefactError for a checkpoint of other vectors or another recipe."""
        tensors, header = artefact.load(path, KIND, self.device)
        for name, value in self._identity().items():
            if header[name] != value:
                raise ArtefactError(f"{path} was made with another {name}; resume with the same, or start a new folder")
        trainer = self.trainer
        groups: dict[str, dict[str, Tensor]] = {"sae": {}, "best": {}, "adam": {}, "count": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        trainer.sae.load_state_dict(groups["sae"])
        self.best, self.history = groups["best"], header["history"]
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["adam"].items():
            i, _, rest = name.partition(".")
            adam.setdefault(int(i), {})[rest] = value
        for name in COUNTERS:
            setattr(trainer, name, groups["count"][name])
        for name in COUNTS:
            setattr(trainer, name, header["counts"][name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of these
            for _ in range(trainer.n_training_steps):
                trainer.lr_scheduler.step()
                for scheduler in trainer.coefficient_schedulers.values():
                    scheduler.step()
        groups_now = trainer.optimizer.state_dict()["param_groups"]
        trainer.optimizer.load_state_dict({"state": adam, "param_groups": groups_now})
