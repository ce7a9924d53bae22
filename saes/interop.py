"""Anybody's autoencoder: loaded from disk or a hub, its hook and scale put to the test, and written for SAELens.

Published metadata is sometimes wrong about the hook (resid_pre for resid_post) or silent about a scale. Explained
variance at the stated place and at its neighbours, over a range of scales, tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emocircuits.activations import batches
from emocircuits.activations.sites import Key
from emocircuits.errors import ArtefactError, InputError
from emocircuits.models.anatomy import resolve
from emocircuits.reasoning.traces import Trace

from .lens import SAE, hook_name, parse_hook
from .metrics import Coder, fidelity
from .splice import check_place
from .tokens import Splitter, paragraphs, place_steps, read_steps
from .vectors import is_sink

MARGIN = 0.05  # of explained variance: less is no reason to doubt what is stated
FACTORS = tuple(2.0**e for e in range(-8, 9) if e)


def load_sae(source: str | Path, sae_id: str | None = None, *, device: str = "cpu") -> SAE[Any]:
    """An SAE from a folder in SAELens's format, or from a release (or hub repository) and the id of one of its SAEs.

    Raises InputError when there is none, ArtefactError when it cannot be read.
    """
    folder = Path(source).expanduser()
    if sae_id is None and not (folder / "cfg.json").is_file():
        raise InputError(
            f"{source} is no folder with an SAE (cfg.json, sae_weights.safetensors); for a hub, name sae_id"
        )
    try:
        return (
            SAE.load_from_disk(folder, device) if sae_id is None else SAE.from_pretrained(str(source), sae_id, device)
        )
    except Exception as error:  # the loaders of many formats raise whatever they like
        where = folder if sae_id is None else f"{sae_id} of {source}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"SAELens cannot load {where}: {reason[:200]}") from error


def stated_place(sae: SAE[Any]) -> Key | None:
    """The (site, layer) that an SAE's metadata names; None when it names none that can be read here."""
    try:
        return parse_hook(sae.cfg.metadata.hook_name)
    except InputError:
        return None


@dataclass(frozen=True)
class Scaled:
    """An SAE that sees vectors times `factor`; its reconstructions are scaled back."""

    sae: Coder
    factor: float

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows [d_sae, d]."""
        return self.sae.W_dec

    def encode(self, x: Tensor) -> Tensor:
        """Codes [N, d_sae] of unscaled vectors [N, d]."""
        return self.sae.encode(x * self.factor)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Unscaled vectors [N, d]."""
        return self.sae.decode(feature_acts) / self.factor


@dataclass(frozen=True)
class Fit:
    """How well an SAE explains the vectors of one place as they are, and times the factor that suits it best."""

    key: Key
    explained_variance: float
    l0: float
    mean_norm: float
    best_factor: float
    best_explained_variance: float


@dataclass(frozen=True)
class HookReport:
    """Fits at the stated place and around it. `verdict`: one sentence; `place`, `factor`: what to use."""

    stated: Key | None
    fits: tuple[Fit, ...]
    place: Key
    factor: float
    verdict: str

    @property
    def as_stated(self) -> bool:
        """Whether the SAE can be used just as its metadata says."""
        return self.place == self.stated and self.factor == 1


def neighbours(key: Key, n_layers: int) -> list[Key]:
    """The place itself, then what it may be mistaken for: the residual stream around it, the same site a layer away."""
    site, layer = key
    if site.startswith("resid"):
        here = {"resid_pre": layer, "resid_mid": layer + 0.5, "resid_post": layer + 1}[site]
        streams, around = [b for b in range(n_layers + 1) if 0 < abs(b - here) <= 1], []
    else:
        streams, around = [layer, layer + 1], [(site, i) for i in (layer - 1, layer + 1) if 0 <= i < n_layers]
    return [key, *around, *(("resid_pre", b) if b in (0, layer) else ("resid_post", b - 1) for b in streams)]


@torch.no_grad()
def check_hook(sae: Coder, vectors: Mapping[Key, Tensor], stated: Key | None) -> HookReport:
    """Compare how well an SAE explains vectors [N, d] of several places, the stated one among them.

    Places are compared at the scale that suits each best; a place or a scale is only doubted for a gain of more than
    0.05 in explained variance. Raises InputError when the vectors do not fit the SAE, or there are none.
    """
    if not vectors or (stated is not None and stated not in vectors):
        raise InputError(
            f"give the vectors of the stated place {stated} and of those around it; there are {list(vectors)}"
        )
    fits = tuple(_fit(sae, key, x) for key, x in vectors.items())
    own = next((fit for fit in fits if fit.key == stated), None)
    best = max(fits, key=lambda fit: fit.best_explained_variance)
    place = best if own is None or best.best_explained_variance > own.best_explained_variance + MARGIN else own
    factor = place.best_factor if place.best_explained_variance > place.explained_variance + MARGIN else 1.0
    return HookReport(stated, fits, place.key, factor, _verdict(own, place, factor))


