"""The explorer without a browser: every page on whole, partial, foreign, damaged and hostile runs; links; command."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from explorer_app import APP, said, sections, well
from explorer_app import home as home
from explorer_app import open_app as open_app

from emocircuits import cli, explore
from emocircuits.artefact import write_json_atomic
from emocircuits.errors import InputError, MissingPackageError

VIEWS = ("overview", "directions", "circuits", "steer", "modality", "reasoning", "features", "compare", "about")
HOSTILE = "<img src=x onerror=alert(1)> **b** ![](http://evil.example/x) $x$ :red[y] [z](javascript:alert(2))"


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("run", ["whole", "other", "partial", "balance", "anchors", "sae"])
def test_every_view_of_every_page_is_well_on_every_kind_of_run(home: Path, open_app: Any, run: str, view: str) -> None:
    at = open_app(home / run, view)
    well(at)
    for section in sections(at):
        well(at.segmented_control[0].set_value(section).run())


def computing(at: Any) -> float:
    """Seconds of processor time that a rerun takes."""
    start = time.process_time()
    at.run()
    return time.process_time() - start


@pytest.mark.parametrize("view", VIEWS)
def test_a_page_takes_less_than_a_second_of_computing_once_it_was_open(home: Path, open_app: Any, view: str) -> None:
    at = open_app(home / "whole", view)
    spent = []
    for section in sections(at) or [None]:
        if section is not None:
            at.segmented_control[0].set_value(section).run()
        spent.append(min(computing(at) for _ in range(2)))  # garbage of other tests may be collected in one of them
    assert max(spent) < 1.0


def test_the_overview_says_what_the_report_says(home: Path, open_app: Any) -> None:
    from dashboards.words import md, plain
    from emocircuits.report import headline, read_run

    at = open_app(home / "whole")
    for sentence in headline(read_run(home / "whole")):
        assert md(plain(sentence)) in [m.value for m in at.markdown]
    figures = {m.label: (m.value, m.delta) for m in at.metric}
    assert figures["Coherent, steered"] == ("80%", "[75, 85]")


def test_texts_stand_side_by_side(home: Path, open_app: Any) -> None:
    at = open_app(home / "whole", view="overview", emotion="fear")
    at.segmented_control[0].set_value("Texts").run()
    rows = [json.loads(line) for line in (home / "whole" / "texts.jsonl").read_text().splitlines()]
    key = at.selectbox(key="scenario").value.split("/")[0]
    wanted = {r["text"] for r in rows if r["skeleton_id"] == key and r["emotion"] in ("fear", None)}
    assert wanted <= {t.value for t in at.text}


def test_links_choose_run_view_emotion_and_unit(home: Path, open_app: Any) -> None:
    at = open_app(home, run="whole", view="overview", emotion="joy", unit="h1.3")
    assert at.selectbox(key="run").value == "whole"
    at.switch_page("views/circuits.py").run()
    assert at.selectbox(key="emotion").value == "joy"
    assert at.subheader[0].value == "Head 3 of layer 1"
    at = open_app(home, run="../../etc", emotion="<b>", unit="../x")
    well(at)
    assert at.selectbox(key="run").value == at.selectbox(key="run").options[0]
    well(at.switch_page("views/circuits.py").run())


def test_the_chosen_run_and_emotion_stay_when_the_page_changes(home: Path, open_app: Any) -> None:
    at = open_app(home / "whole", "circuits")
    at.selectbox(key="emotion").set_value("fear").run()
    at.selectbox(key="run").set_value("other").run()
    at.switch_page("views/about.py").run()
    assert at.selectbox(key="run").value == "other"
    assert str(home / "other") in said(at).replace("\\", "")


def test_the_address_holds_what_is_shown_also_where_it_is_the_default(home: Path, open_app: Any) -> None:
    at = open_app(home, "directions", run="whole")
    at.segmented_control(key="view").set_value("Geometry").run()
    held = {name: at.query_params[name] for name in ("run", "view", "layer", "map")}
    layer = str(at.slider(key="layer").value)
    assert held == {"run": "whole", "view": "Geometry", "layer": layer, "map": "principal components"}


def test_the_browsers_back_button_is_followed(home: Path, open_app: Any) -> None:
    at = open_app(home / "whole", "directions", layer="1")
    at.segmented_control(key="view").set_value("Geometry").run()
    at.slider(key="layer").set_value(3).run()
    assert at.query_params["layer"] == "3"
    at.query_params["layer"] = "1"  # what the browser had before
    at.run()
    assert at.slider(key="layer").value == 1
    at.query_params["layer"] = "many"
    at.run()
    assert at.slider(key="layer").value == 1
    well(at)


# ------------------------------------------------------------------------------------------------ bad runs


def damaged(home: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    run = tmp_path / "runs" / "bad"
    shutil.copytree(home / "other", run)
    change(run)
    return run


def test_no_run_is_a_sentence_with_a_command(tmp_path: Path, open_app: Any) -> None:
    for folder, words in ((tmp_path / "none", "does not exist"), (tmp_path, "is not a run folder")):
        at = open_app(folder)
        assert not at.exception
        assert words in at.error[0].value.replace("\\", "")
        assert "emocircuits demo" in at.code[0].value


def test_partial_runs_name_the_command_that_goes_on(home: Path, open_app: Any) -> None:
    at = open_app(home / "partial", "circuits")
    assert at.code[0].value == f"emocircuits demo --out {home / 'partial'}"
    at = open_app(home / "whole", "circuits")
    assert cli.parser().parse_args(["demo", "--out", str(home / "whole")]).out == home / "whole"


@pytest.mark.parametrize("view", VIEWS)
def test_a_damaged_file_is_one_sentence(home: Path, tmp_path: Path, open_app: Any, view: str) -> None:
    run = damaged(home, tmp_path, lambda run: (run / "evaluation.json").write_text('{"methods": {') and None)
    at = open_app(run, view)
    assert not at.exception
    assert "evaluation.json is damaged" in at.error[0].value.replace("\\", "")


def test_a_run_of_another_version_is_said_and_what_cannot_be_read_is_no_crash(
    home: Path, tmp_path: Path, open_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(run: Path) -> None:
        write_json_atomic(run / "quality.json", {"emotions": ["anger"], "layers": [0], "sets": [{"other": 1}]})
        write_json_atomic(run / "circuits" / "graphs.json", {"graphs": {"anger": 3}})

    monkeypatch.setattr("emocircuits.artefact.package_version", lambda: "7.2.0")
    run = damaged(home, tmp_path, change)
    at = open_app(run, "directions")
    assert not at.exception
    assert "made by emocircuits 0.0, and this is 7.2.0" in said(at).replace("\\", "")
    assert "cannot read what the run holds" in at.error[0].value
    assert "KeyError" in said(at)
    well(at.switch_page("views/about.py").run())


def test_hostile_text_is_shown_as_text(home: Path, tmp_path: Path, open_app: Any) -> None:
    def change(run: Path) -> None:
        for file in (*run.rglob("*.json"), run / "texts.jsonl"):
            found = file.read_text()
            for word in ("anger", "synthetic/model-0", "Synthetic", "held-out themes", "noun wording"):
                found = found.replace(word, HOSTILE)
            file.write_text(found)

    run = damaged(home, tmp_path, change)
    for view in VIEWS:
        at = open_app(run, view)
        for section in sections(at) or [None]:
            if section is not None:
                at.segmented_control[0].set_value(section).run()
            well(at)
            assert not any(m.proto.allow_html for m in (*at.markdown, *at.caption))
            rendered = "".join(str(m.value) for m in (*at.markdown, *at.caption, *at.header, *at.subheader))
            assert "<img" not in rendered.replace("\\<", "")
            assert "](" not in rendered.replace("\\]", "").replace("\\(", "")
            for chart in at.get("plotly_chart"):
                assert "<img" not in chart.proto.spec
    at = open_app(run, "overview")
    at.segmented_control[0].set_value("Texts").run()
    assert any(HOSTILE in t.value for t in at.text)


def test_a_model_that_is_gone_leaves_the_other_pages(home: Path, tmp_path: Path, open_app: Any) -> None:
    def change(run: Path) -> None:
        for name in ("directions_response_mean.safetensors", "steerers"):
            source = home / "whole" / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, run / name)
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["settings"]["model"] = "/nowhere/model"
        write_json_atomic(run / "manifest.json", manifest)

    at = open_app(damaged(home, tmp_path, change), "steer")
    at.button[0].click().run()
    assert not at.exception
    assert "nowhere/model does not exist" in at.warning[0].value.replace("\\", "")
    for view in ("overview", "directions", "circuits", "about"):
        well(at.switch_page(f"views/{view}.py").run())


def test_readings_are_drawn_at_any_layer(home: Path, open_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(at: Any) -> list[float]:
        specs = [json.loads(c.proto.spec)["data"] for c in at.get("plotly_chart")]
        return next(d[0]["x"] for d in specs if d[0].get("name") == "anger" and d[0].get("mode") == "markers")

    at = open_app(home / "whole", "directions", layer="1")
    at.segmented_control[0].set_value("Geometry").run()
    well(at)
    assert "Readings at layer 1, two principal components" in said(at)
    first = points(at)
    at.selectbox(key="map").set_value("UMAP").run(timeout=300)
    well(at)
    assert "Readings at layer 1, UMAP" in said(at)
    assert points(at) != first
    monkeypatch.setitem(sys.modules, "umap", None)
    at.slider(key="layer").set_value(2).run()
    well(at)
    assert "pip install umap" in at.info[0].value.replace("\\", "")


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_serves_this_machine_only_and_reports_nothing(home: Path) -> None:
    found = explore.command(home / "whole", 8599, browser=False)
    assert found[-2:] == ["--", str(home / "whole")]
    flags = dict(zip(found[4:-2:1], found[5:-2:1]))
    assert flags["--server.address"] == "127.0.0.1"
    assert flags["--browser.gatherUsageStats"] == "false"
    assert flags["--server.headless"] == "true"
    assert Path(found[found.index("run") + 1]) == APP


def test_bad_input_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import socket

    assert cli.main(["explore", str(tmp_path / "none")]) == 2
    assert "emocircuits demo --out" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="is taken"):
            explore.command(tmp_path, taken.getsockname()[1])
    with pytest.raises(InputError, match="choose another --port"):
        explore.command(tmp_path, 99_999_999)
    monkeypatch.setattr(explore, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'emocircuits\[dashboard\]'"):
        explore.command(tmp_path)


# ------------------------------------------------------------------------------------------------ results

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["saes", "reasoning/written", "nano_mllm", "demo", "circuits"])
def test_the_results_in_the_repository_are_shown(open_app: Any, name: str, view: str) -> None:
    at = open_app(RESULTS / name, view)
    well(at)
    for section in sections(at):
        well(at.segmented_control[0].set_value(section).run())
