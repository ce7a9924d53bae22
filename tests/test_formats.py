"""Other tools' vectors: each lands at the layer and place its own tool would put it, and no file runs code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import save_file

from emocircuits.activations import capture
from emocircuits.errors import ArtefactError, InputError
from emocircuits.steering import Steerer
from emocircuits.steering.formats import (
    from_array,
    from_hooks,
    from_persona,
    from_steering_vectors,
    hook_site,
    read_steerer,
)
from emocircuits.steering.tensor_files import read_tensors

IDS = torch.tensor([[5, 6, 7, 8]])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, steerer: Steerer | None = None) -> torch.Tensor:
    if steerer is None:
        return model(IDS).logits
    with steerer.attach(model):
        return model(IDS).logits


def hooked(model, module, vector: torch.Tensor) -> torch.Tensor:
    """Logits with a vector added to a module's output, by hand."""

    def add(_module, _inputs, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = module.register_forward_hook(add)
    try:
        return logits(model)
    finally:
        handle.remove()


# ---------------------------------------------------------------- what a layer means


@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp"])
def test_steering_vectors_pushes_the_same_in_both_packages(layer_type: str) -> None:
    package = pytest.importorskip("steering_vectors", reason="steering-vectors is not installed")
    model, vectors = zoo.build("llama"), noise(2, 32)
    theirs = package.SteeringVector({1: vectors[0], 3: vectors[1]}, layer_type)
    with theirs.apply(model):
        wanted = logits(model)
    torch.testing.assert_close(logits(model, from_steering_vectors(theirs)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer_type", "part"), [("decoder_block", ""), ("self_attn", "self_attn"), ("mlp", "mlp")])
def test_a_dict_of_layers_is_read_as_steering_vectors_means_it(tmp_path, layer_type: str, part: str) -> None:
    model, vector = zoo.build("llama"), noise(32)
    wanted = hooked(model, model.get_submodule(f"model.layers.2.{part}".rstrip(".")), vector)
    torch.save({2: vector}, tmp_path / "v.pt")
    for source in ({2: vector}, {"2": vector.numpy()}, tmp_path / "v.pt"):
        read = from_steering_vectors(source, layer_type=layer_type)
        torch.testing.assert_close(logits(model, read), wanted, atol=1e-5, rtol=1e-5)


def test_a_persona_row_is_the_block_before_it(tmp_path) -> None:
    """Row l + 1 of hidden_states is what block l wrote: adding hidden states of another text moves it there."""
    model, other = zoo.build("llama"), torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad():
        states = [
            (a - b).mean(1)[0]
            for a, b in zip(
                model(other, output_hidden_states=True).hidden_states,
                model(IDS, output_hidden_states=True).hidden_states,
            )
        ]
    torch.save(torch.stack(states), tmp_path / "evil.pt")
    read = from_persona(tmp_path / "evil.pt", 1)
    assert read.terms[0].layers == (1,)
    moved = (capture(model, other, "resid_post", positions="all")["resid_post", 1]).float().mean(1)
    with read.attach(model):
        steered = capture(model, IDS, "resid_post", positions="all")["resid_post", 1].float().mean(1)
    torch.testing.assert_close(steered, moved, atol=1e-4, rtol=1e-4)
    wanted = hooked(model, model.model.layers[1], states[2])
    torch.testing.assert_close(logits(model, read), wanted, atol=1e-5, rtol=1e-5)
    assert from_persona(torch.stack(states), [0, 2]).terms[0].layers == (0, 2)


def test_transformer_lens_names_are_our_sites() -> None:
    assert hook_site("blocks.5.hook_resid_post") == ("resid_post", 5)
    assert hook_site("blocks.0.attn.hook_z") == ("z", 0)
    assert hook_site("blocks.11.mlp.hook_post") == ("mlp_post", 11)
    model = zoo.build("llama")
    made = from_hooks({"blocks.1.hook_mlp_out": noise(32), "blocks.2.attn.hook_z": noise(4, 12)})
    assert [(t.site, t.layers, t.heads) for t in made.terms] == [("mlp_out", (1,), None), ("z", (2,), 4)]
    assert not torch.allclose(logits(model, made), logits(model), atol=1e-2)
    for bad in ("blocks.5.hook_scale", "embed.hook", "hook_resid_post"):
        with pytest.raises(InputError, match="unknown TransformerLens hook"):
            hook_site(bad)


def test_arrays_are_taken_as_they_are() -> None:
    model, vectors = zoo.build("llama"), noise(2, 32)
    read = from_array(vectors.numpy().astype(np.float64), [0, 2])
    assert read.strength == 1.0
    assert torch.equal(read.terms[0].vectors, vectors)
    one = from_array(vectors[0], 2)
    torch.testing.assert_close(
        logits(model, one), hooked(model, model.model.layers[2], vectors[0]), atol=1e-5, rtol=1e-5
    )
    heads = from_array(noise(2, 4, 8), [1, 2], "z")
    assert (heads.terms[0].heads, list(heads.terms[0].vectors.shape)) == (4, [2, 32])
    assert from_array(noise(2, 32), [1, 2], "z", heads=4).terms[0].heads == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: from_array(noise(2, 32), [1]), "do not fit 1 layers"),
        (lambda: from_array(noise(2, 32), []), "do not fit 0 layers"),
        (lambda: from_array(noise(32), 1, "nowhere"), "unknown site"),
        (lambda: from_array(["a"], 1), "no numbers"),
        (lambda: from_array(noise(32) * float("nan"), 1), "NaN"),
        (lambda: from_hooks({}), "no vectors"),
        (lambda: from_steering_vectors({1: noise(4)}, layer_type="input_layernorm"), "unknown layer type"),
        (lambda: from_steering_vectors({1: noise(4), 2: noise(5)}), "different widths"),
        (lambda: from_steering_vectors(noise(4)), "one vector per layer"),
        (lambda: from_persona(noise(5), 1), r"shape \[5\]"),
        (lambda: from_persona(noise(5, 4), 4), "from 0 to 3"),
        (lambda: from_persona(noise(5, 4), []), "from 0 to 3"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_files_by_format(tmp_path) -> None:
    torch.save({"3": noise(32), "1": noise(32)}, tmp_path / "fear.pt")
    read = read_steerer(tmp_path / "fear.pt", "steering-vectors", [3])
    assert (read.name, read.terms[0].layers) == ("fear", (3,))
    np.save(tmp_path / "a.npy", noise(2, 32).numpy())
    assert read_steerer(tmp_path / "a.npy", "array", [1, 2]).terms[0].layers == (1, 2)
    save_file({"blocks.1.hook_resid_post": noise(32)}, tmp_path / "h.safetensors")
    assert read_steerer(tmp_path / "h.safetensors", "array").terms[0].layers == (1,)
    np.savez(tmp_path / "h.npz", **{"blocks.1.hook_mlp_out": noise(32).numpy()})
    assert read_steerer(tmp_path / "h.npz", "array").terms[0].site == "mlp_out"
    torch.save(noise(5, 32), tmp_path / "p.pt")
    assert read_steerer(tmp_path / "p.pt", "persona", [0]).terms[0].layers == (0,)
    with pytest.raises(InputError, match="unknown layer 2; choose from 1, 3"):
        read_steerer(tmp_path / "fear.pt", "steering-vectors", [2])
    assert read_steerer(tmp_path / "fear.pt", "steering-vectors", site="mlp_out").terms[0].site == "mlp_out"
    with pytest.raises(InputError, match="unknown site of steering-vectors 'z'"):
        read_steerer(tmp_path / "fear.pt", "steering-vectors", site="z")
    with pytest.raises(InputError, match="unknown format"):
        read_steerer(tmp_path / "fear.pt", "onnx")


# ---------------------------------------------------------------- files that would run code


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def zipped(path, payload: bytes) -> None:
    """A pickle laid out as torch.save does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("layout", ["plain", "zip", "torch"])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, layout: str, protocol: int) -> None:
    made, bad = tmp_path / "made", tmp_path / "bad.pt"
    payload = pickle.dumps({1: Bomb(made)}, protocol=protocol)
    if layout == "plain":
        bad.write_bytes(payload)
    elif layout == "zip":
        zipped(bad, payload)
    else:
        torch.save({1: Bomb(made)}, bad, pickle_protocol=max(protocol, 2))
    for read in (read_tensors, from_steering_vectors, lambda p: from_persona(p, 1)):
        with pytest.raises(ArtefactError, match="could run code"):
            read(bad)
    assert not made.exists()
    pickle.loads(payload)  # it would have
    assert made.exists()


def test_other_files_are_refused_in_one_sentence(tmp_path) -> None:
    object_array = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "o.npy", object_array, allow_pickle=True)
    torch.save({"a": 1}, tmp_path / "n.pt")
    torch.save(noise(64, 64), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:3000])
    (tmp_path / "t.safetensors").write_text("hello")
    (tmp_path / "x.npz").write_text("hello")
    for name, words in (
        ("o.npy", "more than numbers"),
        ("n.pt", "other things than tensors"),
        ("cut.pt", "not opened"),
        ("t.safetensors", "no readable safetensors"),
        ("x.npz", "damaged"),
    ):
        with pytest.raises(ArtefactError, match=words):
            read_tensors(tmp_path / name)
    with pytest.raises(InputError, match="no file"):
        read_tensors(tmp_path / "absent.pt")
    (tmp_path / "x.txt").touch()
    with pytest.raises(InputError, match="cannot tell"):
        read_tensors(tmp_path / "x.txt")


def test_a_pickled_steering_vector_object_names_what_it_asks_for(tmp_path) -> None:
    package = pytest.importorskip("steering_vectors", reason="steering-vectors is not installed")
    torch.save(package.SteeringVector({1: noise(4)}), tmp_path / "v.pt")
    with pytest.raises(ArtefactError, match="asks for steering_vectors.steering_vector.SteeringVector"):
        read_tensors(tmp_path / "v.pt")
    torch.save(torch.nn.Parameter(noise(3, 4)), tmp_path / "p.pt")
    assert not isinstance(read_tensors(tmp_path / "p.pt"), dict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read(tmp_path, dtype: torch.dtype) -> None:
    torch.save(noise(5, 32).to(dtype), tmp_path / "p.pt")
    assert from_persona(tmp_path / "p.pt", 2).terms[0].vectors.dtype == torch.float32
