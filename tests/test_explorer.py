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
from synthetic_run import write_balance, write_run, write_usable_run
from synthetic_studies import write_anchors, write_sae

from emocircuits import cli, explore
from emocircuits.artefact import write_json_atomic
from emocircuits.errors import InputError, MissingPackageError

testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed: emocircuits[dashboard]")

APP = Path(__file__).parents[1] / "dashboards" / "app.py"
VIEWS = ("overview", "directions", "circuits", "steer", "modality", "reasoning", "features", "compare", "about")
HOSTILE = "<img src=x onerror=alert(1)> **b** ![](http://evil.example/x) $x$ :red[y] [z](javascript:alert(2))"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one whose model loads, a second one, a partial one, and one about modalities."""
    root = tmp_path_factory.mktemp("explorer") / "runs"
    write_usable_run(root / "whole")
    write_run(root / "other", emotions=("anger", "fear", "joy"), layers=4, scenarios=2, seed=1)
    write_json_atomic(root / "partial" / "manifest.json", {"kind": "run", "settings": {"model": "demo"}, "stages": {}})
    write_balance(root / "balance")
    write_anchors(root / "anchors")
    write_sae(root / "sae")
    return root


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens the app on a folder at a page, with what the URL says."""

    def make(folder: Path, view: str = "overview", **query: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["app.py", str(folder)])
        at = testing.AppTest.from_file(str(APP), default_timeout=60)
        for name, value in query.items():
            at.query_params[name] = value
        at.run()
        return at.switch_page(f"views/{view}.py").run() if view != "overview" else at

    return make


def sections(at: Any) -> list[str]:
    """The buttons that change the view of a page."""
    return list(at.segmented_control[0].options) if at.segmented_control else []


def well(at: Any) -> None:
    """No exception, no error, no warning, and a heading."""
    assert not at.exception, at.exception
    assert [e.value for e in (*at.error, *at.warning)] == []
    assert at.header


def said(at: Any) -> str:
    """All words of a page that stand in Markdown or text."""
    kinds = ("markdown", "caption", "text", "code", "error", "warning", "info", "success", "header", "subheader")
    return "\n".join(str(element.value) for kind in kinds for element in getattr(at, kind))


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("run", ["whole", "other", "partial", "balance", "anchors", "sae"])
def test_every_view_of_every_page_is_well_on_every_kind_of_run(home: Path, open_app: Any, run: str, view: str) -> None:
    at = open_app(home / run, view)
    well(at)
    for section in sections(at):
        well(at.segmented_control[0].set_value(section).run())


@pytest.mark.parametrize("view", VIEWS)
def test_a_page_takes_less_than_a_second_of_computing_once_it_was_open(home: Path, open_app: Any, view: str) -> None:
    at = open_app(home / "whole", view)
    spent = []
    for section in sections(at) or [None]:
        if section is not None:
            at.segmented_control[0].set_value(section).run()
        start = time.process_time()
        at.run()
        spent.append(time.process_time() - start)
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


# ------------------------------------------------------------------------------------------------ with the model


def test_reading_a_text_gives_every_token(home: Path, open_app: Any) -> None:
    at = open_app(home / "whole", "directions", text="so mad <b>now</b>")
    at.segmented_control[0].set_value("Read a text").run()
    at.button[0].click().run()
    well(at)
    table = at.dataframe[0].value
    assert len(table) == len("so mad <b>now</b>")  # the tokenizer's tokens are letters
    assert set(table.columns) == {"token", "surprisal, nats", "anger", "fear", "joy"}
    shown = [json.loads(c.proto.spec)["data"][0].get("text") for c in at.get("plotly_chart")]
    assert "&lt;" in str(shown[0])


