"""Cost cards: what is in them, that they are measured and not made up, and how they are shown."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
import zoo
from test_demo import loaded as loaded  # a tiny model with a tokenizer; skips without the sentence encoder

from emocircuits import card as cards
from emocircuits._card_text import markdown, plot
from emocircuits.cli import main
from emocircuits.errors import InputError
from emocircuits.evaluation.capability import capability, items
from emocircuits.steering import Meter, Ramp, Steerer, Tags, Term, Until


def steerer(mode: str = "add") -> Steerer:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return Steerer((Term("resid_post", (1, 2), vectors, 1.0, mode=mode),), "fear")


@pytest.fixture(scope="module")
def measured(loaded):
    return cards.measure(steerer(), *loaded, "fear", n_scenarios=2, max_new_tokens=4)


def cell(card, method: str, dose: float) -> dict:
    return next(c for c in card["cells"] if (c["method"], c["dose"]) == (method, dose))


def test_a_card_has_every_dose_with_its_control(measured) -> None:
    doses = sorted(cards.DOSES)
    assert [c["dose"] for c in measured["cells"] if c["method"] == "steered"] == doses
    assert [c["dose"] for c in measured["cells"] if c["method"] == "random"] == doses
    clean = cell(measured, "none", 0.0)
    assert clean["kl_on_neutral"] == 0.0
    assert all(c["kl_on_neutral"] > 0 for c in measured["cells"] if c["method"] != "none")
    assert cell(measured, "steered", 1.5)["kl_on_neutral"] > cell(measured, "steered", 0.5)["kl_on_neutral"]
    assert {c["coherent"]["n_clusters"] for c in measured["cells"]} == {2}


def test_the_random_control_has_the_same_norms_and_another_direction() -> None:
    one = steerer()
    control = one.randomised(3)
    torch.testing.assert_close(control.terms[0].vectors.norm(dim=-1), one.terms[0].vectors.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(control.terms[0].vectors, one.terms[0].vectors).abs().max() < 0.6
    assert torch.equal(control.terms[0].vectors, one.randomised(3).terms[0].vectors)
    with pytest.raises(InputError, match="no random control"):
        steerer("remove").randomised()


def test_a_limit_has_a_card_without_random_control(loaded) -> None:
    found = cards.measure(steerer("cap"), *loaded, "fear", n_scenarios=2, max_new_tokens=4)
    assert {c["method"] for c in found["cells"]} == {"none", "steered"}
    assert "No random control" in markdown(Steerer((), "x", cost=found), "x.svg")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.at("generated"),
        lambda s: s.when(Ramp(0, 1, 3)),
        lambda s: s.when(Tags((5,), (6,))),
        lambda s: s.when(Until(Meter(("a", "b"), "resid_post", 2, torch.randn(2, 32), torch.zeros(2)), "a", 0.5)),
    ],
)
def test_every_kind_of_steerer_has_a_card(loaded, change, measured) -> None:
    found = cards.measure(change(steerer()), *loaded, "fear", n_scenarios=2, max_new_tokens=4)
    kl = [cell(c, "steered", 1.0)["kl_on_neutral"] for c in (found, measured)]
    assert kl[0] == pytest.approx(kl[1])


def test_markdown_and_plot_say_the_same(measured, tmp_path) -> None:
    made = Steerer(steerer().terms, "fear", cost=measured)
    path = cards.write_card(made, tmp_path / "fear.md")
    text = path.read_text()
    assert "![dose and response](fear.svg)" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0] == "unsteered"
    assert rows[1:3] == ["-1", "-1, random"]
    root = ElementTree.fromstring((tmp_path / "fear.svg").read_text())
    points = [line.get("points", "").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(p) for p in points if p] == [6, 6] * (len([p for p in points if p]) // 2)
    with pytest.raises(InputError, match="no cost card"):
        cards.write_card(steerer(), tmp_path / "none.md")


def test_undefined_numbers_are_said(measured) -> None:
    empty = {**measured, "cells": [{**c, "perplexity": None, "kl_on_neutral": None} for c in measured["cells"]]}
    assert "undefined" in markdown(Steerer((), "x", cost=empty), "x.svg")
    assert "NaN" not in plot(empty)


def test_the_command_writes_the_card_into_the_file(loaded, tmp_path, monkeypatch, measured) -> None:
    path = steerer().save(tmp_path / "fear.safetensors")
    monkeypatch.setattr(sys.modules["emocircuits.models.load"], "load", lambda name: loaded)
    monkeypatch.setattr(cards, "measure", lambda *a, **k: measured)
    assert main(["card", str(path), "--model", "tiny"]) == 0
    assert Steerer.load(path).cost == measured
    assert (tmp_path / "fear.md").exists()
    assert (tmp_path / "fear.svg").exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"emotion": "envy"}, "emotion 'envy'"),
        ({"doses": (0.5, 1, 2, 3, 4)}, "both signs"),
        ({"doses": (-1, 1)}, "five doses"),
        ({"n_scenarios": 1}, "two scenarios"),
    ],
)
def test_bad_requests_are_refused_before_work(loaded, how, words, monkeypatch) -> None:
    monkeypatch.setattr(cards, "generate", lambda *a, **k: pytest.fail("work was done"))
    arguments = {"emotion": "fear"} | how
    with pytest.raises(InputError, match=words):
        cards.measure(steerer(), *loaded, **arguments)


def test_capability_counts_what_the_model_prefers(loaded) -> None:
    assert len(items()) == 40
    assert len({prompt for prompt, _ in items()}) == 40
    assert all(len(set(choices)) == 3 for _, choices in items())
    model, tokenizer = loaded
    found = capability(model, tokenizer)
    assert found.shape == (40,)
    assert found.dtype == np.bool_
    assert np.array_equal(found, capability(model, tokenizer))
    assert not np.array_equal(found, capability(zoo.build("llama", seed=9), tokenizer))


@pytest.mark.real_model
def test_the_demo_model_knows_the_items() -> None:
    from emocircuits.errors import MissingPackageError
    from emocircuits.models.load import load

    try:
        model, tokenizer = load("demo")
    except MissingPackageError as error:
        pytest.skip(f"the demo model is not installed: {error}")
    assert capability(model, tokenizer).mean() > 0.8
