"""Circuits as steerers: the emotion's own mean difference, put back on the circuit's units (and the fair controls).

o_proj and down_proj are linear, so the whole intervention is one constant vector per sublayer: attach with
``compile_to="bias"`` and it costs nothing (Wang et al., arXiv 2510.11328, inject it unit by unit at every step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..directions import DirectionSet
from ..errors import InputError, unknown
from ..steering import Steerer, Term
from .assemble import Circuit
from .sublayers import attention_side, mlp_side
from .units import Units

COMPAT = ("fixed", "paper")


def circuit_steerer(circuit: Circuit, units: Units, *, strength: float = 1.0, compat: str = "fixed") -> Steerer:
    """Add strength x (emotion mean - mean of all emotions) on the circuit's heads (at z) and neurons (at mlp_post).

    Strength 1 restores the difference that was read in texts of the emotion. compat="paper" moves neurons at the last
    position of each pass only and heads everywhere, as published; "fixed" treats both alike, at all positions. Raises
    InputError when the circuit's emotion was not read or it has no members.
    """
    if compat not in COMPAT:
        raise unknown("compat", compat, COMPAT)
    if circuit.emotion not in units.emotions:
        raise unknown("emotion", circuit.emotion, units.emotions)
    if not len(circuit):
        raise InputError(f"the circuit for {circuit.emotion!r} has no members, so there is nothing to steer with")
    z, a = _differences(circuit, units)
    made = {"rule": circuit.rule, "heads": len(circuit.heads), "neurons": len(circuit.neurons), "compat": compat}
    terms = _terms(z, "z", strength, "all", units.z.shape[3])
    terms += _terms(a, "mlp_post", strength, "all" if compat == "fixed" else "last", None)
    return Steerer(terms, f"{circuit.emotion} circuit", units.fingerprint, None, made)


def _differences(circuit: Circuit, units: Units) -> tuple[Tensor, Tensor]:
    """The emotion's mean difference on the members, zero elsewhere: z [L, heads * head_dim] and mlp_post [L, d_mlp]."""
    e = units.emotions.index(circuit.emotion)
    z, a = units.deltas("z")[e], units.deltas("mlp_post")[e]
    n_layers, n_heads = z.shape[:2]
    heads = circuit.mask("heads", n_layers, n_heads)[..., None]
    return (z * heads).flatten(1), a * circuit.mask("neurons", n_layers, a.shape[1])


def _terms(vectors: Tensor, site: str, strength: float, positions: str, heads: int | None) -> tuple[Term, ...]:
    layers = [i for i, v in enumerate(vectors) if bool(v.any())]
    return (Term(site, tuple(layers), vectors[layers], strength, positions, heads),) if layers else ()


def all_units(emotion: str, units: Units) -> Circuit:
    """The control that was never published: every head and every neuron, so no selection at all."""
    n_layers, n_heads = units.z.shape[2:4]
    everything: dict[str, Any] = {
        kind: tuple((layer, unit) for layer in range(n_layers) for unit in range(width))
        for kind, width in (("heads", n_heads), ("neurons", units.mlp_post.shape[-1]))
    }
    nan: dict[str, Any] = {f"{k[:-1]}_scores": (float("nan"),) * len(v) for k, v in everything.items()}
    return Circuit(emotion, **everything, **nan, rule="all units")


def written(circuit: Circuit, units: Units, model: Any) -> dict[str, Tensor]:
    """What the circuit's steerer adds to the residual stream at strength 1, {"attn_out", "mlp_out"} [L, d_model].

    Exact without a norm after the sublayer; with one, for the mean scale of that norm.
    """
    z, a = _differences(circuit, units)
    out: dict[str, Tensor] = {}
    for name, x, side_of, scale in (
        ("attn_out", z, attention_side, units.attn_scale), ("mlp_out", a, mlp_side, units.mlp_scale)
    ):  # fmt: skip
        sides = [side_of(model, layer).weight.float().cpu() for layer in range(len(x))]
        out[name] = torch.stack([w @ v for w, v in zip(sides, x)]) * scale
    return out


def norm_matched(
    circuit: Circuit,
    units: Units,
    model: Any,
    directions: Mapping[str, DirectionSet] | DirectionSet,
    *,
    strength: float = 1.0,
) -> Steerer:
    """The fair rival of a circuit: plain directions at the same sublayers, pushing each as far as the circuit does.

    directions: one set for both kinds of sublayer, or {"attn_out": ..., "mlp_out": ...}.
    """
    terms: tuple[Term, ...] = ()
    for site, vectors in written(circuit, units, model).items():
        ds = directions[site] if isinstance(directions, Mapping) else directions
        unit = ds.units[ds.index(circuit.emotion)]
        terms += _terms(unit * vectors.norm(dim=-1, keepdim=True), site, strength, "all", None)
    return Steerer(terms, f"{circuit.emotion} norm-matched", units.fingerprint, None, {"matched_to": circuit.rule})