def test_the_playground_writes_what_the_library_writes(home: Path, open_app: Any) -> None:
    from emocircuits import live
    from emocircuits.generation import Decoding
    from emocircuits.models import load
    from emocircuits.steering import Steerer

    at = open_app(home / "whole", "steer", prompt="the dog ran", tokens="8", strength="2.0")
    at.slider(key="mix-joy").set_value(-1.0).run()
    at.button[0].click().run()
    well(at)
    model, tokenizer = load(str(home / "tiny-model"))
    saved = {e: Steerer.load(home / "whole" / "steerers" / f"{e}.safetensors") for e in ("anger", "joy")}
    mixed = live.blend([(saved["anger"], 2.0), (saved["joy"], -2.0)])
    wanted = live.write(model, tokenizer, "the dog ran", [None, mixed], decoding=Decoding(8, 8, 0.7))
    assert [t.value for t in at.text] == wanted
    assert {m.label for m in at.metric} == {"Perplexity, unsteered", "Perplexity, steered"}
    assert [b.label for b in at.get("download_button") if b.label != "CSV"] == [
        "Download the steerer",
        "Download the texts",
    ]


def test_a_unit_shows_where_it_is_active(home: Path, open_app: Any) -> None:
    for unit in ("h1.2", "n2.5"):
        at = open_app(home / "whole", "circuits", unit=unit)
        before = len(at.get("plotly_chart"))
        at.button(key="contexts").click().run()
        well(at)
        assert len(at.get("plotly_chart")) > before


def test_any_head_shows_its_attention_on_any_text(home: Path, open_app: Any) -> None:
    from emocircuits import live
    from emocircuits.models import load

    at = open_app(home / "whole", "circuits", unit="h3.1", sentence="a dog <b>ran</b> " * 9)
    before = len(at.get("plotly_chart"))
    next(b for b in at.button if "attend" in b.label).click().run()
    well(at)
    specs = [json.loads(c.proto.spec)["data"][0] for c in at.get("plotly_chart")]
    assert len(specs) == before + 1
    model, tokenizer = load(str(home / "tiny-model"))
    wanted = live.pattern(model, tokenizer, "a dog <b>ran</b> " * 9, 3, 1)
    assert next(s for s in specs if len(s.get("y", [])) == 48)["type"] == "heatmap"
    assert f"The first 48 tokens; {wanted.left_off} more are left off" in said(at).replace("\\", "")


def test_a_unit_that_the_model_lacks_is_a_sentence_in_every_view(home: Path, open_app: Any) -> None:
    for unit in ("h99.0", "h0.4", "n2.4800"):
        for view in ("Heads", "Neurons", "Graph"):
            at = open_app(home / "whole", "circuits", unit=unit)
            at.segmented_control[0].set_value(view).run()
            well(at)
            assert "This model has no" in at.info[0].value
            assert "layers 0 to 3 with" in at.info[0].value
            assert not at.subheader


def test_the_unit_shown_first_is_the_best_measured_one_of_the_score_on_show(open_app: Any) -> None:
    at = open_app(RESULTS / "circuits", "circuits", emotion="fear")  # total effects of layers 0 to 12 only
    assert at.subheader[0].value == "Head 1 of layer 4"
    assert "fear: place 1 of 52 by size" in said(at).replace("\\", "")
    assert "Grey: not measured (measured in layers 0 to 12)" in said(at).replace("\\", "")
    at.selectbox(key="score").set_value("direct").run()
    assert at.subheader[0].value == "Head 3 of layer 11"
    assert "fear: place 1 of 72 by size" in said(at).replace("\\", "")
    at.text_input(key="unit").set_value("h15.0").run()
    for words in ("mean ablation, downstream included", "to first order"):
        assert f"{words}: not measured for this head" in said(at).replace("\\", "").replace(")", "")
    assert len(at.get("plotly_chart")) == 2  # the map and the one score that this head has
    at.text_input(key="unit").set_value("h1.2").run()
    at.selectbox(key="score").set_value("total").run()
    assert at.subheader[0].value == "Head 2 of layer 1"  # what the reader chose stays


def test_a_chosen_unit_comes_right_after_its_figure(home: Path, open_app: Any) -> None:
    for view, figure in (("Heads", "plotly_chart"), ("Graph", "plotly_chart"), ("Neurons", "dataframe")):
        at = open_app(home / "whole", "circuits", unit="n1.5")
        at.segmented_control[0].set_value(view).run()
        kinds = ["dataframe" if e.type.startswith("arrow") else e.type for e in at.main]
        first = kinds.index(figure)
        between = kinds[first + 1 :][: kinds[first + 1 :].index("subheader")]
        assert set(between) <= {"flex_container", "caption", "download_button"}, "nothing but its own words"


