"""Activations survive being written, interrupted, killed, resumed and read back in any order."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from emocircuits.activations.store import ActivationStore
from emocircuits.errors import ArtefactError, HookError, InputError

A, B = ("resid_post", 3), ("mlp_out", 10)
SITES = {A: 5, B: 3}


def rows(n, start=0):
    """Rows whose values say which row and key they are."""
    ids = torch.arange(start, start + n, dtype=torch.float32)[:, None]
    return {A: ids + torch.arange(5) / 10, B: -ids + torch.arange(3) / 10}


def records(n, start=0):
    return [{"row": i, "text": f"line {i}\n\u2028"} for i in range(start, start + n)]


def fill(path, n, shard_rows=4, batch=3, **options):
    with ActivationStore.create(path, SITES, shard_rows=shard_rows, **options) as store:
        for start in range(0, n, batch):
            take = min(batch, n - start)
            store.append(rows(take, start), records(take, start))
    return ActivationStore.open(path)


def check(store, n):
    assert len(store) == store.n_committed == len(store[A]) == n
    assert torch.equal(store[A][:], rows(n)[A].to(store.dtype))
    assert torch.equal(store[B][:], rows(n)[B].to(store.dtype))
    assert store.meta == records(n)


class TestRoundTrip:
    @pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 11])
    def test_rows_and_records_come_back(self, tmp_path, n):
        store = fill(tmp_path / "s", n, header={"model": "demo", "layers": (1, 2)})
        check(store, n)
        assert store.keys == (A, B)
        assert store.header == {"model": "demo", "layers": [1, 2]}

    @pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
    def test_dtypes(self, tmp_path, dtype):
        store = fill(tmp_path / "s", 6, dtype=dtype)
        assert str(store.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
        check(store, 6)

    def test_shards_are_plain_safetensors(self, tmp_path):
        fill(tmp_path / "s", 6)
        tensors = load_file(tmp_path / "s" / "shard-00001.safetensors")
        assert set(tensors) == {"resid_post.3", "mlp_out.10"}
        assert torch.equal(tensors["resid_post.3"], rows(2, 4)[A])

    def test_one_append_larger_than_several_shards(self, tmp_path):
        check(fill(tmp_path / "s", 19, shard_rows=4, batch=19), 19)

    def test_widths_may_come_from_the_first_rows(self, tmp_path):
        with ActivationStore.create(tmp_path / "s", [A, B]) as store:
            store.append(rows(2))
            with pytest.raises(InputError, match=r"resid_post\.3 must be floats \[n, 5\]"):
                store.append({A: torch.zeros(2, 4), B: torch.zeros(2, 3)})
        assert ActivationStore.open(tmp_path / "s")[A].shape == (2, 5)
        assert ActivationStore.open(tmp_path / "s").meta == [{}, {}]

    def test_gradients_and_strides_do_not_matter(self, tmp_path):
        source = rows(4)
        odd = {key: t.t().contiguous().t().requires_grad_() for key, t in source.items()}
        with ActivationStore.create(tmp_path / "s", SITES) as store:
            store.append(odd, records(4))
        check(ActivationStore.open(tmp_path / "s"), 4)

    def test_later_changes_to_the_source_are_not_stored(self, tmp_path):
        source = rows(2)
        with ActivationStore.create(tmp_path / "s", SITES) as store:
            store.append(source, records(2))
            source[A].zero_()
        check(ActivationStore.open(tmp_path / "s"), 2)


class TestReading:
    @pytest.fixture(scope="class")
    def store(self, tmp_path_factory):
        return fill(tmp_path_factory.mktemp("read") / "s", 23, shard_rows=5)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_indexing_is_that_of_a_tensor(self, store, data):
        whole = rows(23)[A]
        bound = st.one_of(st.none(), st.integers(-30, 30))
        cut = slice(data.draw(bound), data.draw(bound), data.draw(st.integers(1, 7)))
        picks = data.draw(st.lists(st.integers(-23, 22), max_size=30))
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=23, max_size=23)))
        assert torch.equal(store[A][cut], whole[cut])
        assert torch.equal(store[A][picks], whole[torch.tensor(picks, dtype=torch.long)])
        assert torch.equal(store[A][np.array(picks, dtype=int)], store[A][torch.tensor(picks).long()])
        assert torch.equal(store[A][mask], whole[torch.from_numpy(mask)])

    def test_one_row_and_iteration(self, store):
        assert torch.equal(store[A][-1], rows(23)[A][-1])
        assert torch.equal(torch.stack(list(store[B])), rows(23)[B])

    def test_reversed_slice(self, store):
        assert torch.equal(store[A][::-3], rows(23)[A].flip(0)[::3])

    @pytest.mark.parametrize("bad", [23, -24, [0, 23]])
    def test_out_of_range(self, store, bad):
        with pytest.raises(IndexError, match="23 rows"):
            store[A][bad]

    @pytest.mark.parametrize("bad", ["a", 0.5, [[0, 1]], [True, False]])
    def test_not_a_row_index(self, store, bad):
        with pytest.raises(InputError, match="row numbers"):
            store[A][bad]

    def test_unknown_key_lists_the_keys(self, store):
        with pytest.raises(InputError, match="resid_post"):
            store["resid_post", 4]

    def test_batches_cover_every_row_once(self, store):
        plain = torch.cat(list(store.iter_batches(A, 6)))
        assert torch.equal(plain, rows(23)[A])
        sizes = [len(batch) for batch in store.iter_batches(A, 6, shuffle=True, seed=1)]
        assert sizes == [6, 6, 6, 5]
        one, again, other = (torch.cat(list(store.iter_batches(A, 6, shuffle=True, seed=seed))) for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert torch.equal(one[one[:, 0].argsort()], plain)

    def test_bad_batches_fail_at_the_call(self, store):
        with pytest.raises(InputError, match="batch_size"):
            store.iter_batches(A, 0)
        with pytest.raises(InputError, match="activation key"):
            store.iter_batches(("z", 1), 4)

    def test_results_are_copies(self, store):
        store[A][:].zero_()
        check(store, 23)

    def test_only_the_needed_shards_are_read(self, tmp_path):
        store = fill(tmp_path / "s", 12, shard_rows=4)
        (tmp_path / "s" / "shard-00001.safetensors").unlink()
        assert torch.equal(store[A][8:12], rows(4, 8)[A])
        assert torch.equal(store[A][[0, 11]], rows(12)[A][[0, 11]])
        with pytest.raises(ArtefactError, match="shard-00001"):
            store[A][3:5]

    def test_many_shards_do_not_keep_every_file_open(self, tmp_path, monkeypatch):
        monkeypatch.setattr("emocircuits.activations.store._OPEN_SHARDS", 2)
        store = fill(tmp_path / "s", 20, shard_rows=2)
        check(store, 20)
        assert len(store._maps) == 2


class TestWriting:
    def test_only_committed_rows_are_visible_and_memory_is_one_shard(self, tmp_path):
        store = ActivationStore.create(tmp_path / "s", SITES, shard_rows=4)
        store.append(rows(3), records(3))
        assert len(store) == 0
        store.append(rows(7, 3), records(7, 3))
        assert {key: tuple(buffer.shape) for key, buffer in store._buffer.tensors.items()} == {
            A: (4, 5),
            B: (4, 3),
        }
        check(store, 8)
        check(ActivationStore.open(tmp_path / "s"), 8)
        store.close()
        check(store, 10)
        store.close()
        assert not list((tmp_path / "s").glob("*.tmp"))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_undefined_activations_are_refused_by_site_and_layer(self, tmp_path, bad):
        with ActivationStore.create(tmp_path / "s", SITES) as store:
            store.append(rows(2), records(2))
            broken = rows(2, 2)
            broken[B][1, 2] = bad
            with pytest.raises(HookError, match="mlp_out layer 10.*1 of 2 rows"):
                store.append(broken, records(2))
        check(ActivationStore.open(tmp_path / "s"), 2)

    def test_overflow_of_a_smaller_dtype_is_refused(self, tmp_path):
        store = ActivationStore.create(tmp_path / "s", {A: 1}, dtype="float16")
        with pytest.raises(HookError, match="overflow float16"), store:
            store.append({A: torch.tensor([[7e4]])})
        assert len(store) == 0

    @pytest.mark.parametrize(
        ("tensors", "meta", "message"),
        [
            ({A: torch.zeros(2, 5)}, None, "exactly the keys"),
            ({A: torch.zeros(2, 4), B: torch.zeros(2, 3)}, None, r"\[n, 5\]"),
            ({A: torch.zeros(5), B: torch.zeros(2, 3)}, None, r"\[n, 5\]"),
            ({A: torch.zeros(2, 5).long(), B: torch.zeros(2, 3)}, None, "floats"),
            ({A: torch.zeros(2, 5), B: torch.zeros(1, 3)}, None, "same number of rows"),
            ({A: torch.zeros(2, 5), B: torch.zeros(2, 3)}, [{}], "one dict for each of the 2 rows"),
            ({A: torch.zeros(1, 5), B: torch.zeros(1, 3)}, [{"x": {1, 2}}], "plain JSON"),
        ],
    )
    def test_a_bad_append_keeps_nothing(self, tmp_path, tensors, meta, message):
        store = ActivationStore.create(tmp_path / "s", SITES)
        with pytest.raises(InputError, match=message), store:
            store.append(tensors, meta)
        assert len(ActivationStore.open(tmp_path / "s")) == 0

    def test_a_store_open_for_reading_or_closed_refuses_rows(self, tmp_path):
        store = fill(tmp_path / "s", 2)
        with pytest.raises(InputError, match="not open for writing"):
            store.append(rows(1))


class TestCreate:
    def test_an_existing_store_is_not_overwritten(self, tmp_path):
        fill(tmp_path / "s", 3)
        with pytest.raises(InputError, match="resume=True"):
            ActivationStore.create(tmp_path / "s", SITES)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("x")
        with pytest.raises(InputError, match="other files"):
            ActivationStore.create(tmp_path / "other", SITES)
        with pytest.raises(InputError, match="cannot make the folder"):
            ActivationStore.create(tmp_path / "other" / "thesis.txt", SITES)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sites": None}, "needs the sites"),
            ({"sites": {}}, "empty"),
            ({"sites": ["resid_post"]}, "pairs"),
            ({"sites": {A: 0}}, "width"),
            ({"sites": SITES, "dtype": "int8"}, "float32, float16, bfloat16"),
            ({"sites": SITES, "shard_rows": 0}, "shard_rows"),
            ({"sites": SITES, "header": {"x": object()}}, "JSON"),
        ],
    )
    def test_bad_settings(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            ActivationStore.create(tmp_path / "s", **options)
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize("damage", ["missing", "text", "kind", "shard"])
    def test_open_refuses_a_damaged_store(self, tmp_path, damage):
        folder = tmp_path / "s"
        fill(folder, 6)
        index = folder / "index.json"
        if damage == "missing":
            index.unlink()
        elif damage == "text":
            index.write_text(index.read_text()[:40])
        elif damage == "kind":
            index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 99}))
        else:
            shard = folder / "shard-00000.safetensors"
            shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(ArtefactError, match="index|cut short"):
            ActivationStore.open(folder)


class TestResume:
    def test_continues_after_the_last_committed_row(self, tmp_path):
        fill(tmp_path / "s", 6, header={"model": "demo"})
        with ActivationStore.create(tmp_path / "s", resume=True, shard_rows=3) as store:
            assert store.n_committed == 6
            store.append(rows(5, 6), records(5, 6))
        check(ActivationStore.open(tmp_path / "s"), 11)

    def test_the_same_call_starts_and_continues(self, tmp_path):
        for start in (0, 2):
            with ActivationStore.create(tmp_path / "s", SITES, header={"seed": 0}, resume=True) as store:
                assert store.n_committed == start
                store.append(rows(2, start), records(2, start))
        check(ActivationStore.open(tmp_path / "s"), 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sites": {A: 5}}, "keys"),
            ({"sites": {A: 5, B: 4}}, "width 3, not 4"),
            ({"dtype": "float16"}, "stores float32"),
            ({"header": {"model": "other"}}, "another header"),
        ],
    )
    def test_settings_that_disagree_are_refused(self, tmp_path, options, message):
        fill(tmp_path / "s", 2, header={"model": "demo"})
        with pytest.raises(InputError, match=message):
            ActivationStore.create(tmp_path / "s", resume=True, **options)
        check(ActivationStore.open(tmp_path / "s"), 2)

    def test_interrupt_keeps_the_buffered_rows_as_a_short_shard(self, tmp_path):
        def run():
            with ActivationStore.create(tmp_path / "s", SITES, shard_rows=4) as store:
                store.append(rows(6), records(6))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run()
        check(ActivationStore.open(tmp_path / "s"), 6)

    @pytest.mark.parametrize("point", range(6))
    def test_interrupt_at_any_file_operation_loses_and_doubles_nothing(self, tmp_path, monkeypatch, point):
        """Three files per shard, each interrupted just before (even) or after (odd) it takes its place."""
        store = ActivationStore.create(tmp_path / "s", SITES, shard_rows=4)
        real, calls = os.replace, []

        def replace(source, target):
            calls.append(target)
            hit = len(calls) - 1 == point // 2
            if hit and point % 2 == 0:
                raise KeyboardInterrupt
            real(source, target)
            if hit:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt), store:
            store.append(rows(4), records(4))
        monkeypatch.undo()
        check(ActivationStore.open(tmp_path / "s"), 4)
        check(store, 4)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.parametrize("deaths", [4, 5, 6])
    def test_a_killed_process_leaves_a_store_that_resumes(self, tmp_path, deaths):
        """The process dies while the second shard's records, tensors or index are half written."""
        pid = os.fork()
        if pid == 0:
            calls = 0
            real = os.fsync

            def fsync(descriptor):
                nonlocal calls
                calls += stat.S_ISREG(os.fstat(descriptor).st_mode)
                if calls == deaths + 1:  # the first is the empty index
                    os._exit(9)
                real(descriptor)

            os.fsync = fsync
            store = ActivationStore.create(tmp_path / "s", SITES, shard_rows=4)
            store.append(rows(10), records(10))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert list((tmp_path / "s").glob("*.tmp"))
        check(ActivationStore.open(tmp_path / "s"), 4)
        with ActivationStore.create(tmp_path / "s", resume=True, shard_rows=4) as store:
            assert not list((tmp_path / "s").glob("*.tmp"))
            assert not list((tmp_path / "s").glob("shard-00001*"))
            store.append(rows(6, 4), records(6, 4))
        check(ActivationStore.open(tmp_path / "s"), 10)


