"""In a model whose circuit is known, the latents that it writes are its doing, and others are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from organisms import D_MODEL, EMOTIONS, HEADS, NEURONS, TOKENS, B, C, X, planted

from emocircuits.circuits.assemble import Circuit
from emocircuits.circuits.units import Units
from emocircuits.errors import InputError
from emocircuits.reasoning.steps import split
from emocircuits.reasoning.traces import Trace

pytest.importorskip("sae_lens", reason="sae-lens is not installed: emocircuits[sae]")

from saes.driven import driven_by
from saes.metrics import LinearCoder
from saes.tables import driven

KEY = ("resid_post", 2)
LATENTS = {"path": C.start + 2, "distractor": X.start + 2, "silent": D_MODEL - 1}
TRACES = [
    Trace("bos", split(f" w7 w1. fear w{i} w2. w{i + 1} w{i + 2}."), id=str(i)) for i in range(5, 13)
]  # fmt: skip


@pytest.fixture(scope="module")
def setting():
    """The planted model, the residual stream's own axes as latents, and units whose mean is nothing."""
    model, n = planted().model, 4
    zeros = torch.zeros(3, 1, n, 4, 8), torch.zeros(3, 1, n, 48), torch.zeros(3, 1, n, D_MODEL)
    units = Units(
        EMOTIONS, ("all",), torch.ones(3, 1), *zeros, torch.zeros(3, 1, n, 4, 3), torch.zeros(3, 1, n, 48),
        torch.zeros(n, 48), torch.zeros(3, n, 48), torch.ones(n, D_MODEL), torch.ones(n, D_MODEL),
    )  # fmt: skip

    def fires(codes: torch.Tensor) -> torch.Tensor:
        return torch.where(codes > 0.02, codes, 0)

    return model, LinearCoder(torch.zeros(D_MODEL), torch.eye(D_MODEL), fires), units


def circuit(heads: tuple[tuple[int, int], ...], neurons: tuple[tuple[int, int], ...] = ()) -> Circuit:
    return Circuit("fear", heads, neurons, (1.0,) * len(heads), (1.0,) * len(neurons))


def test_what_the_planted_path_writes_is_its_doing(setting):
    model, sae, units = setting
    made = driven_by(
        model, TOKENS, sae, KEY, TRACES, list(LATENTS.values()), circuit(HEADS[:1], NEURONS), units, draws=3
    )
    path, distractor, silent = made
    assert path.whole > 0
    assert path.lost["estimate"] == pytest.approx(1, abs=0.05)
    assert abs(path.random["estimate"]) < 0.1
    assert path.p < 0.01
    assert abs(distractor.lost["estimate"]) < 0.05
    assert silent.whole == 0
    assert silent.lost["estimate"] is None


def test_half_of_the_path_is_enough_to_cut_it_and_the_distractor_is_not(setting):
    model, sae, units = setting
    for own, lost in ((circuit(((1, 2),)), 1.0), (circuit((), NEURONS), 1.0), (circuit(((0, 3),)), 0.0)):
        (found,) = driven_by(model, TOKENS, sae, KEY, TRACES, [LATENTS["path"]], own, units, draws=1)
        assert found.lost["estimate"] == pytest.approx(lost, abs=0.05)


def test_batches_do_not_matter(setting):
    model, sae, units = setting
    one, many = (
        driven_by(model, TOKENS, sae, KEY, TRACES, [B.start + 2], circuit(HEADS), units, draws=2, batch_size=n)[0]
        for n in (1, 8)
    )
    assert one.lost["estimate"] == pytest.approx(many.lost["estimate"], abs=1e-4)


def test_what_cannot_be_said(setting):
    model, sae, units = setting
    given = (model, TOKENS, sae, KEY, TRACES)
    with pytest.raises(InputError, match="0 to 31"):
        driven_by(*given, [99], circuit(HEADS), units)
    with pytest.raises(InputError, match="no unit of this circuit"):
        driven_by(*given, [1], circuit(((3, 1),)), units)
    with pytest.raises(InputError, match="no unit of this circuit"):
        driven_by(*given, [1], circuit(()), units)
    with pytest.raises(InputError, match="two traces"):
        driven_by(*given[:4], TRACES[:1], [1], circuit(HEADS), units)
    with pytest.raises(InputError, match="8 traces were given, but 3 clusters"):
        driven_by(*given, [1], circuit(HEADS), units, clusters=["a", "b", "c"])


def test_intervals_and_tests_are_over_clusters(setting):
    model, sae, units = setting
    given = model, TOKENS, sae, KEY, TRACES, [LATENTS["path"]], circuit(HEADS[:1], NEURONS), units
    (alone,), (two,) = (driven_by(*given, draws=1, clusters=c) for c in (None, ["a", "b"] * 4))
    assert alone.lost["estimate"] == two.lost["estimate"]
    assert alone.p < two.p == pytest.approx(0.5), "two clusters have four flips, two of them as large"


def test_the_committed_table_is_that_of_the_committed_numbers() -> None:
    folder = Path(__file__).parents[1] / "experiments/results/saes"
    report = json.loads((folder / "driven.json").read_text("utf-8"))
    assert (folder / "driven.md").read_text("utf-8") == driven(report)
    assert {e for row in report["rows"] for e in row["others"]} == set(report["circuits"])
    assert all(row["emotion"] not in row["others"] for row in report["rows"])
