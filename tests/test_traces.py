"""Steps tile their text, tokens tile the steps, rollouts are never twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.errors import InputError
from emocircuits.reasoning.traces import Rollout, Rollouts, Steps, Trace

STEPS = Steps("Abc. Def ghi.", (0, 4, 13))


def test_token_bounds_with_special_tokens_and_a_prompt() -> None:
    assert STEPS.token_bounds([(0, 0), (0, 3), (3, 4), (4, 8), (8, 12), (12, 13), (0, 0)]) == (1, 3, 7)
    assert STEPS.token_bounds([(0, 6), (6, 9), (9, 10), (10, 14), (14, 19)], start=6) == (1, 3, 5)


def test_a_token_over_the_end_of_a_step_belongs_to_the_next() -> None:
    assert STEPS.token_bounds([(0, 3), (3, 8), (8, 13)]) == (0, 1, 3)
    assert STEPS.token_bounds([(0, 8), (8, 13)]) == (0, 0, 2)  # the first step has no token of its own


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.lists(st.integers(1, 4), min_size=1, max_size=20))
def test_token_bounds_tile_the_tokens(sizes: list[int], tokens: list[int]) -> None:
    text = "x" * sum(sizes)
    steps = Steps(text, tuple(sum(sizes[:i]) for i in range(len(sizes) + 1)))
    offsets, at = [], 0
    for size in tokens:
        if at < len(text):
            offsets.append((at, min(at + size, len(text))))
            at = offsets[-1][1]
    if at < len(text):
        offsets.append((at, len(text)))
    bounds = steps.token_bounds(offsets)
    assert bounds[0] == 0
    assert bounds[-1] == len(offsets)
    assert list(bounds) == sorted(bounds)
    for i in range(len(steps)):
        for token in range(bounds[i], bounds[i + 1]):
            assert steps.bounds[i] < offsets[token][1] <= steps.bounds[i + 1]


def test_prefixes_rebuild_the_text() -> None:
    trace = Trace("Q: ", STEPS)
    assert [trace.prefix(i) for i in range(3)] == ["Q: ", "Q: Abc.", "Q: Abc. Def ghi."]
    assert STEPS.texts == ("Abc.", "Def ghi.")
    with pytest.raises(InputError, match="boundaries 0..2"):
        trace.prefix(3)


@pytest.mark.parametrize("bounds", [(0, 13, 13), (0, 4), (1, 13), (0, 9, 4, 13), (0,)])
def test_bounds_must_tile(bounds: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="bounds must"):
        Steps("Abc. Def ghi.", bounds)


def test_rollouts_leave_errors_out_and_refuse_twins() -> None:
    rollouts = Rollouts(2, (Rollout(1, 1, "b"), Rollout(1, 0, "a"), Rollout(1, 2, "", finish="error", reason="503")))
    assert [r.text for r in rollouts.at(1)] == ["a", "b"]
    assert rollouts.at(0) == ()
    with pytest.raises(InputError, match="twice"):
        rollouts.plus([Rollout(1, 0, "c")])
    with pytest.raises(InputError, match=r"0\.\.2"):
        rollouts.plus([Rollout(3, 0, "c")])
    with pytest.raises(InputError, match="labels has 1"):
        Trace("", STEPS, labels=("x",))
    with pytest.raises(InputError, match="earlier steps only"):
        Trace("", STEPS, depends_on=((), (1,)))
