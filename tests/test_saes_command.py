"""`emocircuits sae`: from texts to a steerer by the command line, on a tiny model; the study end to end, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from synthetic_run import write_usable_run
from synthetic_studies import write_sae

from emocircuits import cli
from emocircuits.steering import Steerer

pytest.importorskip("sae_lens", reason="sae-lens is not installed: emocircuits[sae]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and texts of two labels."""
    root = tmp_path_factory.mktemp("sae")
    write_usable_run(root / "run")
    rng = np.random.default_rng(0)
    words = {"a": ["angry", "shout", "unfair"], "b": ["calm", "quiet", "rest"]}
    rows = [
        {"id": f"t{i}", "label": label, "text": " ".join(rng.choice(words[label], 6)).capitalize() + ". So it is here."}
        for i in range(24)
        for label in ["ab"[i % 2]]
    ]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_from_texts_to_a_steerer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder.parent / folder.name / "tiny-model")
    model = model if Path(model).exists() else str(next(folder.rglob("config.json")).parent)
    store, saes = str(folder / "store"), str(folder / "saes")
    collect = ["sae", "collect", "--model", model, "--texts", str(folder / "texts.jsonl"), "--layers", "1"]
    assert cli.main([*collect, "--reduce", "all", "--output", store]) == 0
    assert "vectors at resid_post 1" in capsys.readouterr().out
    train = ["sae", "train", "--store", store, "--output", saes, "--width", "32", "--k", "4", "--epochs", "3"]
    assert cli.main(train) == 0
    assert "explained variance" in capsys.readouterr().out
    sae = ["--sae", f"{saes}/resid_post.1", "--store", store]
    assert cli.main(["sae", "features", *sae, "--output", str(folder / "features.json"), "--top", "3"]) == 0
    found = json.loads((folder / "features.json").read_text())
    assert set(found["enriched"]) == {"a", "b"}
    assert all(len(rows) <= 3 and rows[0]["activation"] >= rows[-1]["activation"] for rows in found["latents"].values())
    one = ["sae", "features", *sae, "--output", str(folder / "all.json"), "--latent"]
    live = next(
        i
        for i in range(32)
        if cli.main([*one, str(i)]) == 0 and json.loads((folder / "all.json").read_text())["latents"]
    )
    out = folder / "latent.safetensors"
    assert (
        cli.main(["sae", "steer", *sae, "--model", model, "--latent", str(live), "--dose", "0.5", "--output", str(out)])
        == 0
    )
    made = Steerer.load(out)
    assert made.strength == 0.5
    assert made.provenance["latent"] == live
    capsys.readouterr()
    assert cli.main(["sae", "steer", *sae, "--model", model, "--latent", "99", "--output", str(out)]) == 2
    assert "latent 99 does not exist" in capsys.readouterr().err
    pages = ["sae", "pages", "--sae", f"{saes}/resid_post.1", "--model", model, "--texts", str(folder / "texts.jsonl")]
    names = folder / "names.json"
    names.write_text(json.dumps({str(live): "<shouting>"}))
    out = folder / "pages"
    assert cli.main([*pages, "--latents", f"{live},0-1", "--names", str(names), "--output", str(out)]) == 0
    assert [f["feature_index"] for f in json.loads((out / "batch-0.json").read_text())["features"]] == [live, 0, 1]
    assert "&lt;shouting&gt;" in (out / "latents.html").read_text("utf-8")
    names.write_text(json.dumps({"latents": {"0": {"name": "calm"}, "1": {"reason": "no answer"}}}))  # of `sae name`
    assert cli.main([*pages, "--latents", "0-1", "--names", str(names), "--output", str(out)]) == 0
    text = (out / "latents.html").read_text("utf-8")
    assert "Latent 0: calm" in text
    assert "Latent 1<" in text


def test_rows_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "x", "words": "y"}))
    arguments = ["sae", "collect", "--texts", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "store")]
    assert cli.main(arguments) == 2
    assert "row 'x': give a text, or a prompt and a completion" in capsys.readouterr().err


def test_tokens_are_pooled_by_step_and_texts_by_their_steps() -> None:
    from saes.study import Coded, _pooled, scenario_of

    records: list[dict[str, Any]] = [
        {"trace": "s1/joy", "step": 0}, {"trace": "s1/joy", "step": 1}, {"trace": "s1/joy", "step": 0},
        {"trace": "s2/fear", "step": 0},
    ]  # fmt: skip
    codes = sparse.csr_matrix(np.array([[1.0, 0], [0, 5], [3, 0], [2, 2]]))
    steps = _pooled(codes, records, [f"{r['trace']}\0{r['step']}" for r in records])
    assert steps.codes.toarray().tolist() == [[3, 0], [0, 5], [2, 2]]
    whole = Coded(steps.codes, steps.records).whole_texts()
    assert whole.codes.toarray().tolist() == [[3, 5], [2, 2]]
    assert [scenario_of(r) for r in whole.records] == ["s1", "s2"]
    assert Coded(steps.codes, steps.records).only("s1/").codes.shape == (2, 2)
    assert Coded(steps.codes, steps.records).only("s1/", without=True).codes.toarray().tolist() == [[2, 2]]


@pytest.mark.real_model
def test_the_study_runs_and_reads_what_it_finished(demo: Any, tmp_path: Path) -> None:
    from saes.study import Plan, run_demo

    plan = Plan(12, 128, 8, 10, 2, scenarios=3, shuffles=50, steer=0)
    report = json.loads(run_demo(demo, tmp_path / "run", plan).read_text())
    assert report["quality"]["vectors"] > 500
    assert 0 < report["quality"]["held_out_themes"]["explained_variance"] < 1
    assert report["quality"]["stability"] is not None
    assert "| this SAE |" in (tmp_path / "run" / "sae.md").read_text()
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.json")}
    run_demo(demo, tmp_path / "run", plan)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*.json")}


def test_the_tables_tell_what_steering_did(tmp_path: Path) -> None:
    from saes.tables import markdown

    report = json.loads((write_sae(tmp_path / "run") / "sae.json").read_text())
    report["plan"] = {"width": 64, "k": 4, "layer": 2}
    told = markdown(report, "tiny")
    assert "| fear | 3 | 0.90 | 1.0 | 30 | 50% [" in told
    assert "random 50% [" in told
    assert told.count("| no |") == 1
    assert "| fear | 4 | 2.0 | n/a | n/a | dark, run |" in told
