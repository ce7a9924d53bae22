"""`emocircuits balance`: batches in, numbers and a page out; it resumes, and says what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import save_file
from test_fluency import tokenizer as tokenizer  # a word-level tokenizer of the zoo's vocabulary

from emocircuits import cli
from emocircuits.errors import InputError
from emocircuits.models.load import Loaded
from emocircuits.models.spans import ModalitySpans, placeholders
from emocircuits.multimodal import plots, study
from emocircuits.steering.policies import Multiply, Transfer
from emocircuits.steering.reallocation import Reallocation

WORDS = {"anger": "w20", "fear": "w31", "joy": "w47"}


@pytest.fixture
def loaded(tokenizer) -> Loaded:
    return Loaded(zoo.build("qwen2_5_omni"), tokenizer, "tiny")


def batches(loaded: Loaded, folder: Path, n: int = 2) -> list[Path]:
    files = []
    for seed in range(n):
        files.append(folder / f"batch{seed}.safetensors")
        inputs = zoo.multimodal_inputs("qwen2_5_omni", loaded.model, batch=3, seed=seed)
        save_file({k: v.contiguous() for k, v in inputs.items()}, files[-1])
    return files


def test_batches_give_one_summary_and_a_page(loaded: Loaded, tmp_path: Path) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    words = dict(zip(WORDS, sorted(vocabulary, key=vocabulary.__getitem__)[20:23]))
    files = batches(loaded, tmp_path)
    report = study.run_balance(loaded, files, words, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "balance.json").read_text())
    assert (found["n_rows"], found["modalities"]) == (6, ["audio", "image"])
    parts = [json.loads((tmp_path / "run" / f"batch_{i}.json").read_text()) for i in range(2)]
    effect = torch.tensor([e for p in parts for e in p["effects"]["knockout"]])[:, 0]
    assert found["effects"]["knockout"]["audio"]["estimate"] == pytest.approx(float(effect.mean()), abs=1e-6)
    assert found["mass_mean"].keys() == {"audio", "image", "text"}
    assert sum(found["mass_mean"].values()) == pytest.approx(1, abs=1e-4)
    page = report.read_text()
    assert "6 prompts" in page
    assert "attention of the last token" in page
    assert "So: " in page
    assert "Answers changed by reallocation" in page
    (tmp_path / "run" / "balance.json").unlink()
    loaded.model.forward = None  # type: ignore[assignment]  # batches are not measured again
    study.run_balance(loaded, files, words, tmp_path / "run")


def test_answers_under_reallocation_are_those_of_the_attached_model(loaded: Loaded, tmp_path: Path) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    words = dict(zip(WORDS, sorted(vocabulary, key=vocabulary.__getitem__)[20:23]))
    files = batches(loaded, tmp_path)
    study.run_balance(loaded, files, words, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "reallocation.json").read_text())
    assert found["answers"] == list(WORDS)
    assert [r["name"] for r in found["rows"][2:4]] == ["batch0, row 2", "batch1, row 0"]

    inputs = study.read_batch(files[1])
    spans = ModalitySpans.of_ids(inputs["input_ids"], placeholders(loaded.model))
    for way, strength, policy in (
        ("attention to image, more: times", 10.0, Multiply({"image": 10.0})),
        ("share of audio's attention to image", 0.75, Transfer("audio", "image", 0.75)),
        (None, None, Multiply({"image": 1.0})),
    ):
        with torch.no_grad(), Reallocation(policy).attach(loaded.model, spans):
            logits = loaded.model(**inputs).logits[:, -1, [vocabulary[w] for w in words.values()]]
        rows = found["rows"][3:]
        if way is None:
            kept = [r["before"] for r in rows]
        else:
            kept = [r["after"][way][found["strengths"][way].index(strength)] for r in rows]
        assert torch.tensor(kept) == pytest.approx(logits.softmax(-1), abs=1e-5)
    hidden = [r["after"]["attention to audio, less: times"][-1] for r in found["rows"]]
    moved = np.mean([np.argmax(a) != np.argmax(r["before"]) for a, r in zip(hidden, found["rows"])])
    assert found["changed"]["attention to audio, less: times"][-1]["estimate"] == pytest.approx(moved)


def test_the_random_control_is_the_same_policy_on_spans_dealt_out(loaded: Loaded, tmp_path: Path) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    words = dict(zip(WORDS, sorted(vocabulary, key=vocabulary.__getitem__)[20:23]))
    file = batches(loaded, tmp_path, 1)[0]
    study.run_balance(loaded, [file], words, tmp_path / "run", seed=3)
    found = json.loads((tmp_path / "run" / "reallocation.json").read_text())
    inputs = study.read_batch(file)
    spans = ModalitySpans.of_ids(inputs["input_ids"], placeholders(loaded.model))
    dealt = spans.dealt(torch.Generator().manual_seed(3))
    assert not torch.equal(dealt.labels, spans.labels)
    assert all(torch.equal(dealt.count(name), spans.count(name)) for name in spans.names)
    with torch.no_grad(), Reallocation(Multiply({"audio": 0.0})).attach(loaded.model, dealt):
        logits = loaded.model(**inputs).logits[:, -1, [vocabulary[w] for w in words.values()]]
    way = "attention to audio, less: times"
    saved = json.loads((tmp_path / "run" / "dealt_0.json").read_text())[way][-1]
    assert torch.tensor(saved) == pytest.approx(logits.softmax(-1), abs=1e-5)
    before = np.array([r["before"] for r in found["rows"]]).argmax(1)
    moved = logits.argmax(1).numpy() != before
    assert found["random"][way][-1]["estimate"] == pytest.approx(moved.mean())
    given = np.array([np.argmax(r["after"][way][-1]) for r in found["rows"]]) != before
    assert found["beyond_random"][way][-1]["estimate"] == pytest.approx(given.mean() - moved.mean())


def test_prompts_of_one_modality_have_no_random_control(tokenizer, tmp_path: Path) -> None:
    loaded = Loaded(zoo.build("llava"), tokenizer, "tiny")
    vocabulary = tokenizer.get_vocab()
    words = dict(zip(WORDS, sorted(vocabulary, key=vocabulary.__getitem__)[20:23]))
    file = tmp_path / "batch.safetensors"
    inputs = zoo.multimodal_inputs("llava", loaded.model, batch=2, seed=0)
    save_file({k: v.contiguous() for k, v in inputs.items()}, file)
    study.run_balance(loaded, [file], words, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "reallocation.json").read_text())
    assert (found["random"], found["beyond_random"]) == ({}, {})
    assert found["changed"]


def test_a_run_from_before_reallocation_gets_it(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    words = dict(zip(WORDS, sorted(vocabulary, key=vocabulary.__getitem__)[20:23]))
    files, run = batches(loaded, tmp_path, 1), tmp_path / "run"
    study.run_balance(loaded, files, words, run)
    before = (run / "reallocation.json").read_text()
    for stage in ("swept_0", "dealt_0", "reallocation"):
        (run / f"{stage}.json").unlink()
    monkeypatch.setattr(study, "measure", None)  # batches are not measured again
    study.run_balance(loaded, files, words, run)
    assert (run / "reallocation.json").read_text() == before


def test_files_that_are_no_batch_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_text("no")
    with pytest.raises(InputError, match="cannot read"):
        study.read_batch(bad)
    save_file({"pixel_values": torch.zeros(2)}, bad)
    with pytest.raises(InputError, match="no input_ids, only pixel_values"):
        study.read_batch(bad)
    assert cli.main(["balance", "--model", "nowhere", "--inputs", str(bad), "--answers", "a,b"]) != 0
    good = batches(loaded, tmp_path, 1)[0]
    assert cli.main(["balance", "--model", "nowhere", "--inputs", str(good), "--answers", "a"]) != 0


def test_curves_and_trade_offs_are_drawn() -> None:
    def cell(value: float) -> dict[str, float]:
        return {"estimate": value, "low": value - 0.1, "high": value + 0.1}

    rows = [{"policy": "transfer", "strength": s, "gap": cell(0.4 - s), "consistent": cell(0.9)} for s in (0.4, 0.2)]
    assert list(plots.gap_curve(rows).data[0].x) == [0.2, 0.4]
    assert list(plots.gap_against_accuracy(rows).data[0].x) == pytest.approx([0.0, 0.2])