class TestFullDisk:
    @pytest.mark.parametrize("file", ["shard-00001.jsonl", "shard-00001.safetensors", "index.json"])
    def test_one_sentence_and_a_valid_index(self, tmp_path, monkeypatch, file):
        store = ActivationStore.create(tmp_path / "s", SITES, shard_rows=4)
        store.append(rows(4), records(4))
        real = os.replace

        def replace(source, target):
            if Path(target).name == file:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        full = r"disk is full.*the 4 rows.*resume=True"
        with pytest.raises(InputError, match=full) as caught, store:
            store.append(rows(4, 4), records(4, 4))
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        with pytest.raises(InputError, match="not open for writing"):
            store.append(rows(1, 8))
        assert not list((tmp_path / "s").glob("*.tmp"))
        check(ActivationStore.open(tmp_path / "s"), 4)
        with ActivationStore.create(tmp_path / "s", resume=True) as again:
            again.append(rows(2, 4), records(2, 4))
        check(ActivationStore.open(tmp_path / "s"), 6)

    def test_a_failed_store_takes_no_more_rows_even_inside_the_block(self, tmp_path, monkeypatch):
        def replace(source, target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with ActivationStore.create(tmp_path / "s", SITES, shard_rows=4) as store:
            monkeypatch.setattr(os, "replace", replace)
            with pytest.raises(InputError, match="disk is full"):
                store.append(rows(4), records(4))
            monkeypatch.undo()
            with pytest.raises(InputError, match="not open for writing"):
                store.append(rows(1), records(1))
        assert len(ActivationStore.open(tmp_path / "s")) == 0

    def test_a_real_size_limit_of_the_operating_system(self, tmp_path):
        resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
        store = ActivationStore.create(tmp_path / "s", {A: 4096}, shard_rows=64)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(InputError, match="cannot write"), store:
                store.append({A: torch.ones(64, 4096)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(file.name for file in (tmp_path / "s").glob("*.tmp")) == []
        assert len(ActivationStore.open(tmp_path / "s")) == 0
