"""The shipped scenario sets keep their promises, and the reader refuses what it cannot use."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.data import scenarios
from emocircuits.data.scenarios import (
    VALENCES,
    Scenario,
    ScenarioSet,
    affect_words,
    discovery,
    heldout,
    load_sev,
    near_duplicates,
)
from emocircuits.errors import InputError

NAMES = {
    "anger": r"\b(anger\w*|angr\w+)",
    "sadness": r"\b(sad|sadly|sadder|saddest|sadness|sadden\w*)\b",
    "happiness": r"\b(un)?happ(y|i\w+)\b",
    "fear": r"\bfear\w*",
    "surprise": r"\bsurpris\w+",
    "disgust": r"\bdisgust\w*",
}
SETS = {"discovery": (discovery, 8, 20), "heldout": (heldout, 4, 10)}


@pytest.fixture(params=SETS)
def shipped(request: pytest.FixtureRequest) -> ScenarioSet:
    return SETS[request.param][0]()


def events(rows: ScenarioSet) -> Iterator[str]:
    return (event for row in rows for event in row.events.values())


def opener(text: str) -> str:
    return " ".join(re.findall(r"[\w'-]+", text.lower().replace("\u2019", "'"))[:2])


# ---- the shipped texts


@pytest.mark.parametrize("name", SETS)
def test_counts(name: str) -> None:
    load, themes, per_theme = SETS[name]
    data = load()
    assert Counter(row.theme for row in data) == dict.fromkeys(data.themes, per_theme)
    assert len(data.themes) == themes
    assert len(data.groups()) == 3 * len(data) == 3 * themes * per_theme
    assert len(data.reply_groups()) == len(data)


def test_the_sets_share_neither_theme_nor_id() -> None:
    assert not set(discovery().themes) & set(heldout().themes)
    assert not {row.skeleton_id for row in discovery()} & {row.skeleton_id for row in heldout()}


def test_scenes_are_told_in_the_first_person_and_are_short(shipped: ScenarioSet) -> None:
    for row in shipped:
        assert re.search(r"\b(I|me|my|we|our|us)\b", row.scenario, re.IGNORECASE), row.scenario
        assert 7 <= len(row.scenario.split()) <= 20, row.scenario
        for event in row.events.values():
            assert 7 <= len(event.split()) <= 22, event


def test_no_affect_word_in_a_scenario_or_an_event(shipped: ScenarioSet) -> None:
    texts = [row.scenario for row in shipped] + list(events(shipped))
    assert {text: affect_words(text) for text in texts if affect_words(text)} == {}


def test_no_near_duplicate_scenes_within_or_between_the_sets() -> None:
    texts = [row.scenario for data in (discovery(), heldout()) for row in data]
    assert [(texts[i], texts[j]) for i, j, _ in near_duplicates(texts, 0.4)] == []


def test_no_near_duplicate_events_of_different_scenes() -> None:
    # the three outcomes of one scene may mirror each other: that contrast is wanted
    owned = [
        (row.skeleton_id, event) for data in (discovery(), heldout()) for row in data for event in row.events.values()
    ]
    pairs = near_duplicates([event for _, event in owned], 0.45)
    assert [(owned[i], owned[j]) for i, j, _ in pairs if owned[i][0] != owned[j][0]] == []


def test_no_near_duplicate_replies() -> None:
    texts = [reply for data in (discovery(), heldout()) for row in data for reply in row.replies.values()]
    assert [(texts[i], texts[j]) for i, j, _ in near_duplicates(texts, 0.45)] == []


def test_every_row_has_one_reply_per_emotion_and_neutral(shipped: ScenarioSet) -> None:
    assert {frozenset(row.replies) for row in shipped} == {frozenset([*NAMES, "neutral"])}


def test_no_reply_names_an_emotion(shipped: ScenarioSet) -> None:
    any_name = re.compile("|".join(NAMES.values()), re.IGNORECASE)
    named = [text for row in shipped for text in row.replies.values() if any_name.search(text)]
    assert named == []


@pytest.mark.parametrize(("name", "allowed"), [("discovery", 4), ("heldout", 2)], ids=["discovery", "heldout"])
def test_reply_openers_vary(name: str, allowed: int) -> None:
    """No two-word opener marks an emotion: one opener is at most 5% of the emotion's replies."""
    data = SETS[name][0]()
    for emotion in [*NAMES, "neutral"]:
        counts = Counter(opener(row.replies[emotion]) for row in data)
        assert counts.most_common(1)[0][1] <= allowed, (emotion, counts.most_common(3))


