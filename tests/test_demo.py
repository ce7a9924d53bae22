"""The main job runs through every stage on a tiny model, resumes, and reuses what is there."""

from __future__ import annotations

import json

import pytest
import zoo
from test_reading import Words

from emocircuits.circuit_study import CircuitPlan, CircuitStudy
from emocircuits.cli import main
from emocircuits.demo import Demo, Plan
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError, MissingPackageError
from emocircuits.evaluation.judges import EmbeddingJudge
from emocircuits.models.load import Loaded
from emocircuits.report import write_report
from emocircuits.runs import Run
from emocircuits.steering import Steerer


@pytest.fixture(scope="module")
def loaded():
    try:
        EmbeddingJudge()
    except MissingPackageError as error:
        pytest.skip(f"the sentence encoder is not installed: {error}")
    return Loaded(zoo.build("llama"), Words(), "tiny")


def test_a_run_is_complete_and_is_not_done_twice(loaded, tmp_path, monkeypatch) -> None:
    plan = Plan.small("tiny")
    report = Demo(tmp_path / "run", plan, loaded).execute(CircuitPlan.small())
    assert "<html" in report.read_text()
    run = Run.open(tmp_path / "run")
    for stage in ("quality", "tuning", "texts.steered", "texts", "evaluation", "dose", "steerers"):
        assert run.done(stage), stage
    evaluation = json.loads(run.file("evaluation.json").read_text())
    assert set(evaluation["methods"]) == {"unsteered", "steered", "random", "prompted"}
    steered = evaluation["methods"]["steered"]["coherent"]
    assert steered["n"] == 6 * 4
    assert steered["n_clusters"] == 4
    made = Steerer.load(tmp_path / "run" / "steerers" / "fear.safetensors")
    assert made.check(loaded.model) is None
    assert made.cost is not None
    assert made.cost["held_out"] == evaluation["methods"]["steered"]["by_emotion"]["fear"]
    circuits = Run.open(tmp_path / "run" / "circuits")
    assert all(circuits.done(s) for s in ("units", "effects", "circuits", "curves", "evaluation"))
    compared = json.loads(circuits.file("evaluation.json").read_text())
    assert {"circuit", "random units", "direction steering", "prompting"} <= set(compared["methods"])
    assert "circuit modulation minus random units" in report.read_text().lower()
    chosen = json.loads(run.file("tuning.json").read_text())["chosen"]
    assert set(chosen) == set(plan.emotions)

    def never(*_a, **_k):
        raise AssertionError("a finished run must not generate again")

    monkeypatch.setattr("emocircuits.demo.generate", never)
    monkeypatch.setattr("emocircuits.demo.read", never)
    Demo(tmp_path / "run", plan, loaded).execute(CircuitPlan.small())
    assert write_report(tmp_path / "run") == report


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(loaded, tmp_path, monkeypatch) -> None:
    import emocircuits.demo as module

    plan, real, calls = Plan.small("tiny"), module.generate, []

    def stop_at_third(*args, **kwargs):
        calls.append(kwargs["title"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "generate", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        Demo(tmp_path / "run", plan, loaded).execute(CircuitPlan.small())
    run = Run.open(tmp_path / "run")
    assert run.done("quality")
    assert not run.done("tuning")
    before = run.file("directions_response_mean.safetensors").read_bytes()
    monkeypatch.setattr(module, "generate", real)
    Demo(tmp_path / "run", plan, loaded).execute(CircuitPlan.small())
    assert run.file("directions_response_mean.safetensors").read_bytes() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


def test_the_control_matches_the_norms_of_the_real_steerer(loaded, tmp_path) -> None:
    demo = Demo(tmp_path / "run", Plan.small("tiny"), loaded)
    demo.tuning()
    for emotion in ("anger", "fear"):
        real, random = demo.steerer(emotion).terms[0], demo.random_steerer(emotion).terms[0]
        assert real.layers == random.layers
        assert (real.vectors.norm(dim=-1) - random.vectors.norm(dim=-1)).abs().max() < 1e-3
        cosine = (real.vectors * random.vectors).sum() / (real.vectors.norm() * random.vectors.norm())
        assert abs(cosine) < 0.8
    saved = DirectionSet.load(demo.run.file("directions_response_mean.safetensors"))
    assert saved.fingerprint is not None


def test_other_settings_in_the_same_folder_are_refused(loaded, tmp_path, capsys) -> None:
    Demo(tmp_path / "run", Plan.small("tiny"), loaded)
    with pytest.raises(InputError, match="other settings"):
        Demo(tmp_path / "run", Plan("tiny"), loaded)
    assert main(["demo", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "new"), "--small"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_model_without_neurons_says_why_it_has_no_circuits(loaded, tmp_path) -> None:
    experts = Loaded(zoo.build("mixtral"), Words(), "tiny")
    demo = Demo(tmp_path / "run", Plan.small("tiny"), experts)
    CircuitStudy(demo, CircuitPlan.small()).execute()
    assert "down_proj" in json.loads((tmp_path / "run" / "circuits" / "skipped.json").read_text())["reason"]


def test_texts_are_written_on_a_scenario_file_of_the_users_own(loaded, tmp_path) -> None:
    row = {"theme": "Sea", "scenario": "I rowed out at dawn.", "skeleton_id": "sea_00"}
    row["event"] = {"positive": "The fish came.", "neutral": "The wind turned.", "negative": "The oar broke."}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    demo = Demo(tmp_path / "run", Plan("tiny", scenarios=str(tmp_path / "own.jsonl")), loaded)
    rows, _ = demo._method_rows("unsteered")
    assert [r["skeleton_id"] for r in rows] == ["sea_00"]
    with pytest.raises(InputError, match="cannot read the scenario file"):
        Demo(tmp_path / "other", Plan("tiny", scenarios=str(tmp_path / "none.jsonl")), loaded)
