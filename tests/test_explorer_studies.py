"""The pages about latents and modalities, without a browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from explorer_app import home as home
from explorer_app import open_app as open_app
from explorer_app import said, well

TESTBED = Path(__file__).parents[1] / "experiments" / "results" / "nano_mllm"


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