def test_reply_to_is_balanced_over_the_valences(shipped: ScenarioSet) -> None:
    counts = Counter(row.reply_to for row in shipped)
    assert set(counts) == set(VALENCES)
    assert max(counts.values()) - min(counts.values()) <= len(shipped) / 10


# ---- the set


def test_a_group_reads_scene_then_event() -> None:
    row = heldout().rows[0]
    group = row.group("negative")
    assert group.text == f"{row.scenario} {row.events['negative']}"
    assert (group.skeleton_id, group.theme, group.valence) == (row.skeleton_id, row.theme, "negative")


def test_groups_keep_the_asked_valences_in_order() -> None:
    groups = heldout().groups(("negative", "positive"))
    assert [group.valence for group in groups] == ["negative", "positive"] * len(heldout())
    with pytest.raises(InputError, match="unknown valence 'mixed'; choose from positive, neutral, negative"):
        heldout().groups(("mixed",))


def test_reply_groups_pair_replies_with_the_event_they_answer() -> None:
    for row, (group, replies) in zip(heldout(), heldout().reply_groups(), strict=True):
        assert group.event == row.events[str(row.reply_to)]
        assert replies == row.replies


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        heldout().rows[0].theme = "Other"  # type: ignore[misc]
    assert len(set(heldout().rows)) == len(heldout())


@pytest.mark.parametrize("by", ["theme", "scenario"])
@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_a_split_is_a_disjoint_cover(by: str, fraction: float, seed: int) -> None:
    data = discovery()
    train, validation = data.split(by, fraction, seed)  # type: ignore[arg-type]
    assert {getattr(row, by) for row in train}.isdisjoint(getattr(row, by) for row in validation)
    assert sorted(row.skeleton_id for row in (*train, *validation)) == sorted(row.skeleton_id for row in data)
    total = len({getattr(row, by) for row in data})
    held = len({getattr(row, by) for row in validation})
    assert 1 <= held < total
    assert abs(held - fraction * total) <= 1


