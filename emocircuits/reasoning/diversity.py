"""How differently a chain of thought speaks from turn to turn, without a judge: hierarchical segment entropy.

The text is cut where a sentence turns to another line of thought, its segments are embedded, and single linkage joins
them by cosine distance. At each height h the segments lie in clusters of shares q, with entropy H(h) = -sum q log2 q,
which falls from log2 N (all apart) to 0 (all joined). The measure is the integral of H over h from 0 on, over log2 N.
It is 0 for segments that say the same, and the distance of two segments when there are two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .importance import Similarity
from .society import Measure
from .steps import SPLITTERS, split
from .traces import Steps

_TURNS = (
    "wait", "hmm+", "hold on", "actually", "alternatively", "on the other hand", "however", "yet", "still", "instead",
    "but", "then again", "conversely", "another (?:way|view|approach|reading|possibility)", "what if", "maybe",
    "perhaps", "from (?:his|her|their|another|the other)", "looking at it", "seen from", "one (?:could|might) say",
    "some(?:one|body) (?:could|might)",
)  # fmt: skip
SHIFT = re.compile(rf"(?:(?:but|so|and|or) )?(?:{'|'.join(_TURNS)})\b|no[,:;.]", re.IGNORECASE)
"""What a sentence begins with that turns to another line of thought."""


def shifts(text: str) -> Iterator[int]:
    """Offsets of the sentences that begin with a shift marker."""
    return (at for at in SPLITTERS["sentence"](text) if SHIFT.match(text[at : at + 80].lstrip()))


def segments(text: str) -> Steps:
    """The text cut before each sentence that begins with a shift marker. Raises InputError for an empty text."""
    return split(text, shifts)


def segment_entropy(text: str, encode: Callable[[Sequence[str]], NDArray[np.floating]] | None = None) -> Measure:
    """Hierarchical segment entropy of a text; NaN for one without a turn.

    encode: texts -> unit vectors [n, d]; MiniLM by default, which reads the first 256 word pieces of a segment. It
    grows when a text falls apart, too: look at whether the answers are still right beside it.
    """
    found = segments(text).texts
    if len(found) < 2:
        return Measure(math.nan, "no sentence turns to another line of thought, so there is one segment")
    rows = np.asarray(Similarity(encode).vectors(found), dtype=np.float64)
    upper = np.triu_indices(len(rows), 1)
    return Measure(linkage_entropy(1 - (rows @ rows.T)[upper]))


def linkage_entropy(distances: ArrayLike) -> float:
    """Integral of cluster entropy over height, over log2 N, from condensed distances [N (N - 1) / 2], N >= 2.

    Raises InputError for another number of distances.
    """
    from scipy.cluster.hierarchy import linkage

    given = np.maximum(np.asarray(distances, dtype=np.float64), 0.0)  # rounding may leave a little below zero
    n = (1 + math.isqrt(1 + 8 * given.size)) // 2
    if given.ndim != 1 or n < 2 or n * (n - 1) // 2 != given.size or not np.isfinite(given).all():
        raise InputError(f"distances must be one finite number per pair of at least two segments, not {given.shape}")
    sizes, entropy, height, area = dict.fromkeys(range(n), 1.0), math.log2(n), 0.0, 0.0
    for step, (a, b, at, _) in enumerate(linkage(given, "single")):
        area += entropy * (at - height)
        parts = sizes.pop(int(a)), sizes.pop(int(b))
        entropy += sum(_term(size / n) for size in (sum(parts), *(-size for size in parts)))
        sizes[n + step], height = sum(parts), at
    return area / math.log2(n)


def _term(share: float) -> float:
    """-q log2 q, subtracted for a negative share."""
    return -share * math.log2(abs(share))
