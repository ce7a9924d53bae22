"""Artefact files: what goes in comes out, and nothing damaged, foreign or half-written is ever accepted."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from emocircuits import artefact
from emocircuits.errors import ArtefactError, InputError

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements={"allow_nan": False} if np.issubdtype(dtype, np.floating) else None,
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda name: name != "__metadata__"
)
OWN_FIELDS = {"kind", "format_version", "package_version", "created", "sha256"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small artefact of kind "thing"."""
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2])}
    return artefact.save(tmp_path / "thing.safetensors", "thing", tensors, {"layers": [1, 2]})


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@SHARED_FOLDER
@given(arrays=st.dictionaries(NAMES, ARRAYS, max_size=3), header=st.dictionaries(st.text(), JSON, max_size=3))
def test_round_trip_keeps_values_types_shapes_and_header(
    tmp_path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any]
) -> None:
    header = {key: value for key, value in header.items() if key not in OWN_FIELDS}
    tensors, found = artefact.load(artefact.save(tmp_path / "x", "thing", arrays, header), "thing")
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        back = tensors[name].numpy()
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)
    assert {key: value for key, value in found.items() if key not in OWN_FIELDS} == header
    assert found["kind"] == "thing"
    assert leftovers(tmp_path) == []


def test_views_shared_memory_bfloat16_and_gradients_are_stored_as_values(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    given_tensors = {
        "whole": base,
        "transposed": base.T,
        "row": base[1],
        "again": base,
        "half": base.bfloat16(),
        "leaf": torch.ones(2, requires_grad=True),
    }
    tensors, _ = artefact.load(artefact.save(tmp_path / "views", "thing", given_tensors, {}), "thing")
    for name, value in given_tensors.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_suffix_is_added_and_missing_folders_are_made(tmp_path: Path) -> None:
    assert artefact.save(tmp_path / "new" / "v1.2", "thing", {}, {}) == tmp_path / "new" / "v1.2.safetensors"


def test_a_loaded_header_can_be_saved_again_with_fresh_own_fields(saved: Path) -> None:
    tensors, header = artefact.load(saved, "thing")
    again = artefact.save(saved.with_name("again"), "other", tensors, header)
    assert artefact.load(again, "other")[1]["layers"] == [1, 2]


def test_header_alone_can_be_read(saved: Path) -> None:
    assert artefact.read_header(saved) == artefact.load(saved, "thing")[1]


def test_the_file_has_the_permissions_of_any_new_file(saved: Path) -> None:
    (saved.parent / "plain").touch()
    assert saved.stat().st_mode == (saved.parent / "plain").stat().st_mode


# ---------------------------------------------------------------- refusing what is wrong


@SHARED_FOLDER
@given(data=st.data())
def test_truncation_at_any_byte_is_an_artefact_error(saved: Path, data: st.DataObject) -> None:
    whole = saved.read_bytes()
    cut = saved.with_name("cut.safetensors")
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ArtefactError):
        artefact.load(cut, "thing")


@SHARED_FOLDER
@given(data=st.data())
def test_a_changed_tensor_byte_is_an_artefact_error(saved: Path, data: st.DataObject) -> None:
    damaged = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(damaged[:8], "little")
    damaged[data.draw(st.integers(start, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    copy = saved.with_name("damaged.safetensors")
    copy.write_bytes(damaged)
    with pytest.raises(ArtefactError, match="damaged"):
        artefact.load(copy, "thing")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b'{"kind": "thing"}', b"\x02" + b"\0" * 7 + b"[]"])
def test_other_files_are_an_artefact_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ArtefactError, match="not a readable artefact"):
        artefact.load(tmp_path / "x.safetensors", "thing")


def test_plain_safetensors_are_not_an_artefact(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtefactError, match="not an emocircuits artefact"):
        artefact.load(tmp_path / "x.safetensors", "thing")


def test_missing_file_and_other_kind_say_so(saved: Path) -> None:
    with pytest.raises(InputError, match="there is no artefact at .*nowhere"):
        artefact.load(saved.with_name("nowhere"), "thing")
    with pytest.raises(ArtefactError, match="holds a 'thing', not a 'steerer'"):
        artefact.load(saved, "steerer")


