"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from emocircuits.models.fingerprint import fingerprint
from emocircuits.steering import Steerer, Term

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.real_model
def test_the_example_steers(demo, tmp_path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = demo.model
    vectors = 400 * torch.nn.functional.normalize(
        torch.randn(4, 640, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    made = Steerer((Term("resid_post", (8, 9, 10, 11), vectors),), "sadness", fingerprint(model))
    monkeypatch.chdir(tmp_path)
    made.save("runs/demo/steerers/sadness.safetensors")
    exec(compile(code, "README.md", "exec"), {})
    steered, ramped = capsys.readouterr().out.split("<bos>")[1:]
    assert steered.startswith("I told my friend:")
    assert ramped.startswith("I told my friend:")
    assert steered != ramped
    assert not model.get_submodule("model.layers.8")._forward_hooks
