"""Conflict sets: every reader on a folder of its shape, and scores against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emocircuits.errors import InputError
from emocircuits.multimodal.conflict import (
    Clip,
    crossed,
    load_ca_mer,
    load_dfew,
    load_emorealm,
    load_mer,
    load_ravdess,
    load_table,
    preference,
    set_scores,
    subset_accuracy,
    yes_no_rates,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_ca_mer_has_three_tables(tmp_path: Path) -> None:
    for subset, labels in (("video-aligned", "angry"), ("audio-aligned", '"sad, tired"'), ("consistent", "happy")):
        write(tmp_path / f"{subset}.csv", f"name,openset\nclip_{subset},{labels}\n")
    clips = load_ca_mer(tmp_path)
    assert [c.subset for c in clips] == ["video-aligned", "audio-aligned", "consistent"]
    assert clips[1].labels == ("sad", "tired")
    assert clips[0].video == tmp_path / "video" / "clip_video-aligned.mp4"
    (tmp_path / "consistent.csv").unlink()
    with pytest.raises(InputError, match=r"consistent\.csv"):
        load_ca_mer(tmp_path)


def test_mer_and_emer_name_their_label_column_differently(tmp_path: Path) -> None:
    write(tmp_path / "gt.csv", "name,openset\na,\"['angry', 'worried']\"\n")
    assert load_mer(tmp_path)[0].labels == ("angry", "worried")
    write(tmp_path / "label.csv", "name,discrete,valence\nb,happy,2.1\n")
    (clip,) = load_mer(tmp_path, "label.csv")
    assert (clip.labels, clip.extra) == (("happy",), {"valence": "2.1"})
    write(tmp_path / "odd.csv", "clip,feeling\nb,happy\n")
    with pytest.raises(InputError, match="columns clip, feeling"):
        load_mer(tmp_path, "odd.csv")
    assert load_mer(tmp_path, "odd.csv", {"id": "clip", "labels": "feeling"})[0].id == "b"


def test_dfew_numbers_its_emotions(tmp_path: Path) -> None:
    table = tmp_path / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_2.csv"
    write(table, "video_name,label\n12,4\n7,1\n")
    assert [(c.id, c.labels) for c in load_dfew(tmp_path, fold=2)] == [("12", ("anger",)), ("7", ("happiness",))]
    write(table, "video_name,label\n12,9\n")
    with pytest.raises(InputError, match="1 to 7"):
        load_dfew(tmp_path, fold=2)


def ravdess(folder: Path) -> list[Clip]:
    for name in ("01-01-05-01-01-01-03", "01-01-04-01-01-01-03", "02-01-03-01-02-01-03", "03-01-06-02-02-02-04"):
        write(folder / f"Actor_{name[-2:]}" / f"{name}.{'wav' if name.startswith('03') else 'mp4'}", "")
    write(folder / "Actor_03" / "notes.txt", "")
    return load_ravdess(folder)


def test_ravdess_says_everything_in_the_name(tmp_path: Path) -> None:
    clips = {c.id: c for c in ravdess(tmp_path)}
    assert len(clips) == 4
    angry, silent, voice = (clips[n] for n in ("01-01-05-01-01-01-03", "02-01-03-01-02-01-03", "03-01-06-02-02-02-04"))
    assert (angry.heard, angry.shown, angry.cluster) == ("anger", "anger", "actor 03")
    assert (silent.heard, silent.shown, silent.audio) == (None, "happiness", None)
    assert (voice.heard, voice.shown, voice.video) == ("fear", None, None)
    with pytest.raises(InputError, match="RAVDESS name"):
        load_ravdess(tmp_path / "Actor_03" / "nothing")


def test_crossed_clips_disagree_within_a_speaker(tmp_path: Path) -> None:
    clips = ravdess(tmp_path)
    made = crossed(clips)
    assert made
    for clip in made:
        assert clip.heard != clip.shown
        assert clip.cluster == "actor 03"
        assert clip.labels == (clip.shown, clip.heard)
    assert crossed(clips) == made
    with pytest.raises(InputError, match="two emotions"):
        crossed([c for c in clips if c.cluster == "actor 04"])


def test_emorealm_questions(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        '{"clip": "a", "task": "stress-audio", "question": "A sob?", "options": ["yes", "no"], "answer": "no"}\n',
    )
    (question,) = load_emorealm(path)
    assert question.options == ("yes", "no")
    write(path, '{"clip": "a", "task": "t", "question": "?", "options": "A|B", "answer": "C"}\n')
    with pytest.raises(InputError, match="not among the options"):
        load_emorealm(path)


def test_tables_say_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "id,label\na,x\na,y\n")
    with pytest.raises(InputError, match="twice"):
        load_table(path, {"id": "id", "labels": "label"})
    with pytest.raises(InputError, match="column"):
        load_table(path, {"id": "id", "labels": "emotion"})
    with pytest.raises(InputError, match="labels"):
        load_table(path, {"id": "id"})
    with pytest.raises(InputError, match="subset"):
        Clip("a", ("x",), subset="both")


def test_subsets_and_their_gap() -> None:
    clips = [
        Clip(f"{s}{i}", ("joy",), subset=s, cluster=f"p{i}")
        for s in ("audio-aligned", "video-aligned", "consistent") for i in range(10)
    ]  # fmt: skip
    answers = ["joy"] * 8 + ["fear"] * 2 + ["joy"] * 3 + [None] * 7 + ["joy"] * 9 + ["fear"]
    found = subset_accuracy(clips, answers)
    assert [found[s].estimate for s in ("audio-aligned", "video-aligned", "consistent")] == [0.8, 0.3, 0.9]
    gap = found["gap"]
    assert gap.estimate == pytest.approx(0.5)
    assert gap.low < 0.5 < gap.high
    with pytest.raises(InputError, match="29 answers"):
        subset_accuracy(clips, answers[:-1])


def test_preference_on_conflicts() -> None:
    clips = [Clip(str(i), ("a", "b"), heard="a", shown="b", cluster=str(i)) for i in range(10)]
    clips.append(Clip("same", ("a",), heard="a", shown="a"))
    found = preference(clips, ["a"] * 6 + ["b"] * 3 + ["c", "a"])
    assert [round(found[k].estimate, 6) for k in ("voice", "face", "neither", "gap")] == [0.6, 0.3, 0.1, 0.3]
    with pytest.raises(InputError, match="disagree"):
        preference(clips[-1:], ["a"])


def test_sets_and_yes_no_rates_by_hand() -> None:
    groups = {"furious": "anger", "angry": "anger"}
    found = set_scores([["angry", "sad"], ["happy"], []], [["furious", "calm"], [], ["x"]], groups)
    np.testing.assert_allclose(found["precision"], [0.5, 0.0, np.nan])
    np.testing.assert_allclose(found["recall"], [0.5, 0.0, np.nan])
    rates = yes_no_rates([True, True, True, False, False], [True, True, False, True, None])
    assert rates["yes_recall"] == pytest.approx(2 / 3)
    assert rates["no_recall"] == 0
    assert rates["harmonic_recall"] == 0
    assert rates["yes_precision"] == pytest.approx(2 / 3)
    assert rates["accuracy"] == pytest.approx(0.4)
    assert np.isnan(yes_no_rates([True], [True])["no_recall"])
