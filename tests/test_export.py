"""Control vectors: written for llama.cpp, read back, and the same push."""

from __future__ import annotations

import pytest
import torch
import zoo

from emocircuits.activations import capture
from emocircuits.errors import ArtefactError, InputError
from emocircuits.steering import Ramp, Steerer, Term

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
from emocircuits.steering.export import from_gguf, to_easysteer, to_gguf  # noqa: E402


def steerer(layers: tuple[int, ...] = (1, 3), **how) -> Steerer:
    vectors = torch.randn(len(layers), 32, generator=torch.Generator().manual_seed(0))
    return Steerer((Term("resid_post", layers, vectors, 0.5, **how),), "fear")


def test_a_control_vector_pushes_as_the_steerer_does(tmp_path) -> None:
    model, ids = zoo.build("llama"), torch.tensor([[5, 6, 7, 8]])
    pushed = steerer() + 0.5 * steerer((3,))
    back = from_gguf(to_gguf(pushed, tmp_path / "fear.gguf"))
    values = []
    for one in (pushed, back):
        with one.attach(model):
            values.append(capture(model, ids, "final_norm", positions="all")["final_norm", 0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    assert back.name == "fear"
    assert list(tmp_path.iterdir()) == [tmp_path / "fear.gguf"]


def test_the_file_is_what_llama_cpp_reads(tmp_path) -> None:
    reader = gguf.GGUFReader(str(to_gguf(steerer(), tmp_path / "v.gguf", model_hint="gemma3")))
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "gemma3"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert {t.name: list(t.shape) for t in reader.tensors} == {"direction.1": [32], "direction.3": [32]}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: steerer((0, 2)), "never steers layer 0"),
        (lambda: steerer(positions="last"), "positions 'last'"),
        (lambda: Steerer((Term("mlp_out", (1,), torch.ones(1, 32)),), "x"), "term at 'mlp_out'"),
        (lambda: Steerer.rows([steerer(), None]), "vectors"),
        (lambda: Steerer((), "empty"), "no vectors"),
        (lambda: steerer().when(Ramp(0, 1, 5)), "changes its strength as it goes"),
        (lambda: steerer(mode="remove"), "does 'remove'"),
        (lambda: steerer((1, -1)), "layer -1"),
    ],
)
def test_what_the_format_cannot_say_is_refused_and_nothing_is_written(tmp_path, made, words) -> None:
    with pytest.raises(InputError, match=words):
        to_gguf(made(), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_easysteer_reads_the_same_file_and_layer_0_too(tmp_path) -> None:
    reader = gguf.GGUFReader(str(to_easysteer(steerer((0, 2)), tmp_path / "v.gguf")))
    assert [t.name for t in reader.tensors] == ["direction.0", "direction.2"]
    torch.testing.assert_close(torch.tensor(reader.tensors[1].data), steerer((0, 2)).terms[0].vectors[1] * 0.5)
    same = [f(steerer(), tmp_path / name).read_bytes() for f, name in ((to_gguf, "a"), (to_easysteer, "b"))]
    assert same[0] == same[1]
    with pytest.raises(InputError, match="positions 'last'"):
        to_easysteer(steerer(positions="last"), tmp_path / "w.gguf")


def test_repeng_and_this_package_read_each_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("numpy.float_", float, raising=False)  # its release names a type that NumPy 2 dropped
    repeng = pytest.importorskip("repeng", reason="repeng is not installed")
    theirs = repeng.ControlVector.import_gguf(to_gguf(steerer(), tmp_path / "ours.gguf"))
    assert sorted(theirs.directions) == [1, 3]
    theirs.export_gguf(tmp_path / "theirs.gguf")
    back = from_gguf(tmp_path / "theirs.gguf")
    torch.testing.assert_close(back.terms[0].vectors, steerer().terms[0].vectors * 0.5)


def test_other_files_are_no_control_vectors(tmp_path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ArtefactError, match="no readable GGUF"):
        from_gguf(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtefactError, match="no control vector"):
        from_gguf(tmp_path / "other.gguf")
