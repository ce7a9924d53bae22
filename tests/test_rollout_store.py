"""Rollouts on disk: whole after any kill, never twice, never mixed with another trace's, damage named by its line."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emocircuits.errors import InputError
from emocircuits.reasoning.store import RolloutStore
from emocircuits.reasoning.traces import Rollout

MADE_FROM = {"trace": "abc", "sampling": {"seed": 0, "stop": ("x",)}, "model": {"name": "tiny"}}
TEXTS = st.text(st.characters(codec=None), max_size=20)
KEYS = st.tuples(st.integers(0, 4), st.integers(0, 3))


def claimed(path: Path) -> RolloutStore:
    store = RolloutStore(path)
    store.claim(MADE_FROM)
    return store


def rollout(boundary: int, index: int, text: str = "so it is", **values: Any) -> Rollout:
    return Rollout(boundary, index, text, **values)


FULL = rollout(
    1, 2, "Σ \ud83d\n\u2028", step="Σ", answer="4", correct=True, probabilities={"4": 0.75, "5": 0.25}, finish="answer",
    n_tokens=9,
)  # fmt: skip


# ---------------------------------------------------------------- round trips


def test_what_is_added_is_there_for_everybody(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    store, other = claimed(path), RolloutStore(path)
    assert store.add([FULL, rollout(0, 1)]) == 2
    assert other.rollouts(3).items == (rollout(0, 1), FULL), "by boundary and index"
    assert other.missing([(1, 2), (2, 0), (0, 1), (0, 0)]) == [(2, 0), (0, 0)]
    assert other.add([rollout(2, 0)]) == 1
    assert store.rollouts(3).items == (rollout(0, 1), FULL, rollout(2, 0))
    assert claimed(path).rollouts(3) == store.rollouts(3)
    assert RolloutStore(tmp_path / "nothing").rollouts(3).items == ()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.tuples(KEYS, TEXTS, st.booleans()), max_size=4), max_size=5))
def test_the_first_good_rollout_of_a_name_stays(tmp_path: Path, batches: list[Any]) -> None:
    path = tmp_path / "r.jsonl"
    path.unlink(missing_ok=True)
    store, expected = claimed(path), dict[Any, Rollout]()
    for batch in batches:
        made = [rollout(*key, text, finish="error" if bad else "stop") for key, text, bad in batch]
        store.add(made)
        for r in made:
            known = expected.get((r.boundary, r.index))
            if known is None or (known.finish == "error" and r.finish == "stop"):
                expected[r.boundary, r.index] = r
    for reader in (store, RolloutStore(path)):
        assert reader.rollouts(9).items == tuple(expected[key] for key in sorted(expected))
        assert reader.missing(expected) == [key for key, r in expected.items() if r.finish == "error"]


def test_an_error_is_missing_until_a_better_try(tmp_path: Path) -> None:
    store = claimed(tmp_path / "r.jsonl")
    failed = rollout(0, 0, "", finish="error", reason="HTTP 500")
    assert store.add([failed]) == 1
    assert store.missing([(0, 0)]) == [(0, 0)]
    assert store.rollouts(1).items == (failed,)
    assert store.add([rollout(0, 0, "", finish="error", reason="again")]) == 0
    assert store.add([rollout(0, 0)]) == 1
    assert store.add([failed, rollout(0, 0, "another")]) == 0
    assert claimed(store.path).rollouts(1).items == (rollout(0, 0),)


# ---------------------------------------------------------------- kills and damage


def test_a_file_cut_at_any_byte_loses_one_rollout_at_most(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    store = claimed(path)
    made = [rollout(0, 0), FULL, rollout(2, 0, "end")]
    for r in made:
        store.add([r])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 3), *ends[:-1], *(end - 1 for end in ends)}:
        path.write_bytes(whole[:cut])
        again = claimed(path)
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        assert again.rollouts(3).items == tuple(made[:kept])
        assert again.add(made) == len(made) - kept
        assert path.read_bytes() == whole


def test_half_a_line_of_a_dead_process_is_dropped_by_one_that_lives(tmp_path: Path) -> None:
    store = claimed(tmp_path / "r.jsonl")
    store.add([rollout(0, 0)])
    with open(store.path, "ab") as file:
        file.write(b'{"boundary": 0, "ind')
    assert store.rollouts(1).items == (rollout(0, 0),), "reading does not wait for the rest, nor fail"
    store.add([rollout(0, 1)])
    assert claimed(store.path).rollouts(1).items == (rollout(0, 0), rollout(0, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: .*; mend or remove that line"),
        (b"", "line 3: "),
        (b"\x00\xff", "line 3: "),
        (b"[1]", "line 3: "),
        (b'{"boundary": 0, "index": 5}', "line 3: .*text"),
        (b'{"boundary": "0", "index": 5, "text": ""}', "line 3: boundary and index must be whole numbers"),
        (b'{"boundary": 0, "index": 5, "text": "", "mood": 1}', "line 3: .*mood"),
        (b'{"boundary": 0, "index": 5, "text": "", "finish": "bored"}', "line 3: finish must be one of"),
        (b'{"boundary": 0, "index": 0, "text": "x"}', "line 3: rollout 0 at boundary 0 is there twice"),
    ],
)
def test_any_other_damage_is_named_by_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    store = claimed(tmp_path / "r.jsonl")
    store.add([rollout(0, 0), rollout(0, 1)])
    lines = store.path.read_bytes().split(b"\n")
    store.path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    before = store.path.read_bytes()
    for use in (lambda: RolloutStore(store.path).rollouts(1), lambda: claimed(store.path)):
        with pytest.raises(InputError, match=message):
            use()
    assert store.path.read_bytes() == before, "what is damaged is not touched"


@pytest.mark.parametrize("content", [b"hello\n", b'{"id": 1}\n', b"[]\n", b'{"kind": "rollouts", "version": 9}\n'])
def test_files_of_another_kind_are_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 1: .*this is no rollout store"):
        claimed(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trace": "abd"}, "rollouts made with another trace; choose another path"),
        ({"sampling": {"seed": 1, "stop": ["x"]}}, "another sampling"),
        ({"trace": "abd", "model": {"name": "huge"}}, "another trace and another model"),
        ({"way of answering": 1}, "another way of answering"),
    ],
)
def test_rollouts_of_something_else_are_not_mixed_in(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store = claimed(tmp_path / "r.jsonl")
    with pytest.raises(InputError, match=message):
        RolloutStore(store.path).claim({**MADE_FROM, **change})
    claimed(store.path)
    assert len(store.path.read_bytes().splitlines()) == 1


# ---------------------------------------------------------------- several processes, and file systems that refuse


def _fill(path: Path, own: int) -> None:
    store = claimed(path)
    for index in range(25):
        store.add([rollout(0, index, "shared"), rollout(own, index, "own")])


def test_processes_that_share_a_store_never_write_a_rollout_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    processes = [context.Process(target=_fill, args=(path, own)) for own in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(lines) == 1 + 4 * 25
    assert claimed(path).missing((k, i) for k in range(4) for i in range(25)) == []


def _gone(store: RolloutStore) -> None:
    store.path.write_bytes(b"")


def _read_only(store: RolloutStore) -> None:
    store.path.chmod(stat.S_IRUSR)
    if os.access(store.path, os.W_OK):
        pytest.skip("this user may write anything")


@pytest.mark.parametrize(
    ("what", "message"), [(_gone, "was cut short or replaced while in use"), (_read_only, "cannot write .*denied")]
)
def test_a_file_that_is_taken_away_is_one_sentence(
    tmp_path: Path, what: Callable[[RolloutStore], None], message: str
) -> None:
    store = claimed(tmp_path / "r.jsonl")
    what(store)
    with pytest.raises(InputError, match=message):
        store.add([rollout(0, 0)])


def test_a_store_must_be_claimed_and_its_folder_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"call claim\(\) first"):
        RolloutStore(tmp_path / "r.jsonl").add([rollout(0, 0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        claimed(tmp_path / "file" / "r.jsonl")
