"""The explorer's pure parts: folders, words, units, mixing, records, comparison, and two tabs on one model."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import graph, letters, write_balance, write_run

pytest.importorskip("streamlit", reason="streamlit is not installed: emocircuits[dashboard]")

from dashboards import comparing, findings, folders, mixing, modality, records, units
from dashboards.exports import figure_csv
from dashboards.livemodel import Live
from dashboards.units import UnitName
from dashboards.words import file_name, md, plain
from emocircuits import cli, live, plots
from emocircuits.artefact import write_json_atomic
from emocircuits.circuit_plots import circuit_graph, head_map
from emocircuits.circuits.assemble import Circuit
from emocircuits.demo import Plan
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.generation import Decoding
from emocircuits.models.load import Loaded
from emocircuits.multimodal import plots as balance_plots
from emocircuits.report import read_run
from emocircuits.runs import Run
from emocircuits.steering import Steerer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts") / "runs"
    write_run(root / "a", layers=4)
    write_run(root / "b", layers=4, seed=5)
    write_balance(root / "balance")
    (root / "notes").mkdir()
    return root


def directions() -> DirectionSet:
    made = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 4, 32, generator=made)
    return DirectionSet(("anger", "fear"), "resid_post", (0, 1, 2, 3), vectors, torch.ones(4), torch.zeros(4, 32))


# ------------------------------------------------------------------------------------------------ folders


def test_a_run_is_found_with_its_neighbours_and_a_folder_with_its_runs(home: Path) -> None:
    assert folders.find(home / "b").names == ("b", "a", "balance")
    assert folders.find(home) == folders.Place(home.resolve(), ("a", "b", "balance"))
    (home / "file").write_text("")
    for wrong in ("none", "notes", "file"):
        with pytest.raises(InputError):
            folders.find(home / wrong)


def test_each_kind_of_folder_opens(home: Path, tmp_path: Path) -> None:
    results = Path(__file__).parents[1] / "experiments" / "results"
    kinds = {home / "a": "run", home / "balance": "modality", results / "demo": "run", results / "circuits": "circuits",
             results / "nano_mllm": "modality"}  # fmt: skip
    for folder, kind in kinds.items():
        assert folders.kind(folder) == kind
        assert folders.open_run(folder).path == folder
    alone = folders.open_run(results / "circuits")
    assert alone.circuits
    assert alone.evaluation is None  # the circuits' own evaluation is not the run's
    assert (alone.model, alone.emotions[0]) == ("gemma-3-270m (demo)", "anger")
    assert folders.circuit_folder(alone) == results / "circuits"


@pytest.mark.parametrize("plan", [Plan(), Plan("org/model; rm -rf x", seed=3), Plan.small("tiny")])
def test_the_command_that_resumes_a_run_has_the_settings_of_the_run(tmp_path: Path, plan: Plan) -> None:
    from dataclasses import asdict

    Run(tmp_path / "a run", asdict(plan))
    command = folders.how_to_finish(read_run(tmp_path / "a run"))
    args = cli.parser().parse_args(shlex.split(command)[1:])
    again = Plan.small(args.model) if args.small else Plan(args.model, seed=args.seed)
    assert (again, args.out) == (plan, tmp_path / "a run")


def test_names_from_files_never_lead_out_of_a_folder(tmp_path: Path) -> None:
    assert folders.inside(tmp_path, "fear.safetensors") == tmp_path / "fear.safetensors"
    for name in ("../x", "/etc/passwd", "..", "a/b", "", "."):
        assert folders.inside(tmp_path, name) is None


# ------------------------------------------------------------------------------------------------ words


@given(st.text(max_size=80))
def test_escaping_adds_backslashes_only_and_leaves_no_markup(text: str) -> None:
    escaped = md(text)
    kept, at = [], 0
    while at < len(escaped):
        if escaped[at] == "\\":
            at += 1
        else:
            assert escaped[at] not in "`*_{}[]()<>#+|~$:&"
        kept.append(escaped[at])
        at += 1
    assert "".join(kept) == " ".join(text.split())


def test_words_of_the_reports_html() -> None:
    assert plain('80% <span class="ci">[75, 85]</span> &lt;b&gt;') == "80% [75, 85] <b>"
    assert file_name("Fear: how it works / 3") == "fear-how-it-works-3"
    assert file_name("???") == "figure"


# ------------------------------------------------------------------------------------------------ units


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


# ------------------------------------------------------------------------------------------------ mixing


def test_a_mix_is_the_weighted_sum_and_its_file_holds_it() -> None:
    saved = {e: directions().steerer(e, 0.5, [1, 2]) for e in ("anger", "fear")}
    mixed = mixing.mix(saved, {"anger": 1.0, "fear": -0.5, "joy": 3.0}, 2.0, "generated")
    assert mixed.name.startswith("2 anger+-1 fear")
    model = zoo.build("llama")
    assert {t.positions for t in mixed.terms} == {"generated"}
    wanted, ids = 2.0 * saved["anger"] + -1.0 * saved["fear"], torch.tensor([[1, 5, 6]])
    with torch.no_grad(), mixed.at("all").attach(model):
        found = model(ids).logits
    with torch.no_grad(), wanted.attach(model):
        assert torch.allclose(model(ids).logits, found, atol=1e-6)
    assert mixing.mix(saved, {"anger": 0.0}, 2.0, "all") is None
    assert mixing.mix(saved, {"anger": 1.0}, 0.0, "all") is None


def test_a_downloaded_steerer_is_the_one_on_the_page(tmp_path: Path) -> None:
    saved = {"fear": directions().steerer("fear", 0.5, [1, 2])}
    mixed = mixing.mix(saved, {"fear": 1.5}, 1.0, "all")
    (tmp_path / "x.safetensors").write_bytes(mixing.as_file(mixed))
    again = Steerer.load(tmp_path / "x.safetensors")
    assert (again.name, again.strength, again.provenance) == (mixed.name, mixed.strength, mixed.provenance)
    assert torch.equal(again.terms[0].vectors, mixed.terms[0].vectors)


def test_steerers_come_at_the_settings_that_tuning_chose(home: Path) -> None:
    data = read_run(home / "a")
    made = mixing.from_directions(data, directions())
    assert set(made) == {"anger", "fear"}
    for steerer in made.values():  # tuning chose layers that these four-layer directions lack: the cautious default
        assert steerer.strength * len(steerer.terms[0].layers) == pytest.approx(mixing.TOTAL)


def test_fluency_uses_the_runs_rule(home: Path, tmp_path: Path) -> None:
    data = read_run(home / "a")
    texts, odd = ["a plain and simple text of words", "no no no no no no no no"], [12.0, 30.0]
    assert [f.limit for f in mixing.fluency(texts, odd, data)] == [None, None]
    write_json_atomic(tmp_path / "manifest.json", {"settings": {}, "stages": {}})
    write_json_atomic(tmp_path / "thresholds.json", {"perplexity": 20.0, "repetition": 0.4})
    fine, broken = mixing.fluency(texts, odd, read_run(tmp_path))
    assert fine.reason == ""
    assert "loop" in broken.reason
    assert "perplexity 30" in broken.reason


def test_two_tabs_that_steer_at_once_do_not_mix() -> None:
    tab = Live(Loaded(zoo.build("llama"), letters(), "tiny"))
    steerers = [None, directions().steerer("anger", 3.0), directions().steerer("fear", 3.0)] * 3
    decoding = Decoding(10, 2)
    alone = [live.write(tab.loaded.model, tab.loaded.tokenizer, "one day", [s], decoding=decoding) for s in steerers]
    found: list[Any] = [None] * len(steerers)
    waits: list[int] = []

    def press(i: int) -> None:
        with tab.alone(lambda: waits.append(i)) as loaded:
            found[i] = live.write(loaded.model, loaded.tokenizer, "one day", [steerers[i]], decoding=decoding)

    threads = [threading.Thread(target=press, args=(i,)) for i in range(len(steerers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len({a[0] for a in alone}) == 3


def test_a_tab_that_is_closed_while_waiting_or_writing_lets_the_next_one_in() -> None:
    tab = Live(None)

    class Closed(BaseException):
        pass

    def close() -> None:
        raise Closed

    def wait() -> None:
        with pytest.raises(Closed), tab.alone(close):
            pass

    def write() -> None:
        with tab.alone():
            waiting = threading.Thread(target=wait)
            waiting.start()
            waiting.join()
            raise Closed

    with pytest.raises(Closed):
        write()
    entered = []

    def enter() -> None:
        with tab.alone(close):
            entered.append(True)

    last = threading.Thread(target=enter)
    last.start()
    last.join()
    assert entered == [True]


# ------------------------------------------------------------------------------------------------ rows


def test_records_notice_changed_missing_and_foreign_files(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"one").hexdigest()
    for name, content in (("same", b"one"), ("changed", b"two")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    (tmp_path / "outside").write_bytes(b"one")
    states = {n: records.state(tmp_path / "run", n, digest) for n in ("same", "changed", "gone", "../outside")}
    assert states == {"same": "as written", "changed": "changed", "gone": "missing", "../outside": "outside the run"}


def test_a_real_runs_files_are_as_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {"model": "demo"})
    run.json_stage("norms", lambda: [1.0, 2.0])
    manifest = read_run(tmp_path / "run").manifest
    assert {n: records.state(run.path, n, d) for n, d in records.files(manifest).items()} == {
        "norms.json": "as written"
    }
    assert [row["stage"] for row in records.stage_rows(manifest)] == ["norms"]


def test_a_count_that_is_not_set_means_all() -> None:
    settings = {"n_train": None, "n_validation": 3, "demo": {"n_heldout": None, "scenarios": None}, "rate": None}
    rows = {row["setting"]: row["value"] for row in records.setting_rows({"settings": settings})}
    assert rows == {"n train": "all", "n validation": "3", "demo n heldout": "all", "demo scenarios": "all of ours",
                    "rate": "n/a (not defined by the data)"}  # fmt: skip


def test_comparison_shows_both_runs_and_only_what_differs(home: Path) -> None:
    a, b = read_run(home / "a"), read_run(home / "b")
    names = ("a", "b")
    assert {r["setting"]: (r["a"], r["b"]) for r in comparing.different_settings(a, b, names)} == {"seed": ("0", "5")}
    assert comparing.different_settings(a, a, names) == []
    keys = {r["measure"]: r for r in comparing.key_rows(a, b, names)}
    assert keys["Coherent, steered"]["a"] == "80% [75, 85]"
    sets, layers = comparing.layer_tests(a, b, names) or ({}, [])
    assert [t["name"] for t in sets["tests"]] == ["a", "b"]
    assert layers == [0, 1, 2, 3]


def test_a_token_table_keeps_surprise_apart_from_surprisal() -> None:
    found = SimpleNamespace(
        pieces=("a", "b"), emotions=("fear", "surprise"), surprise=torch.tensor([3.0, 4.0]),
        at=lambda layer: torch.tensor([[0.1, 0.2], [0.3, 0.4]]) * layer,
    )  # fmt: skip
    assert findings.token_rows(found, 2)[1] == pytest.approx(
        {"token": "b", "fear": 0.6, "surprise": 0.8, "surprisal, nats": 4.0}
    )


def test_a_figures_numbers_are_saved_as_they_are_drawn() -> None:
    lines = plots.quality_by_layer({"tests": [{"name": "<b>", "rows": [
        {"layer": 0, "accuracy": 0.5, "low": 0.4, "high": 0.7}, {"layer": 1, "accuracy": 0.8, "low": 0.7, "high": 0.9},
    ]}]}, [0, 1], 0.5)  # fmt: skip
    rows = pd.read_csv(io.StringIO(figure_csv(lines)))
    mine = rows[rows["series"] == "<b>"]
    assert list(mine["y"].dropna())[-2:] == [0.5, 0.8]
    heat = pd.read_csv(io.StringIO(figure_csv(plots.geometry_map([[1.0, 0.5], [0.5, 1.0]], ["fear", "joy"]))))
    assert {(r.x, r.y): r.value for r in heat.itertuples()}["fear", "joy"] == 0.5
    bars = balance_plots.changed_bars({"less": [{"estimate": 0.25, "low": 0.2, "high": 0.5}]}, {"less": [0.5]})
    row = pd.read_csv(io.StringIO(figure_csv(bars))).iloc[0]
    assert (row["x"], row["y"], row["y_plus"]) == ("less 0.5", 0.25, 0.25)


def test_balance_is_said_as_the_report_says_it(home: Path) -> None:
    kind, found = modality.read(home / "balance")
    assert kind == "balance"
    assert "6 prompts" in modality.verdicts(found)[0]
    assert modality.verdicts(found)[1].endswith("audio drives the answers more.")


def test_the_published_test_bed_has_rows_for_every_table() -> None:
    kind, found = modality.read(Path(__file__).parents[1] / "experiments" / "results" / "nano_mllm")
    assert kind == "testbed"
    for rows in (modality.score_rows, modality.curve_rows, modality.held_out, modality.policy_rows, modality.knob_rows):
        assert len(rows(found)) > 4
    assert "n/a" not in str(modality.score_rows(found))


def test_verdicts_on_texts_say_what_the_judge_saw() -> None:
    row = {
        "emotion": "fear",
        "coherent": False,
        "predicted": "anger",
        "named": True,
        "degenerate": True,
        "reason": "loop",
    }
    assert findings.verdict(row | {"perplexity": None}) == (
        "no coherent expression; read as anger; names the emotion; degenerate (loop); perplexity n/a"
    )
