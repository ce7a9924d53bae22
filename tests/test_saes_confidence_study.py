"""`emocircuits sae confidence`: what its numbers mean, and the whole of it on a few problems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emocircuits import cli
from emocircuits.activations import Add, edit
from emocircuits.data.emotions import EKMAN6
from emocircuits.multimodal.balance import Answers
from emocircuits.reasoning.study import Plan as ProblemPlan
from emocircuits.reasoning.study import problem_traces

pytest.importorskip("sae_lens", reason="sae-lens is not installed: emocircuits[sae]")

from saes import study
from saes.confidence import Confidence, Settings
from saes.confidence_study import Asked, Plan, _Measured, ask, run_confidence


def sure(answers: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [problems, draws, 6] of a model that is nearly sure of the given answers."""
    return (10 * torch.nn.functional.one_hot(torch.tensor(answers), 6).float()).log_softmax(-1)


class TestMeasured:
    asked = [Asked([], [], 0, EKMAN6[i % 6], f"theme {i // 6}") for i in range(48)]
    right = [i % 6 for i in range(48)]
    wrong = [(i + 1) % 6 for i in range(48)]

    def test_cells(self):
        measure = _Measured.of(self.asked, 0)
        half = measure.cell("x", 0.1, sure([[a, b] for a, b in zip(self.right, self.wrong)]))
        assert half["accuracy"]["estimate"] == 0.5
        assert half["right"]["estimate"] == pytest.approx(0.5, abs=1e-3)
        assert half["entropy"]["estimate"] < 0.02
        flat = measure.cell("x", 0.1, torch.zeros(48, 1, 6).log_softmax(-1))
        assert flat["entropy"]["estimate"] == pytest.approx(np.log(6), rel=1e-5)
        assert flat["accuracy"]["n_clusters"] == 8

    def test_against(self):
        right, wrong = (sure([[a] for a in answers]) for answers in (self.right, self.wrong))
        arms = {"vector": torch.stack([right, wrong], 2), "random": torch.stack([wrong, wrong], 2)}
        found = {(t["rival"], t["dose"]): t for t in _Measured.of(self.asked, 0).against(wrong, arms, (-0.1, 0.1))}
        assert found["none", -0.1]["estimate"] == found["random", -0.1]["estimate"] == 1
        assert found["none", -0.1]["p"] == pytest.approx(min(4 * found["none", -0.1]["raw_p"], 1))
        assert found["none", -0.1]["p"] < 0.05
        assert found["none", 0.1]["estimate"] == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--iterations", "0", "iterations must be"),
        ("--held-out", "1", "held_out is a share"),
        ("--lr", "0", "lr must be"),
    ],
)
def test_settings_are_checked_first(option, value, message, capsys, tmp_path):
    assert cli.main(["sae", "confidence", "--model", "no/such", "--out", str(tmp_path / "r"), option, value]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.real_model
def test_the_study_runs_and_reads_what_it_finished(demo, tmp_path: Path) -> None:
    learned = Settings(iterations=3, batch=4, lr=0.1, held_out=0.5, draws=1, top=3)
    small = {"width": 64, "k": 4, "epochs": 2, "scenarios": 2}
    plan = Plan(learned, seeds=2, doses=(-0.1, 0.1), draws=1, mixed=2, problems=2, **small)
    made = run_confidence(demo, tmp_path / "run", traces=study.reasoning_traces()[:4], plan=plan)
    report = json.loads(made.read_text())
    effects = report["vector"]["effects"]["train"]
    assert effects["offset"]["entropy"] < effects["none"]["entropy"] < effects["mirrored"]["entropy"]
    assert len(report["vector"]["seeds"]) == 1
    assert report["said"]["none"]["unchanged"] == 1
    assert set(report["said"]) == {"none", "offset", "mirrored", "dense"}
    cells = report["answers"]["cells"]
    assert cells[0]["method"] == "none"
    assert {c["method"] for c in cells} >= {"vector", "top latents", "random", "mixture"}
    table = made.with_suffix(".md").read_text()
    assert table.count("| vector |") == 2
    assert "| mixture | fitted |" in table

    found = Confidence.load(tmp_path / "run/vector_0.safetensors")
    traces = problem_traces(demo, ProblemPlan(), None, "written")
    one = Asked.of(demo, traces[0], "theme")
    vectors = torch.stack([0 * found.vector, 5 * found.vector])
    answers = Answers.of_words(demo.tokenizer, {e: f" {e}" for e in EKMAN6})
    scores = ask(demo, [one], [vectors], found.key)[0]
    for vector, own in zip(vectors, scores):
        with torch.no_grad(), edit(demo.model, [Add(site="resid_post", layer=12, vector=vector, positions=[one.ends])]):
            whole = answers.scores(demo.model, torch.tensor([one.ids]))[0]
        torch.testing.assert_close(own, whole, rtol=1e-3, atol=1e-3)

    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.*")}
    run_confidence(demo, tmp_path / "run", traces=study.reasoning_traces()[:4], plan=plan)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.*")}
