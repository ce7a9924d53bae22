"""Steering by latents: push along a decoder row in doses of its own maximum, or scale a component at the ends of steps.

Every steerer made here is an `emocircuits` Steerer: it composes, takes schedules, saves and goes to the hub as one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from emocircuits.activations.control import Control
from emocircuits.activations.edits import HEAD_SITES
from emocircuits.activations.sites import Key
from emocircuits.errors import InputError
from emocircuits.models.anatomy import resolve, unwrap
from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, Term

from .features import Activity
from .metrics import Coder
from .splice import check_place

DOSES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
"""Levels to sweep, in units of a latent's maximum activation: both signs, since effects turn over with the dose."""


def latent_steerer(
    model: Any,
    sae: Coder,
    key: Key,
    latent: int,
    activity: Activity,
    *,
    dose: float = 1.0,
    positions: str = "generated",
    control: Control | None = None,
) -> Steerer:
    """Adds dose x (the latent's maximum activation) x (its decoder row) at `key`.

    activity: of the model's own data, for published maxima are of other data. control: where it acts besides, such as
    `steering.controls.step_ends(tokenizer)`. Raises InputError for a latent that does not exist or never fires, and as
    `check_place` does.
    """
    check_place(model, sae, key)
    maximum = _maximum(activity, latent)
    vector = sae.W_dec[latent].detach().float().cpu() * maximum
    about = {
        "latent": latent,
        "maximum": maximum,
        "density": float(activity.density[latent]),
        "unit": "maximum activation",
    }
    return _steerer(model, key, vector, dose, f"latent {latent}", about, positions, control)


def matched_latents(
    sae: Coder,
    activity: Activity,
    latent: int,
    n: int = 5,
    *,
    exclude: Collection[int] = (),
    max_cosine: float = 0.3,
    seed: int = 0,
) -> list[int]:
    """Control latents: n drawn from the 3n that are most like `latent` in density and maximum (as ratios).

    Their decoder rows lie away from its own (cosine at most `max_cosine` either way); `exclude` names latents of the
    same meaning. Raises InputError when there are not enough.
    """
    _maximum(activity, latent)
    size = torch.stack([activity.density, activity.maximum]).clamp_min(1e-12).log()
    distance = (size - size[:, [latent]]).abs().sum(0)
    rows = normalize(sae.W_dec.detach().float().cpu(), dim=-1)
    fits = (activity.maximum > 0) & ((rows @ rows[latent]).abs() <= max_cosine)
    fits[[latent, *exclude]] = False
    candidates = fits.nonzero()[:, 0]
    if len(candidates) < n:
        raise InputError(f"only {len(candidates)} latents can stand beside latent {latent}; ask for fewer than {n}")
    nearest = candidates[distance[candidates].argsort()[: 3 * n]]
    drawn = torch.randperm(len(nearest), generator=torch.Generator().manual_seed(seed))[:n]
    return sorted(nearest[drawn].tolist())


def component_steerer(
    model: Any,
    key: Key,
    direction: Tensor,
    scale: float,
    *,
    control: Control | None = None,
    positions: str = "generated",
    name: str = "component",
) -> Steerer:
    """h + (scale - 1) w (w^T h), w = direction [d_model] / its norm: 0 removes the component, 1 keeps it, 2 doubles it.

    RISE (arXiv 2512.23988) does so at the tokens that end steps: give `control=step_ends(tokenizer)`. Raises InputError
    as `unit` does.
    """
    w = unit(model, key, direction)
    return _steerer(model, key, w, 1 - scale, name, {"scale": scale}, positions, control, "remove")


def direction_steerer(
    model: Any,
    key: Key,
    direction: Tensor,
    norm: float,
    *,
    dose: float = 0.1,
    control: Control | None = None,
    positions: str = "generated",
    name: str = "direction",
) -> Steerer:
    """Adds dose x norm x w, w = direction [d_model] / its norm; norm: mean residual norm at `key`, the unit of doses.

    Raises InputError for a norm that is not positive, and for directions as `component_steerer` does.
    """
    if not 0 < norm < math.inf:
        raise InputError(f"doses are in residual norms, so the norm must be a positive number, not {norm}")
    vector = norm * unit(model, key, direction)
    return _steerer(model, key, vector, dose, name, {"unit": "residual norm", "norm": norm}, positions, control)


def unit(model: Any, key: Key, directions: Tensor) -> Tensor:
    """Directions [d_model] or [k, d_model] of the residual stream as float32 unit vectors on the CPU.

    Raises InputError for one that is zero, not finite, or of another size, and for a key that names heads.
    """
    width = resolve(model).d_model
    if directions.shape[-1:] != (width,) or not torch.isfinite(directions).all() or not directions.any(-1).all():
        raise InputError(
            f"a direction must be {width} finite numbers, not all zero; this one is {list(directions.shape)}"
        )
    if key[0] in HEAD_SITES:
        raise InputError(f"directions are of the residual stream, not of {key[0]!r}")
    return normalize(directions.detach().float().cpu(), dim=-1)


def _maximum(activity: Activity, latent: int) -> float:
    if not 0 <= latent < len(activity.maximum):
        raise InputError(f"latent {latent} does not exist; this SAE has 0 to {len(activity.maximum) - 1}")
    if not activity.maximum[latent] > 0:
        raise InputError(
            f"latent {latent} fires nowhere in the data, so it has no maximum to be dosed by; choose another"
        )
    return float(activity.maximum[latent])


def _steerer(
    model: Any, key: Key, vector: Tensor, strength: float, name: str, about: Mapping[str, Any], positions: str,
    control: Control | None, mode: str = "add",
) -> Steerer:  # fmt: skip
    heads = resolve(model).n_units(key[0]) if key[0] in HEAD_SITES else None
    term = Term(key[0], (key[1],), vector[None], float(strength), positions, heads, mode, control=control)
    return Steerer((term,), name, fingerprint(unwrap(model)), None, {"site": key[0], "layer": key[1], **about})