def test_nan_is_refused_on_the_way_in_and_on_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(InputError, match="'bad' holds NaN"):
        artefact.save(tmp_path / "x", "thing", tensors, {})
    with monkeypatch.context() as patch:
        patch.setattr(artefact, "_refuse_nan", lambda *_: None)
        path = artefact.save(tmp_path / "x", "thing", tensors, {})
    with pytest.raises(ArtefactError, match="'bad' holds NaN"):
        artefact.load(path, "thing")


def test_infinity_is_a_value(tmp_path: Path) -> None:
    path = artefact.save(tmp_path / "x", "thing", {"a": torch.tensor([float("-inf")])}, {})
    assert artefact.load(path, "thing")[0]["a"].item() == float("-inf")


def test_unstorable_tensors_and_headers_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'words' has type"):
        artefact.save(tmp_path / "x", "thing", {"words": np.array(["a"])}, {})
    with pytest.raises(InputError, match="cannot be written as JSON"):
        artefact.save(tmp_path / "x", "thing", {}, {"f": object()})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- versions


def test_newer_format_asks_for_an_upgrade(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "FORMAT_VERSION", artefact.FORMAT_VERSION - 1)
    with pytest.raises(ArtefactError, match="upgrade emocircuits"):
        artefact.load(saved, "thing")


def test_older_format_is_migrated_step_by_step_or_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = artefact.FORMAT_VERSION
    monkeypatch.setattr(artefact, "FORMAT_VERSION", old + 2)
    with pytest.raises(ArtefactError, match="no longer reads"):
        artefact.load(saved, "thing")
    doubled = lambda tensors, header: ({n: 2 * t for n, t in tensors.items()}, {**header, "steps": [1]})  # noqa: E731
    listed = lambda tensors, header: (tensors, {**header, "steps": [*header["steps"], 2]})  # noqa: E731
    monkeypatch.setattr(artefact, "MIGRATIONS", {("thing", old): doubled, ("thing", old + 1): listed})
    tensors, header = artefact.load(saved, "thing")
    assert tensors["b"].tolist() == [2, 4]
    assert (header["steps"], header["format_version"]) == ([1, 2], old + 2)


# ---------------------------------------------------------------- atomic writes


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


WRITERS = {
    "artefact": lambda path: artefact.save(path, "thing", {"a": torch.zeros(3)}, {}),
    "text": lambda path: artefact.write_text_atomic(path, "new"),
    "json": lambda path: artefact.write_json_atomic(path, {"new": 1}),
    "jsonl": lambda path: artefact.write_jsonl_atomic(path, [{"new": 1}]),
}


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, step: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, failing(errno.ENOSPC))
    with pytest.raises(InputError, match="the disk is full"):
        WRITERS[writer](path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def interrupted(path: Path) -> None:
    with artefact.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = artefact.write_text_atomic(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_that_safetensors_reports_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise artefact.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(InputError, match="the disk is full"):
        artefact.save(tmp_path / "x", "thing", {"a": torch.ones(1)}, {})
    assert os.listdir(tmp_path) == []


def test_a_folder_or_a_file_in_the_way_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        artefact.write_text_atomic(tmp_path / "folder", "x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        artefact.write_text_atomic(tmp_path / "file" / "x", "x")
    assert leftovers(tmp_path) == []


# ---------------------------------------------------------------- JSON lines


@SHARED_FOLDER
@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4))
def test_jsonl_round_trip(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert artefact.read_jsonl(artefact.write_jsonl_atomic(tmp_path / "x.jsonl", rows)) == rows


def test_json_is_readable_text(tmp_path: Path) -> None:
    path = artefact.write_json_atomic(tmp_path / "x.json", {"emotion": "Überraschung"})
    assert "Überraschung" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"emotion": "Überraschung"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n\n{"a": \n', "line 3: not valid JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: expected a JSON object, found list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not valid JSON"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        artefact.read_jsonl(tmp_path / "x.jsonl")


def test_jsonl_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert artefact.read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_missing_jsonl_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        artefact.read_jsonl(tmp_path / "nowhere.jsonl")
