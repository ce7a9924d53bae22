"""Labels edited by hand come back as they were, agreement equals scikit-learn's, and means are means of traces."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, f1_score

from emocircuits.errors import InputError
from emocircuits.evaluation.statistics import clustered_bootstrap
from emocircuits.reasoning.labels import THOUGHT_ANCHORS, agreement, category_table, from_table, to_table
from emocircuits.reasoning.traces import Steps, Trace

NAMES = THOUGHT_ANCHORS.names


def trace(*texts: str, **fields: Any) -> Trace:
    parts = [f" {text}" for text in texts]
    bounds = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    return Trace("p", Steps("".join(parts), tuple(bounds)), **fields)


LABELLED = trace("Read.", "= 3 + 4", 'Say "so".', labels=(NAMES[0], None, NAMES[3]), depends_on=((), (), (0, 1)))

# ---- tables


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    texts = draw(st.lists(st.text(max_size=30), min_size=1, max_size=5))
    labels = tuple(draw(st.sampled_from([None, *NAMES])) for _ in texts)
    links = tuple(tuple(j for j in range(i) if draw(st.booleans())) for i in range(len(texts)))
    return trace(*texts, labels=draw(st.sampled_from([labels, None])), depends_on=draw(st.sampled_from([links, None])))


@given(traces(), st.sampled_from("\t,;"))
def test_a_table_comes_back_as_the_trace_that_it_was(given_: Trace, delimiter: str) -> None:
    assert from_table(given_, to_table(given_, delimiter)) == given_


def test_a_table_can_be_read_by_people_and_spreadsheets() -> None:
    assert to_table(LABELLED) == (
        "step\tlabel\tdepends_on\ttext\n"
        "0\tproblem_setup\t\tRead.\n"
        "1\t\t\t'= 3 + 4\n"  # the mark keeps a spreadsheet from computing it
        '2\tactive_computation\t0 1\t"Say ""so""."\n'
    )


def test_edits_arrive_whatever_the_order_of_rows_and_columns() -> None:
    edited = "\ufefflabel;step;note\r\nSC;2;x\r\nPlan Generation;0;\r\n\r\n;1;y\r\n"
    after = from_table(LABELLED, edited, THOUGHT_ANCHORS)
    assert after.labels == ("plan_generation", None, "self_checking")
    assert from_table(trace("a", "b"), "step,label,depends_on\n0,x,\n1,y,0\n").depends_on == ((), (0,))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "row 1: the table needs the columns step and label, and has none"),
        ("step\ttag\n0\tPS\n", "row 1: the table needs the columns step and label, and has step, tag"),
        ("step\tlabel\n0\tPS\n1\n", "row 3: 1 cells where the header has 2"),
        ("step\tlabel\n0\tPS\n3\tPS\n", "row 3: step '3' is not one of the trace's 0..2"),
        ("step\tlabel\n0\tPS\nx\tPS\n", "row 3: step 'x' is not one"),
        ("step\tlabel\n0\tPS\n0\tPS\n", "row 3: step 0 was already given"),
        ("step\tlabel\n0\tPS\n1\tPG\n", "no row for step 2"),
        ("step\tlabel\n0\tPS\n1\tdancing\n", "row 3: unknown label 'dancing'; choose from problem_setup"),
        ("step\tlabel\ttext\n0\tPS\tRead.\n1\tPS\tWrite.\n", "row 3: the text is not that of step 1"),
        ("step\tlabel\tdepends_on\n0\tPS\t\n1\tPS\t1\n", "row 3: depends_on is '1'; list earlier steps than 1"),
        ("step\tlabel\tdepends_on\n0\tPS\t\n1\tPS\tzero\n", "row 3: depends_on is 'zero'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_row(table: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_table(LABELLED, table, THOUGHT_ANCHORS)


def test_line_breaks_in_steps_leave_one_line_per_step() -> None:
    table = to_table(trace("one\n\ntwo\tthree", "four"))
    assert [row[3] for row in csv.reader(io.StringIO(table), delimiter="\t")] == ["text", "one two three", "four"]
    assert len(table.splitlines()) == 3


# ---- agreement


@given(st.lists(st.tuples(st.sampled_from([None, *NAMES]), st.sampled_from(NAMES)), min_size=2, max_size=40))
def test_agreement_equals_scikit_learn(pairs: list[tuple[str | None, str]]) -> None:
    given_, reference = (list(side) for side in zip(*pairs))
    found = agreement([*given_, "self_checking"], [*reference, None], THOUGHT_ANCHORS)
    filled = [g or "none" for g in given_]
    present = sorted(set(reference))
    assert found.n == len(pairs) == found.confusion.sum()
    assert found.accuracy == pytest.approx(np.mean([g == r for g, r in pairs]))
    assert found.majority == pytest.approx(max(map(reference.count, reference)) / len(pairs))
    macro = f1_score(reference, filled, labels=present, average="macro", zero_division=0)  # type: ignore[arg-type]
    assert found.macro_f1 == pytest.approx(macro)
    if len(set(filled) | set(reference)) > 1:
        assert found.kappa == pytest.approx(cohen_kappa_score(reference, filled))
    else:
        assert math.isnan(found.kappa)


def test_agreement_of_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="1 labels for 2"):
        agreement(NAMES[:1], NAMES[:2], THOUGHT_ANCHORS)
    with pytest.raises(InputError, match="unknown label 'dancing'"):
        agreement(["dancing"], NAMES[:1], THOUGHT_ANCHORS)
    with pytest.raises(InputError, match="no labels to agree with"):
        agreement([None], [None], THOUGHT_ANCHORS)


# ---- values by category


def test_traces_count_the_same_however_long_they_are() -> None:
    first = trace("a", "b", "c", labels=("x", "x", "y"))
    second = trace("a", "b", labels=("x", None))
    x, y, none = category_table([first, second], [[1, 3, math.nan], [8, 5]])
    assert (x.label, x.n, x.n_missing, x.n_traces) == ("x", 3, 0, 2)
    assert x.mean.estimate == pytest.approx((2 + 8) / 2)
    assert x.position == pytest.approx((0.25 + 0) / 2)
    assert x.mean == clustered_bootstrap([2.0, 8.0], [0, 1])
    assert (y.label, y.n, y.n_missing, y.n_traces) == ("y", 0, 1, 0)
    assert math.isnan(y.mean.estimate)
    assert math.isnan(y.position)
    assert y.mean.reason == "no values"
    assert (none.label, none.n, none.mean.estimate, none.position) == (None, 1, 5, 1)
    assert none.mean.reason == "an interval needs 2 clusters, got 1"


def test_traces_of_one_problem_are_one_cluster() -> None:
    three = [trace("a", labels=("x",)) for _ in range(3)]
    (row,) = category_table(three, [[0], [1], [5]], clusters=["p", "p", "q"], seed=4)
    assert row.mean == clustered_bootstrap([0.0, 1.0, 5.0], ["p", "p", "q"], seed=4)
    assert row.mean.n_clusters == 2


def test_the_commonest_category_comes_first_and_unlabelled_steps_last() -> None:
    many = trace(*"abcdef", labels=("r", "s", "s", None, None, None))
    assert [row.label for row in category_table([many], [np.arange(6)])] == ["s", "r", None]


@pytest.mark.parametrize(
    ("given_", "values", "message"),
    [
        ([trace("a", id="t")], [[1.0]], "trace 't' has no labels"),
        ([trace("a", labels=("x",))], [[1.0, 2.0]], "has 1 steps, but values of shape .2,."),
        ([trace("a", labels=("x",))], [], "1 traces, 0 values"),
    ],
)
def test_values_that_do_not_fit_are_refused(given_: list[Trace], values: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        category_table(given_, values)
