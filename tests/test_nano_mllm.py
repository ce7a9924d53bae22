"""The small audio-visual model: its clips, its inputs, and the committed checkpoint's abilities and bias."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import batch
import clips
import model as nano
import numpy as np
import pytest
import rebalance
import report
import sets
import torch
import train
from clips import EMOTIONS, EXPRESSIONS, PROSODIES, Knobs
from PIL import Image
from scipy.io import wavfile

from emocircuits.models.spans import ModalitySpans, placeholders
from emocircuits.multimodal.balance import Answers
from emocircuits.multimodal.study import read_batch
from emocircuits.steering.policies import SetPoint, Transfer
from emocircuits.steering.reallocation import Reallocation

CHANCE = 1 / len(EMOTIONS)
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "nano_mllm"


@pytest.fixture(scope="module")
def trained():
    return nano.load()


@pytest.fixture(scope="module")
def held_out():
    return sets.evaluation_sets(sets.HELD_OUT, 10, 3, sets.Recipe())


# ------------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("made", [clips.face, clips.voice])
def test_clip_is_a_function_of_emotion_person_and_seed(made):
    one = made("fear", 3, 7)
    assert np.array_equal(one, made("fear", 3, 7))
    for other in (made("fear", 3, 8), made("fear", 4, 7), made("anger", 3, 7)):
        assert one.shape != other.shape or not np.array_equal(one, other)


def test_faces_and_voices_are_what_the_extractors_take():
    face, voice = clips.face("anger", 0, 0), clips.voice("anger", 0, 0, Knobs(seconds=(0.5, 0.5)))
    assert face.shape == (clips.SIDE, clips.SIDE, 3)
    assert face.dtype == np.uint8
    assert voice.shape == (clips.RATE // 2,)
    assert voice.dtype == np.float32
    assert 0.001 < np.abs(voice).max() <= 1


@pytest.mark.parametrize("table", [EXPRESSIONS, PROSODIES])
def test_any_two_emotions_differ_by_more_than_the_spread_within_one(table):
    values = np.array([list(vars(table[e]).values()) for e in EMOTIONS])
    units = values / (Knobs().variation * values.std(0))
    for a, b in combinations(units, 2):
        assert np.linalg.norm(a - b) > 4  # in standard deviations of one emotion


def test_strength_0_shows_no_emotion():
    rng, silent = np.random.default_rng(0), Knobs(strength=0, variation=0)
    shown = [clips.expressed(EXPRESSIONS, clips.Expression(), e, silent, rng) for e in EMOTIONS]
    assert set(shown) == {clips.Expression()}


def test_splits_share_no_person():
    recipe = sets.Recipe()
    assert sets.TRAINING + recipe.persons <= sets.VALIDATION < sets.VALIDATION + 1000 <= sets.HELD_OUT


# ------------------------------------------------------------------------------------------------------ inputs


def test_features_do_not_depend_on_the_batch():
    waves = [clips.voice(e, 1, 1) for e in EMOTIONS]
    alone, together = nano.sounds(waves[:1])[0], nano.sounds(waves)[0]
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert alone[1] == together[1] == -(-len(waves[0]) // 160)  # hops of 10 ms, the last one partial


def test_placeholders_match_the_towers_and_the_tokenizer(held_out, trained):
    items = held_out["conflict"].items[:4]
    made = nano.collate(items)
    spans = ModalitySpans.of_ids(made["input_ids"], placeholders(trained))
    assert spans.count("image").tolist() == [nano.IMAGE_TOKENS] * 4
    assert spans.count("audio").tolist() == [nano.audio_tokens(i.sound[1]) for i in items if i.sound]
    row = made["input_ids"][0][made["attention_mask"][0].bool()].tolist()
    assert nano.tokenizer()(nano.prompt(items[0]))["input_ids"] == row


def test_expected_gap_is_the_posterior_of_simulated_clips():
    recipe, rng, n = sets.Recipe(), np.random.default_rng(0), 400_000
    truth = rng.integers(6, size=n)
    heard, seen = (
        np.where(rng.random(n) < p, truth, (truth + rng.integers(1, 6, size=n)) % 6) for p in recipe.reliable
    )
    conflict = heard != seen
    simulated = np.mean(truth[conflict] == heard[conflict]) - np.mean(truth[conflict] == seen[conflict])
    assert simulated == pytest.approx(recipe.expected_gap(), abs=0.01)


def test_conflict_clips_conflict_and_consistent_ones_agree(held_out):
    assert (held_out["conflict"].heard != held_out["conflict"].seen).all()
    assert (held_out["consistent"].heard == held_out["consistent"].seen).all()


# -------------------------------------------------------------------------------------------------- checkpoint


def test_checkpoint_is_small_and_recorded():
    assert sum(f.stat().st_size for f in nano.CHECKPOINT.iterdir()) < 8e6
    recorded = json.loads((nano.CHECKPOINT / "training.json").read_text())
    assert recorded["emotions"] == list(EMOTIONS)


@pytest.mark.parametrize("kind", ["audio", "image", "consistent"])
def test_each_modality_is_recognised_on_people_never_seen(kind, trained, held_out):
    right = rebalance.right(nano.label_probabilities(trained, held_out[kind].items), held_out[kind])
    assert right.mean() > CHANCE + 0.6  # 60 clips: 0.77, five standard errors below what the results report


def test_gap_has_the_reported_sign(trained, held_out):
    reported = json.loads((RESULTS / "nano_mllm.json").read_text())["scores"]["gap"]
    gap = rebalance.gaps(nano.label_probabilities(trained, held_out["conflict"].items), held_out["conflict"]).mean()
    assert reported["low"] > 0.3
    assert gap > 0.3


def test_padding_and_batching_do_not_change_answers(trained, held_out):
    items = [held_out[kind].items[0] for kind in ("audio", "image", "conflict")]
    together = nano.label_probabilities(trained, items)
    assert np.allclose(together, nano.label_probabilities(trained, items, batch=1), atol=1e-5)


def test_it_generates_one_word_and_stops(trained, held_out):
    inputs = nano.collate(held_out["consistent"].items[2:3])
    made = trained.generate(**inputs, max_new_tokens=5, do_sample=False)
    answer = nano.tokenizer().decode(made[0, inputs["input_ids"].shape[1] :]).split()
    assert answer == [EMOTIONS[2], "<|im_end|>"]


def test_a_transfer_moves_the_gap_and_random_spans_do_not(trained, held_out):
    conflict, made = held_out["conflict"], Reallocation(Transfer("audio", "image", 0.6), queries="last")
    before = rebalance.gaps(nano.label_probabilities(trained, conflict.items), conflict).mean()
    after = rebalance.gaps(rebalance.probabilities(trained, conflict, made), conflict).mean()
    dealt = nano.label_probabilities(trained, conflict.items, around=rebalance.random_spans(trained, made, 0))
    assert after < before - 0.2
    assert abs(rebalance.gaps(dealt, conflict).mean() - before) < (before - after) / 2


def test_random_spans_keep_sizes_and_stay_on_modality_tokens(trained, held_out, monkeypatch):
    inputs, seen = nano.collate(held_out["conflict"].items[:3]), []
    monkeypatch.setattr(Reallocation, "attach", lambda self, model, spans: seen.append(spans))
    rebalance.random_spans(trained, Reallocation(Transfer("audio", "image")), 0)(inputs)
    true = ModalitySpans.of_ids(inputs["input_ids"], placeholders(trained))
    for name in ("audio", "image", "text"):
        assert torch.equal(seen[0].count(name), true.count(name))
    assert torch.equal(seen[0].mask("text"), true.mask("text"))
    assert not torch.equal(seen[0].labels, true.labels)


# -------------------------------------------------------------------------------------------- commands, results


def test_training_is_reproducible_by_seed(tmp_path):
    for name in ("a", "b"):
        train.main(["--out", str(tmp_path / name), "--steps", "2", "--clips", "60", "--people", "1"])
    a, b = (nano.load(tmp_path / name / "checkpoint").state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_page_shows_the_results():
    result = json.loads((RESULTS / "nano_mllm.json").read_text())
    assert (RESULTS / "nano_mllm.md").read_text() == report.markdown(result)


# ------------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_shows_the_clips_that_were_answered(trained):
    found = json.loads((RESULTS / "reallocation.json").read_text())
    conflict = sets.evaluation_sets(sets.HELD_OUT, 1, 1, sets.Recipe(), ("conflict",))["conflict"]
    seeds = sets.clip_seeds("conflict", 1, 1)
    assert found["answers"] == list(EMOTIONS)
    for i, clip in enumerate(found["rows"]):
        assert (clip["voice"], clip["face"]) == (EMOTIONS[conflict.heard[i]], EMOTIONS[conflict.seen[i]])
        rate, sound = wavfile.read(RESULTS / "clips" / f"{clip['name']}.wav")
        made = clips.voice(clip["voice"], int(conflict.persons[i]), int(seeds[i]))
        assert rate == clips.RATE
        assert np.abs(sound / 32767 - made).max() < 1e-4
        picture = np.asarray(Image.open(RESULTS / "clips" / f"{clip['name']}.png"))[::6, ::6]
        assert np.array_equal(picture, clips.face(clip["face"], int(conflict.persons[i]), int(seeds[i])))
        assert torch.equal(nano.pictures([picture])[0], conflict.items[i].picture), (
            "what is shown is what was asked about"
        )
    before = nano.label_probabilities(trained, conflict.items)
    assert np.abs(before - [c["before"] for c in found["rows"]]).max() < 1e-3
    way, strength = "set point, last", found["strengths"]["set point, last"].index(0.2)
    after = rebalance.probabilities(trained, conflict, Reallocation(SetPoint("audio", "image", 0.2), queries="last"))
    assert np.abs(after - [c["after"][way][strength] for c in found["rows"]]).max() < 1e-3


def test_the_batch_for_the_balance_command_asks_what_was_asked(trained, tmp_path):
    batch.main(["--out", str(tmp_path), "--persons", "1"])
    conflict = sets.evaluation_sets(sets.HELD_OUT, 1, 1, sets.Recipe(), ("conflict",))["conflict"]
    inputs = read_batch(tmp_path / "conflict.safetensors")
    answers = Answers.of_words(nano.tokenizer(), {e: e for e in EMOTIONS})
    with torch.no_grad():
        asked = answers.scores(trained, inputs).exp().numpy()
    assert np.abs(asked - nano.label_probabilities(trained, conflict.items)).max() < 1e-5
    rows = {f"conflict, row {i}{ending}" for i in range(len(conflict.items)) for ending in (".png", ".wav")}
    assert {f.name for f in (tmp_path / "clips").iterdir()} == rows
