"""Steerer files of an older format still load, or say why not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emocircuits.artefact import METADATA_KEY, VERSIONS, read_header
from emocircuits.errors import ArtefactError
from emocircuits.steering import Steerer, Term


def aged(path, version: int = 0):
    """The same file as old versions had it: terms without mode and control, in version 0 without heads too."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    del header["controls"]
    for term in header["terms"]:
        for key in ("mode", "control", "heads")[: 3 if version == 0 else 2]:
            del term[key]
    header["format_version"] = version
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize("version", [0, 1])
def test_an_old_file_loads_as_it_was(tmp_path, version: int) -> None:
    made = Steerer((Term("resid_post", (1, 2), torch.randn(2, 8), 0.5, "generated"),), "fear", provenance={"seed": 1})
    old = aged(made.save(tmp_path / "fear.safetensors"), version)
    back = Steerer.load(old)
    assert read_header(old)["format_version"] == version
    assert torch.equal(back.terms[0].vectors, made.terms[0].vectors)
    assert (back.terms[0].heads, back.terms[0].positions, back.strength) == (None, "generated", 0.5)
    assert (back.name, back.provenance) == ("fear", {"seed": 1})
    assert (back.terms[0].mode, back.terms[0].control) == ("add", None)
    assert read_header(back.save(old))["format_version"] == VERSIONS["steerer"] == 2


def test_old_terms_at_heads_cannot_be_guessed(tmp_path) -> None:
    made = Steerer((Term("z", (1,), torch.randn(1, 8), heads=2),))
    with pytest.raises(ArtefactError, match="does not say how many heads its 'z' has"):
        Steerer.load(aged(made.save(tmp_path / "z.safetensors")))
    assert Steerer.load(made.save(tmp_path / "z.safetensors")).terms[0].heads == 2