def _fit(sae: Coder, key: Key, x: Tensor) -> Fit:
    explained, density = fidelity(sae, x)
    norm = float(x.float().norm(dim=1).mean())
    scores = {f: fidelity(Scaled(sae, f), x[:256])[0] for f in (1.0, *FACTORS, math.sqrt(x.shape[1]) / norm)}
    best = max(scores, key=scores.__getitem__)
    return Fit(key, explained, float(density.sum()), norm, best, fidelity(Scaled(sae, best), x)[0])


def _verdict(own: Fit | None, place: Fit, factor: float) -> str:
    name = f"{place.key[0]} {place.key[1]}"
    reached = place.explained_variance if factor == 1 else place.best_explained_variance
    scale = f", with vectors times {factor:.3g} ({place.explained_variance:.2f} as they are)" if factor != 1 else ""
    if not reached >= 0.5:
        return (
            f"nowhere near the stated hook is half of the variance explained (best {reached:.2f} at {name}{scale}):"
            " this SAE belongs to another model, another layer or another kind of text"
        )
    if own is None:
        return f"no hook is stated; the best place is {name} (explained variance {reached:.2f}{scale})"
    if own.key == place.key:
        wrong = "; its stated scale looks wrong" if factor != 1 else ""
        return f"the stated hook {name} fits (explained variance {reached:.2f}{scale}){wrong}"
    return (
        f"the stated hook {own.key[0]} {own.key[1]} looks wrong: explained variance is"
        f" {own.best_explained_variance:.2f} there and {reached:.2f} at {name}{scale}; use {name}"
    )


def check_on_model(
    sae: SAE[Any],
    model: Any,
    tokenizer: Any,
    traces: Iterable[Trace | str],
    *,
    stated: Key | None = None,
    reduce: str = "all",
    split: Splitter = paragraphs,
    n: int = 2048,
    batch_size: int = 4,
) -> HookReport:
    """`check_hook` on the model's own vectors of traces or texts: the first n rows that `reduce` reads of them.

    The begin token and other sinks are left out: they would make up most of the variance. `stated` defaults to what the
    SAE's metadata says. Raises InputError when SAE and model do not match, or neither names a place.
    """
    stated = stated or stated_place(sae)
    if stated is None:
        raise InputError(
            f"this SAE's hook {sae.cfg.metadata.hook_name!r} cannot be read here; pass stated=(site, layer)"
        )
    check_place(model, sae, stated)
    keys = neighbours(stated, resolve(model).n_layers)
    placed = place_steps(model, tokenizer, traces, reduce, split)
    rows: dict[Key, list[Tensor]] = {key: [] for key in keys}
    for index in batches(len(placed), [len(one.ids) for one in placed], batch_size):
        for key, x in read_steps(model, tokenizer, [placed[i] for i in index], keys).items():
            rows[key].append(x.float().cpu())
        if sum(map(len, rows[stated])) >= n:
            break
    found = {key: torch.cat(parts)[:n] for key, parts in rows.items()}
    kept = ~torch.stack([is_sink(x) for x in found.values()]).any(0)  # the same rows at every place
    return check_hook(sae, {key: x[kept] for key, x in found.items()}, stated)


@torch.no_grad()
def export(sae: SAE[Any], path: str | Path, *, place: Key | None = None, factor: float = 1.0) -> Path:
    """Write an SAE in SAELens's format, with `factor` folded into its weights and `place` as its hook.

    With a report of `check_hook`, `export(sae, path, place=report.place, factor=report.factor)` writes one that can be
    used as its metadata says. Raises InputError for a folder that holds an SAE, or an SAE that scales by itself.
    """
    path = Path(path).expanduser()
    if (path / "cfg.json").exists():
        raise InputError(f"{path} holds an SAE already; choose another folder")
    fixed = deepcopy(sae)
    if factor != 1:
        if sae.cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise InputError(
                f"this SAE scales its input itself ({sae.cfg.normalize_activations}); a factor has no meaning"
            )
        fixed.fold_activation_norm_scaling_factor(factor)
    if place is not None:
        fixed.cfg.metadata.hook_name = hook_name(place)
    fixed.save_model(path)
    return path
