"""Heads and neurons as the explorer names, draws and finds them: pure functions, without Streamlit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import graph, write_run

pytest.importorskip("streamlit", reason="streamlit is not installed: emocircuits[dashboard]")

from dashboards import units
from dashboards.units import UnitName
from emocircuits.circuit_plots import circuit_graph, head_map
from emocircuits.circuits.assemble import Circuit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("units") / "runs"
    write_run(root / "a", layers=4)
    return root


@given(st.sampled_from(["heads", "neurons"]), st.integers(0, 200), st.integers(0, 100_000))
def test_units_are_what_they_are_called(kind: str, layer: int, number: int) -> None:
    unit = UnitName(kind, layer, number)
    assert UnitName.parse(str(unit)) == UnitName.parse(f" {str(unit).upper()} ") == unit
    for event in ([str(unit)], {"0": 0.2, "1": 0.1, "2": str(unit)}, str(unit), [0.2, 0.1, str(unit)]):
        assert units.clicked({"selection": {"points": [{"customdata": event}]}}) == str(unit)


@pytest.mark.parametrize("text", ["", "h1", "x1.2", "h-1.2", "h1.2.3", None, "h99999.1", "<b>h1.2</b>"])
def test_other_texts_name_no_unit(text: Any) -> None:
    assert UnitName.parse(text) is None


@pytest.mark.parametrize("event", [None, {}, {"selection": {"points": []}}, {"selection": {"points": [{"x": 1}]}}])
def test_clicks_beside_a_unit_choose_nothing(event: Any) -> None:
    assert units.clicked(event) is None


def test_every_cell_of_a_map_can_be_clicked_and_the_chosen_one_is_framed() -> None:
    fig = units.clickable(go.Figure(), [[0.1, None], [0.3, -0.4]], UnitName("heads", 1, 0))
    cells = fig.data[0]
    assert list(cells.text) == ["+0.1", "not measured", "+0.3", "-0.4"]
    named = {(y, x): UnitName.parse(c) for x, y, c in zip(cells.x, cells.y, cells.customdata)}
    assert named == {(a, b): UnitName("heads", a, b) for a in (0, 1) for b in (0, 1)}
    assert (fig.layout.shapes[0].x0, fig.layout.shapes[0].y1) == (-0.5, 1.5)


def test_what_a_run_knows_of_a_unit(home: Path) -> None:
    found = json.loads((home / "a" / "circuits" / "circuits.json").read_text())
    unit = UnitName("heads", 1, 2)
    effects = units.head_effects(found, unit)
    assert set(effects) == {"total", "direct", "gradient"}
    assert effects["total"]["fear"] == found["heads"]["total"][3][1][2]
    sizes = sorted((abs(v) for row in found["heads"]["total"][3] for v in row), reverse=True)
    place, of = units.head_rank(found, unit, "fear")
    assert (sizes[place - 1], of) == (abs(effects["total"]["fear"] or 0), 16)
    assert units.head_effects(found, UnitName("heads", 40, 0)) == {}
    assert units.read_rows(found, unit) == [{"token": "'<bos>'", "anger": 0.5}, {"token": "' <b>'", "anger": 0.2}]
    assert units.read_rows(found, UnitName("neurons", 1, 2)) == []
    circuit = Circuit("fear", ((1, 2), (3, 0)), ((0, 5),), (0.5, 0.25), (0.125,))
    assert units.memberships({"fear": circuit}, UnitName("heads", 3, 0)) == [
        {"circuit of": "fear", "place": 2, "of": 2, "score": 0.25}
    ]
    assert units.memberships({"fear": circuit}, UnitName("neurons", 3, 0)) == []


def test_stored_attention_is_one_table_with_a_column_per_emotion() -> None:
    rows = {
        "anger": [{"head": [1, 2], "tokens": [["a", 0.5], ["b", 0.1]]}, {"head": [0, 0], "tokens": [["c", 1.0]]}],
        "joy": [{"head": [1, 2], "tokens": [["b", 0.6]]}],
    }
    assert units.read_rows({"reads": rows}, UnitName("heads", 1, 2)) == [
        {"token": "'b'", "anger": 0.1, "joy": 0.6}, {"token": "'a'", "anger": 0.5, "joy": None},
    ]  # fmt: skip


def test_the_default_of_each_view_is_the_strongest_unit_that_was_measured() -> None:
    assert units.strongest([[0.1, -0.4], [None, 0.3], [float("nan"), None]]) == "h0.1"
    assert units.strongest([[None, None]]) == units.strongest([]) == ""
    assert units.main_node(graph()) == "h2.3"
    assert units.main_node({"nodes": []}) == ""
    found = {"members": {"fear": {"top_neurons": [[3, 17], [0, 4]]}}}
    assert [r["unit"] for r in units.neuron_rows(None, found, "fear")] == ["n3.17", "n0.4"]
    circuit = Circuit("fear", (), ((0, 5), (2, 1)), (), (0.5, 0.25))
    assert units.neuron_rows(circuit, found, "fear", 1) == [
        {"place": 1, "unit": "n0.5", "layer": 0, "neuron": 5, "score": 0.5}
    ]
    assert units.neuron_rows(None, found, "joy") == []


@pytest.mark.parametrize(("values", "words"), [
    ([[0.1], [0.2], [None]], "measured in layers 0 to 1"), ([[0.1], [None], [0.3]], "measured in layers 0, 2"),
    ([[None]], ""),
])  # fmt: skip
def test_measured_layers_are_said(values: Any, words: str) -> None:
    assert units.measured_layers(values) == words


def test_a_unit_that_the_model_lacks_is_said_with_what_there_is(home: Path) -> None:
    found = json.loads((home / "a" / "circuits" / "circuits.json").read_text())
    size = units.extent(found, None)
    assert (size.layers, size.heads, size.neurons) == (4, 4, None)
    said = units.lacks(size, UnitName("heads", 99, 0))
    assert said == "This model has no head 0 of layer 99: it has layers 0 to 3 with heads 0 to 3 in each."
    assert units.lacks(size, UnitName("heads", 3, 4))
    assert units.lacks(size, UnitName("neurons", 4, 0))
    assert units.lacks(size, UnitName("heads", 3, 3)) is units.lacks(size, UnitName("neurons", 3, 9999)) is None
    assert units.lacks(units.extent({}, None), UnitName("heads", 99, 0)) is None
    assert "neurons 0 to 63" in (units.lacks(units.Extent(4, 4, 64), UnitName("neurons", 0, 64)) or "")


@pytest.mark.parametrize("cells", [[], [(7, "unit")], [("x", "unit")], None])
def test_clicks_beside_a_row_choose_nothing(cells: Any) -> None:
    rows = [{"unit": "n0.1"}, {"unit": "n3.17"}]
    assert units.picked({"selection": {"cells": cells}}, rows) is units.picked(None, rows) is None
    assert units.picked({"selection": {"cells": [(1, "score")]}}, rows) == "n3.17"


def test_edges_of_a_unit_are_those_that_touch_it() -> None:
    rows = units.edges(graph(), UnitName("heads", 0, 1))
    assert {(r["from"], r["to"], r["part of the score"]) for r in rows} == {
        ("h0.1", "n1.40", 0.2), ("h0.1", "h2.3", -0.1), ("h0.1", "score", 0.1),
    }  # fmt: skip
    assert units.edges(graph(), UnitName("heads", 9, 9)) == []


def test_the_chosen_unit_of_a_graph_wears_a_ring() -> None:
    plain_graph = circuit_graph(graph(), "fear")
    n_traces = len(plain_graph.data)
    for chosen, rings in ((UnitName("neurons", 1, 40), 1), (UnitName("heads", 9, 9), 0), (None, 0)):
        fig = units.ringed(go.Figure(plain_graph), chosen)
        assert len(fig.data) - n_traces == rings
    drawn = [unit for t in plain_graph.data if t.customdata is not None for *_, unit in t.customdata]
    assert sorted(drawn) == ["h0.1", "h2.3", "n1.40"]
    assert sorted(name for t in plain_graph.data if t.customdata is not None for name in t.text) == sorted(drawn)


MEMBERS = st.lists(st.tuples(st.sampled_from(["heads", "neurons"]), st.integers(0, 5), st.integers(0, 9)), max_size=24,
                   unique=True)  # fmt: skip


@given(MEMBERS)
def test_nodes_of_a_graph_do_not_lie_on_each_other_on_a_phone(members: list[tuple[str, int, int]]) -> None:
    nodes = [{"kind": k, "layer": layer, "unit": unit, "effect": 1.0, "direct": 0.1} for k, layer, unit in members]
    fig = circuit_graph({"nodes": nodes, "edges": []}, "fear")
    traces: Any = [t for t in fig.data if t.customdata is not None]
    x_scale = 300 / (fig.layout.xaxis.range[1] - fig.layout.xaxis.range[0])  # pixels
    y_scale = (fig.layout.height - 70) / (fig.layout.yaxis.range[1] - fig.layout.yaxis.range[0])
    places = [(x * x_scale, y * y_scale) for t in traces for x, y in zip(t.x, t.y)]
    assert len(places) == len(members)
    for i, (x, y) in enumerate(places):
        assert all(abs(x - a) > 45 or abs(y - b) > 30 for a, b in places[:i])
    layers = dict(zip(fig.layout.yaxis.ticktext or [], fig.layout.yaxis.tickvals or []))
    assert sorted(map(int, layers)) == sorted({layer for _, layer, _ in members})


def test_cells_that_were_not_measured_are_marked_and_few_heads_are_all_numbered() -> None:
    fig = head_map([[0.1, 0.0], [None, float("nan")]])
    blank: Any = fig.data[1]
    assert [list(row) for row in blank.z] == [[None, None], [1, 1]]
    assert "not measured" in blank.hovertemplate
    assert len(head_map([[0.1, 0.0]]).data) == 1
    assert fig.layout.xaxis.dtick == 1
    assert head_map([[0.0] * 32]).layout.xaxis.dtick == 2