@given(fraction=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_a_scenario_split_draws_evenly_from_every_theme(fraction: float, seed: int) -> None:
    _, validation = discovery().split("scenario", fraction, seed)
    counts = Counter(row.theme for row in validation)
    drawn = [counts[theme] for theme in discovery().themes]
    assert max(drawn) - min(drawn) <= 1


def test_a_split_depends_on_the_seed_alone() -> None:
    ids = [[row.skeleton_id for row in discovery().split(seed=seed)[1]] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_rows_with_the_same_scenario_text_stay_on_one_side() -> None:
    outcomes: dict[str, str] = {valence: "It rained." for valence in VALENCES}
    data = ScenarioSet(tuple(Scenario("T", f"scene {i // 2}", outcomes, f"t_{i}") for i in range(20)))
    train, validation = data.split("scenario", 0.3, seed=3)
    assert {row.scenario for row in train}.isdisjoint(row.scenario for row in validation)
    assert (len(train), len(validation)) == (14, 6)


def test_impossible_splits_are_refused() -> None:
    one_theme = ScenarioSet(heldout().rows[:10])
    with pytest.raises(InputError, match="cannot split by theme: the set holds 1"):
        one_theme.split("theme")
    with pytest.raises(InputError, match="unknown split 'valence'"):
        one_theme.split("valence")  # type: ignore[arg-type]
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="fraction must lie between 0 and 1"):
            one_theme.split(fraction=fraction)


# ---- the reader

ROW = {
    "theme": "Work",
    "scenario": "I opened the shop.",
    "event": {
        "positive": "A queue stood outside.",
        "neutral": "It was nine.",
        "negative": "The till was gone.",
    },
    "skeleton_id": "work_00",
}


def without(*path: str) -> dict:
    row = copy.deepcopy(ROW)
    target = row
    for key in path[:-1]:
        target = target[key]  # type: ignore[assignment]
    del target[path[-1]]
    return row


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_public_sev_file_loads_without_replies(tmp_path: Path) -> None:
    path = write(tmp_path / "sev.jsonl", ROW | {"source": "ignored"}, "", ROW | {"skeleton_id": "work_01"}, "")
    data = load_sev(path)
    assert [row.skeleton_id for row in data] == ["work_00", "work_01"]
    assert data.groups(["neutral"])[0].text == "I opened the shop. It was nine."
    with pytest.raises(InputError, match="holds no replies"):
        data.reply_groups()


def test_byte_order_mark_windows_newlines_and_unicode_separators_are_read(tmp_path: Path) -> None:
    row = ROW | {"scenario": "I opened\u2028the caf\u00e9."}
    path = tmp_path / "sev.jsonl"
    path.write_bytes(("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n").encode())
    assert load_sev(path).rows[0].scenario == "I opened\u2028the caf\u00e9."


BAD = {
    "malformed": ('{"theme": "Work"', r"line 2: malformed JSON \(.* at column \d+\)"),
    "a list": ([1], "line 2: expected a JSON object, got list"),
    "no theme": (without("theme"), "line 2: the key 'theme' is missing"),
    "no event": (without("event"), "line 2: the key 'event' is missing"),
    "no valence": (without("event", "neutral"), "line 2: the key 'event.neutral' is missing"),
    "event as text": (
        ROW | {"event": "It rained."},
        "line 2: 'event' must be a JSON object with entries, got str",
    ),
    "scenario as number": (ROW | {"scenario": 7}, "line 2: 'scenario' must be a string with text, got int"),
    "scenario null": (
        ROW | {"scenario": None},
        "line 2: 'scenario' must be a string with text, got NoneType",
    ),
    "blank theme": (ROW | {"theme": "  "}, "line 2: 'theme' must be a string with text"),
    "empty theme": (ROW | {"theme": ""}, "line 2: 'theme' must be a string with text, got an empty str"),
    "duplicate": (ROW, "line 2: skeleton_id 'work_00' was already used on line 1"),
    "bad reply_to": (
        ROW | {"reply_to": "good", "replies": {"fear": "Run."}},
        "line 2: reply_to is 'good'; choose from",
    ),
    "reply_to alone": (ROW | {"reply_to": "neutral"}, "line 2: the key 'replies' is missing"),
    "replies alone": (ROW | {"replies": {"fear": "Run."}}, "line 2: the key 'reply_to' is missing"),
    "reply a number": (
        ROW | {"reply_to": "neutral", "replies": {"fear": 1}},
        "line 2: 'replies.fear' must be a string with text, got int",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_sev(write(tmp_path / "sev.jsonl", ROW, row))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match="line 1: the file is empty"):
        load_sev(write(tmp_path / "sev.jsonl", content))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the scenario file"):
        load_sev(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot read the scenario file"):
        load_sev(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        load_sev(tmp_path / "latin.jsonl")


# ---- near-duplicates and affect words


def test_near_duplicates_by_hand() -> None:
    texts = ["I sold the boat", "the boat I SOLD!", "I sold a kite", "nothing alike here"]
    assert near_duplicates(texts, 1.0) == [(0, 1, 1.0)]
    assert near_duplicates(texts, 0.3) == [(0, 1, 1.0), (0, 2, 1 / 3), (1, 2, 1 / 3)]


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1).map(" ".join), max_size=8), st.floats(0.01, 1))
def test_near_duplicates_are_exactly_the_pairs_at_or_above_the_threshold(texts: list[str], threshold: float) -> None:
    found = near_duplicates(texts, threshold)
    bags = [set(text.split()) for text in texts]
    wanted = {
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if len(bags[i] & bags[j]) / len(bags[i] | bags[j]) >= threshold
    }
    assert {(i, j) for i, j, _ in found} == wanted
    assert [score for *_, score in found] == sorted((score for *_, score in found), reverse=True)


def test_near_duplicates_refuses_what_has_no_answer() -> None:
    with pytest.raises(InputError, match="text 1 has no words"):
        near_duplicates(["one", "?!"], 0.5)
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="threshold must lie in"):
            near_duplicates(["one"], threshold)


def test_affect_words_finds_inflections_and_leaves_lookalikes() -> None:
    assert affect_words("Proudly she SMILED, worried; \u201cgreat fun!\u201d") == [
        "proudly",
        "smiled",
        "worried",
        "great",
        "fun",
    ]
    text = "My great-aunt put the saddle, the madeira, a funnel and glue on the crystal tray in a lovage bed."
    assert affect_words(text) == []


@pytest.mark.parametrize("emotion", NAMES)
def test_the_lexicon_holds_every_emotion_name(emotion: str) -> None:
    assert affect_words(emotion) == [emotion]


def test_importing_the_sets_does_not_import_torch() -> None:
    code = f"import sys, {scenarios.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
