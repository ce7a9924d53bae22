"""Steerer files of older format versions, brought up to date one version at a time."""

from __future__ import annotations

from torch import Tensor

from .. import artefact
from ..activations.edits import HEAD_SITES
from ..errors import ArtefactError


def add_heads(tensors: dict[str, Tensor], header: artefact.Header) -> tuple[dict[str, Tensor], artefact.Header]:
    """Version 0 to 1: every term says into how many heads it is cut (None outside q, k, v and z).

    Raises ArtefactError for a term at these sites, whose heads an old file does not tell.
    """
    for term in header["terms"]:
        if term["site"] in HEAD_SITES and "heads" not in term:
            raise ArtefactError(
                f"this steerer is of format version 0 and does not say how many heads its {term['site']!r} has; make it"
                " again"
            )
    return tensors, {**header, "terms": [{"heads": None, **term} for term in header["terms"]]}


def add_modes(tensors: dict[str, Tensor], header: artefact.Header) -> tuple[dict[str, Tensor], artefact.Header]:
    """Version 1 to 2: every term adds, and nothing is scheduled."""
    return tensors, {
        **header,
        "controls": [],
        "terms": [{"heads": None, "mode": "add", "control": None, **t} for t in header["terms"]],
    }


artefact.VERSIONS["steerer"] = 2
artefact.MIGRATIONS["steerer", 0] = add_heads
artefact.MIGRATIONS["steerer", 1] = add_modes
