"""The pages about latents and modalities, studies that have only begun, and two of a kind beside each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from explorer_app import home as home
from explorer_app import open_app as open_app
from explorer_app import said, well

from dashboards import comparing, features, units
from emocircuits.artefact import write_json_atomic
from emocircuits.circuits.assemble import Circuit

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
TESTBED = RESULTS / "nano_mllm"


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
    assert "random directions (p = 0.3)" in words


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


def test_a_confidence_vector_is_shown_with_what_it_does_to_answers(tmp_path: Path, open_app: Any) -> None:
    shutil.copyfile(RESULTS / "saes" / "confidence.json", tmp_path / "confidence.json")
    at = open_app(tmp_path, "features")
    well(at)
    entropy, answers = (t.value for t in at.dataframe)
    assert list(entropy["added"])[:2] == ["nothing", "the vector"]
    assert list(entropy["entropy"])[:2] == ["2.93", "0.29"]
    assert answers.iloc[0]["accuracy"] == "39% [29, 50]"
    assert not any("Latents" in b.options for b in at.segmented_control)


# ------------------------------------------------------------------------------------------------ begun, not finished


@pytest.mark.parametrize(
    ("settings", "view", "command"),
    [
        ({"kind": "sae"}, "features", "emocircuits sae demo --out"),
        ({"kind": "confidence"}, "features", "emocircuits sae confidence --out"),
        ({"kind": "anchors"}, "reasoning", "emocircuits anchors --model demo"),
        ({"batches": ["b.safetensors"], "answers": {}}, "modality", "emocircuits balance --model MODEL"),
    ],
)  # fmt: skip
def test_a_study_that_has_only_begun_says_how_it_goes_on(
    settings: dict[str, Any], view: str, command: str, tmp_path: Path, open_app: Any
) -> None:
    folder = tmp_path / "begun"
    write_json_atomic(folder / "manifest.json", {"kind": "run", "settings": settings, "stages": {}})
    at = open_app(folder, view)
    well(at)
    assert command in said(at)
    assert str(folder) in said(at)
    at = open_app(folder)
    well(at)
    assert "This folder is about" in said(at)


def test_measured_traces_are_shown_while_others_are_still_being_measured(
    home: Path, tmp_path: Path, open_app: Any
) -> None:
    shutil.copytree(home / "anchors", tmp_path / "anchors")
    (tmp_path / "anchors" / "anchors.json").unlink()
    at = open_app(tmp_path / "anchors", "reasoning")
    well(at)
    assert "Step 0" in said(at)
    at.segmented_control[0].set_value("All traces").run()
    well(at)
    assert "Not all traces are measured yet" in said(at)


# ------------------------------------------------------------------------------------------------ beside each other


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        ("sae", "steering fear beats every control"),
        ("anchors", "correlation, asked at once ~ resampling"),
        ("balance", "answered from the text alone"),
    ],
)
def test_two_studies_of_a_kind_are_compared(kind: str, measure: str, home: Path, tmp_path: Path, open_app: Any) -> None:
    for name in ("a", "b"):
        shutil.copytree(home / kind, tmp_path / name)
    at = open_app(tmp_path / "a", "compare")
    well(at)
    keys = {r["measure"]: (r["a"], r["b"]) for r in at.dataframe[0].value.to_dict("records")}
    assert measure in keys, list(keys)
    assert all(a == b != "not measured" for a, b in keys.values())
    at = open_app(home / kind, "compare")  # alone of its kind
    well(at)
    assert "There is no other run of this kind here" in said(at)


def test_a_test_bed_and_a_confidence_vector_have_key_figures() -> None:
    assert comparing.modality.figures(TESTBED)["conflict: preference gap"].startswith("0.")
    assert features.figures(RESULTS / "saes")["entropy in nats, the vector"] == "0.29"


def test_circuits_share_units_beyond_chance_only_in_models_of_one_configuration() -> None:
    def made(heads: list[tuple[int, int]], neurons: list[tuple[int, int]], config: str = "same") -> Circuit:
        scores = (1.0,) * len(heads), (1.0,) * len(neurons)
        return Circuit("fear", tuple(heads), tuple(neurons), *scores, fingerprint={"config_sha256": config})

    size, names = units.Extent(layers=4, heads=5, neurons=25), ("a", "b")
    a = made([(0, 0), (0, 1), (1, 2), (3, 4)], [(0, 3), (2, 7)])
    b = made([(0, 0), (0, 1), (2, 2), (3, 3)], [(0, 3), (2, 7)])
    heads, neurons = comparing.circuit_rows({"fear": (a, b), "joy": (a, None)}, size, names)
    assert (heads["a"], heads["both"], heads["Jaccard"]) == ("4", "2", "0.33")
    chance = (16 / 20) / (8 - 16 / 20)
    assert heads["by chance"] == f"{chance:.3f}"
    assert heads["excess"] == f"{(1 / 3 - chance) / (1 - chance):.2f}"
    assert neurons["excess"] == "1.00"
    other = made([(0, 0)], [(0, 3)], "other")
    assert comparing.circuit_rows({"fear": (a, other)}, size, names) == []


def test_runs_of_one_model_are_compared_by_their_circuits(home: Path, tmp_path: Path, open_app: Any) -> None:
    for name in ("a", "b"):
        shutil.copytree(home / "whole", tmp_path / name)
    at = open_app(tmp_path / "a", "compare")
    well(at)
    shared = [t.value for t in at.dataframe if "units" in t.value]
    assert shared, "no circuits beside each other"
    assert set(shared[0]["excess"]) == {"1.00"}
