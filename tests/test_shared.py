"""Directions and units across modalities: found when they are the same, rejected when they are not."""

from __future__ import annotations

import pytest
import torch
import zoo
from test_balance import ANSWERS
from test_reallocation import case

from emocircuits.activations import capture
from emocircuits.circuits.gradients import attribution
from emocircuits.circuits.readout import Readout
from emocircuits.errors import InputError
from emocircuits.models.anatomy import resolve
from emocircuits.multimodal.shared import read_spans, shared_units, transfer, unit_effects
from emocircuits.reading import Features

EMOTIONS = ("anger", "fear", "joy")


def features(code: torch.Tensor, seed: int, name: str) -> Features:
    """20 speakers, each with every emotion at code [E, d], and noise; two layers, the first without the code."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(f"p{p}", e) for p in range(20) for e in range(3)]
    x = torch.randn(len(rows), 2, code.shape[1], generator=generator)
    for i, (_, e) in enumerate(rows):
        x[i, 1] += 3 * code[e]
    groups = tuple(p for p, _ in rows)
    return Features(
        x, tuple(EMOTIONS[e] for _, e in rows), groups, ("",) * len(rows), groups, "resid_post", (0, 1), name
    )


def test_a_shared_code_transfers_and_another_does_not() -> None:
    shared = torch.eye(3, 16) * 2
    other = torch.zeros(3, 16)
    other[:, 8:11] = torch.eye(3) * 2
    codes = {"audio": shared, "image": shared, "text": other}
    train = {n: features(c, i, n) for i, (n, c) in enumerate(codes.items())}
    test = {n: features(c, 10 + i, n) for i, (n, c) in enumerate(codes.items())}
    found = {(r["fit"], r["read"], r["layer"]): r for r in transfer(train, test, EMOTIONS)}
    assert found["audio", "image", 1]["accuracy"] > 0.9
    assert found["audio", "image", 1]["cosine"] > 0.8
    assert found["audio", "text", 1]["accuracy"] < 0.6
    assert abs(found["audio", "text", 1]["cosine"]) < 0.4
    assert found["audio", "image", 0]["accuracy"] < 0.6
    with pytest.raises(InputError, match="same names"):
        transfer(train, {"audio": test["audio"]}, EMOTIONS)


def test_readings_are_means_over_the_modality_s_tokens() -> None:
    model, inputs, spans, _, _ = case("qwen2_5_omni")
    found = read_spans(model, [(inputs, ["anger", "fear"], ["p", "p"])] * 2)
    assert set(found) == {"audio", "image", "answer"}
    acts = capture(model, inputs, "resid_post", 2, positions="all")["resid_post", 2]
    for row in range(2):
        expected = acts[row, spans.mask("audio")[row]].mean(0)
        torch.testing.assert_close(found["audio"].x[row + 2, 2], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["answer"].x[row, 2], acts[row, -1], rtol=1e-4, atol=1e-5)
    assert found["audio"].labels == ("anger", "fear") * 2
    with pytest.raises(InputError, match="an emotion and a group"):
        read_spans(model, [(inputs, ["anger"], ["p", "p"])])


def test_unit_effects_are_attributions_to_the_own_emotion() -> None:
    model, inputs, _, _, _ = case("qwen2_5_omni")
    weights = model.get_output_embeddings().weight.detach()[list(ANSWERS.tokens)]
    readout = Readout(EMOTIONS[:2], "final_norm", 0, weights[:2], "words")
    found = unit_effects(model, [(inputs, ["anger", "fear"])], readout)
    means = {
        s: torch.stack([capture(model, inputs, s, n)[s, n].mean(0) for n in range(resolve(model).n_layers)])
        for s in ("z", "mlp_post")
    }
    raw = attribution(model, inputs, readout, means)
    for site in found:
        torch.testing.assert_close(found[site][0], raw[site][0, ..., 0] - raw[site][0, ..., 1])
        torch.testing.assert_close(found[site][1], raw[site][1, ..., 1] - raw[site][1, ..., 0])
    with pytest.raises(InputError, match="no row shows fear"):
        unit_effects(model, [(inputs, ["anger", "anger"])], readout)


def test_overlap_is_one_with_itself_and_chance_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"z": torch.rand(3, 6, 8, generator=generator), "mlp_post": torch.rand(3, 6, 200, generator=generator)}
            for _ in range(2))  # fmt: skip
    same, noise = shared_units(a, a, EMOTIONS, 8, 100), shared_units(a, b, EMOTIONS, 8, 100)
    assert all(r[kind]["excess"] == pytest.approx(1) for r in same for kind in ("heads", "neurons"))
    assert all(abs(r["neurons"]["excess"]) < 0.1 for r in noise)
    assert all(abs(r["neurons"]["other_emotion"]) < 0.1 for r in same)
    assert zoo.MULTIMODAL