def test_a_click_on_a_row_chooses_the_neuron(home: Path, open_app: Any) -> None:
    at = open_app(home / "whole", "circuits")
    at.segmented_control[0].set_value("Neurons").run()
    rows = at.dataframe[0].value["unit"].tolist()
    assert at.subheader[0].value == f"Neuron {rows[0].split('.')[1]} of layer {rows[0][1]}"
    assert at.dataframe[0].proto.selection_mode


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


# ------------------------------------------------------------------------------------------------ features


def test_latents_are_found_by_words_and_shown_with_their_steps(home: Path, open_app: Any) -> None:
    at = open_app(home / "sae", "features")
    well(at)
    assert any("<b>Shadow</b> 3" in str(t.value.get("text")) for t in at.dataframe)
    at.text_input[0].set_value("shadow 4").run()
    well(at)
    assert any("<b>Shadow</b> 4" in str(t.value.get("text")) for t in at.dataframe)
    at.text_input[0].set_value("nothing like it").run()
    assert "No latent matches" in said(at)


def test_steering_says_whichever_way_it_came_out(home: Path, open_app: Any) -> None:
    at = open_app(home / "sae", "features")
    at.segmented_control[0].set_value("Steering").run()
    well(at)
    words = said(at).replace("\\", "")
    assert "It beats the unsteered texts, random directions and matched latents at dose 1.0 on 30 scenarios" in words
    assert "anger**: It does not beat every control" in words
    assert "random (p = 0.3)" in words


# ------------------------------------------------------------------------------------------------ results

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
TESTBED = RESULTS / "nano_mllm"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["saes", "reasoning/written", "nano_mllm", "demo", "circuits"])
def test_the_results_in_the_repository_are_shown(open_app: Any, name: str, view: str) -> None:
    at = open_app(RESULTS / name, view)
    well(at)
    for section in sections(at):
        well(at.segmented_control[0].set_value(section).run())


# ------------------------------------------------------------------------------------------------ modality


def test_a_clip_is_seen_and_heard_and_its_answer_moves_with_the_strength(open_app: Any) -> None:
    at = open_app(TESTBED, "modality", prompt="00: voice anger, face sadness", policy="set point, last")
    well(at)
    assert "Answer: **anger (92%)**" in said(at).replace("\\", "")
    assert len(at.get("image")) == 1
    assert len(at.get("audio")) == 1
    at.select_slider[0].set_value("0.2").run()
    well(at)
    assert "Answer: **sadness" in said(at)
    assert "as it is anger (92%)" in said(at).replace("\\", "")
    at.selectbox[1].set_value("multiply both, last").run()  # a policy without this strength
    well(at)
    assert at.select_slider[0].value == "off"


def test_a_prompts_answer_changes_with_the_reallocation(home: Path, tmp_path: Path, open_app: Any) -> None:
    at = open_app(home / "balance", "modality", prompt="batch, row 3")
    well(at)
    assert "Answer: **anger (90%)**; as it is anger (90%)" in said(at).replace("\\", "")
    at.select_slider[0].set_value("1").run()
    well(at)
    assert "Answer: **fear (60%)**; as it is anger (90%)" in said(at).replace("\\", "")
    shutil.copytree(home / "balance", tmp_path / "old")
    (tmp_path / "old" / "clips").mkdir()
    shutil.copyfile(TESTBED / "clips" / "00.png", tmp_path / "old" / "clips" / "batch, row 3.png")
    assert len(open_app(tmp_path / "old", "modality", prompt="batch, row 3").get("image")) == 1
    assert not open_app(tmp_path / "old", "modality", prompt="batch, row 2").get("image")
    (tmp_path / "old" / "reallocation.json").unlink()
    at = open_app(tmp_path / "old", "modality")
    well(at)
    assert "Reallocation was not measured in this run" in said(at)
    assert not at.select_slider


def test_a_testbed_without_media_or_clips_is_well(tmp_path: Path, open_app: Any) -> None:
    for name in ("nano_mllm.json", "reallocation.json"):
        shutil.copyfile(TESTBED / name, tmp_path / name)
    at = open_app(tmp_path, "modality")
    well(at)
    assert not at.get("image")
    assert not at.get("audio")
    (tmp_path / "reallocation.json").unlink()
    at = open_app(tmp_path, "modality")
    well(at)
    assert not at.select_slider
