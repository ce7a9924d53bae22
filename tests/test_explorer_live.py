"""Pages that ask the model, and the units of a circuit, without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from explorer_app import home as home
from explorer_app import open_app as open_app
from explorer_app import said, well

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


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
