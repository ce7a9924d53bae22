"""How many latents of a kind take part in a trace, and how evenly (societies of thought, arXiv 2601.10825).

Coverage grows with a trace's length and with noise in its activations, whatever the latents mean. So every number
stands beside those of random latents that are as sparse and as strong, and groups are compared at equal length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from emocircuits.errors import InputError, unknown
from emocircuits.evaluation.fixed_effects import Effect, within_effect

from .features import Activity
from .metrics import Coder
from .steering import matched_latents

Floats = NDArray[np.float64]
MEASURES = ("coverage", "entropy")


@dataclass(frozen=True)
class Diversity:
    """Per trace [n]: coverage, how many tagged latents fire, and entropy, -sum q ln q of their shares of activation.

    length: rows (tokens or steps) of each trace. null_coverage, null_entropy: [n, sets], of matched random latents.
    Entropy is NaN where none of the latents fires. tagged: the latents counted, those that fire nowhere left out.
    """

    traces: tuple[str, ...]
    length: NDArray[np.int64]
    coverage: Floats
    entropy: Floats
    tagged: tuple[int, ...]
    null_coverage: Floats = field(repr=False)
    null_entropy: Floats = field(repr=False)

    def excess(self, measure: str) -> Floats:
        """[n] coverage or entropy less its mean over the matched sets; NaN where either is undefined."""
        if measure not in MEASURES:
            raise unknown("measure", measure, MEASURES)
        null = getattr(self, f"null_{measure}")
        return getattr(self, measure) - null.mean(1) if null.shape[1] else np.full(len(self.traces), np.nan)


def diversity(
    codes: Any,
    records: Sequence[Mapping[str, Any]],
    tagged: Sequence[int],
    sae: Coder,
    *,
    sets: int = 20,
    seed: int = 0,
) -> Diversity:
    """Coverage and entropy of the `tagged` latents in each trace, with `sets` sets of matched random latents as null.

    codes: [N, d_sae] of `encode_all`; records say each row's trace. Raises InputError for rows without a record,
    negative codes, latents that do not exist, none that fires, and more tagged latents than others to match them.
    """
    if len(records) != codes.shape[0]:
        raise InputError(f"there are {codes.shape[0]} rows and {len(records)} records; give one for each")
    if codes.nnz and codes.data.min() < 0:
        raise InputError("codes are negative in places, so there are no shares of activation; use an SAE with a ReLU")
    if bad := [i for i in tagged if not 0 <= i < codes.shape[1]]:
        raise InputError(f"latent {bad[0]} does not exist; this SAE has 0 to {codes.shape[1] - 1}")
    activity = Activity.of(codes)
    live = [i for i in dict.fromkeys(tagged) if activity.maximum[i] > 0]
    if not live:
        raise InputError("none of the tagged latents fires in these traces; tag others")
    names, owner = np.unique([str(r["trace"]) for r in records], return_inverse=True)
    member = sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    summed = (member @ codes).tocsc()  # [traces, d_sae]
    null = [measures(summed[:, c].toarray()) for c in matched_sets(sae, activity, live, sets, seed)]
    shape = (len(names), len(null))
    covered, mixed = (np.stack([n[i] for n in null], 1) if null else np.zeros(shape) for i in (0, 1))
    return Diversity(
        tuple(names.tolist()), np.bincount(owner), *measures(summed[:, live].toarray()), tuple(live), covered, mixed
    )


def measures(summed: Floats) -> tuple[Floats, Floats]:
    """Coverage [n] and entropy [n] in nats from activation summed over each trace's rows [n, m]."""
    total = summed.sum(1, keepdims=True)
    share = np.divide(summed, total, out=np.zeros_like(summed, dtype=np.float64), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    return (summed > 0).sum(1).astype(np.float64), np.where(total[:, 0] > 0, entropy, np.nan)


def matched_sets(sae: Coder, activity: Activity, tagged: Sequence[int], sets: int, seed: int = 0) -> list[list[int]]:
    """`sets` times a latent like each tagged one in density and maximum, none tagged and none twice in a set.

    Raises InputError when there are fewer others than tagged latents.
    """
    others = int((activity.maximum > 0).sum()) - len(tagged)
    if sets and others < len(tagged):
        raise InputError(
            f"{len(tagged)} latents are tagged and {others} others fire, too few to match each; tag fewer, or sets=0"
        )
    rng, made = np.random.default_rng(seed), []
    for _ in range(sets):
        chosen: list[int] = []
        for latent in rng.permutation(list(tagged)).tolist():
            draw = int(rng.integers(2**31))
            chosen += matched_latents(sae, activity, latent, 1, exclude=[*tagged, *chosen], seed=draw)
        made.append(chosen)
    return made


def diversity_effect(found: Diversity, measure: str, groups: Mapping[str, int], problems: Mapping[str, Any]) -> Effect:
    """How much more excess diversity traces of group 1 have than of group 0: on the same problems, given log length.

    groups, problems: by trace id. Traces where the measure is undefined are left out. Raises InputError for traces
    without a group or problem, and groups other than 0 and 1.
    """
    if missing := [t for t in found.traces if t not in groups or t not in problems]:
        raise InputError(f"trace {missing[0]!r} has no group or no problem; give both for every trace")
    group = np.array([groups[t] for t in found.traces], dtype=np.float64)
    if not set(group.tolist()) <= {0.0, 1.0}:
        raise InputError("groups must be 0 and 1: the group to compare with, and the one that is compared")
    excess = found.excess(measure)
    kept = np.flatnonzero(~np.isnan(excess))
    x = np.stack([group, np.log(found.length)], axis=1)
    return within_effect(excess[kept], x[kept], [problems[found.traces[i]] for i in kept])
