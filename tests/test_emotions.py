"""Label sets and the hierarchy between them: every label lands where it should and no mass is lost."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.data.emotions import (
    EKMAN6,
    GOEMOTIONS27,
    PLUTCHIK8,
    QUADRANTS,
    VALENCE_AROUSAL,
    canonical,
    label_set,
    map_labels,
    map_probabilities,
    quadrant,
)
from emocircuits.errors import InputError

NAMES = ["ekman6", "plutchik8", "goemotions27", "quadrants", "valence2"]


class TestSets:
    def test_sizes_and_order(self):
        assert EKMAN6 == ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
        assert (len(PLUTCHIK8), len(GOEMOTIONS27), len(QUADRANTS)) == (8, 27, 4)
        assert "neutral" not in GOEMOTIONS27

    @pytest.mark.parametrize("name", NAMES)
    def test_neutral_can_be_added_to_any_set(self, name):
        assert label_set(f" {name.upper()}+neutral") == (*label_set(name), "neutral")
        assert len(set(label_set(name))) == len(label_set(name))

    def test_own_lists(self):
        assert label_set(["boredom", "Joy"]) == ("boredom", "Joy")

    @pytest.mark.parametrize("bad", ["ekman7", "ekman6+calm", ""])
    def test_unknown_names_list_the_choices(self, bad):
        with pytest.raises(InputError, match="ekman6, plutchik8, goemotions27"):
            label_set(bad)

    @pytest.mark.parametrize("bad", [[], [""], ["anger", 3], ["joy", "fear", "Joy "]])
    def test_bad_lists(self, bad):
        with pytest.raises(InputError, match="emotion set"):
            label_set(bad)


class TestCoordinates:
    def test_every_label_of_every_set_has_a_place_in_the_square(self):
        for name in NAMES:
            for label in label_set(f"{name}+neutral"):
                assert all(-1 <= x <= 1 for x in VALENCE_AROUSAL[label]), label

    def test_quadrants_agree_with_coordinates(self):
        signs = {name: tuple(np.sign(VALENCE_AROUSAL[name])) for name in QUADRANTS}
        for label in (*EKMAN6, *PLUTCHIK8, *GOEMOTIONS27):
            assert tuple(np.sign(VALENCE_AROUSAL[label])) == signs[quadrant(label)], label

    def test_all_quadrants_are_inhabited(self):
        assert {quadrant(label) for label in GOEMOTIONS27} == set(QUADRANTS)

    def test_a_label_without_a_quadrant(self):
        with pytest.raises(InputError, match="admiration"):
            quadrant("neutral")


class TestMapLabels:
    def test_fine_to_ekman_follows_the_published_grouping(self):
        mapping = map_labels("goemotions27", "ekman6")
        groups = {e: sorted(k for k, v in mapping.items() if v == e) for e in EKMAN6}
        assert groups["anger"] == ["anger", "annoyance", "disapproval"]
        assert groups["disgust"] == ["disgust"]
        assert groups["fear"] == ["fear", "nervousness"]
        assert groups["sadness"] == ["disappointment", "embarrassment", "grief", "remorse", "sadness"]
        assert groups["surprise"] == ["confusion", "curiosity", "realization", "surprise"]
        assert len(groups["happiness"]) == 12

    def test_every_fine_label_reaches_every_coarser_set(self):
        for target in NAMES:
            if target != "goemotions27":
                assert set(map_labels("goemotions27", target)) == set(GOEMOTIONS27)

    @pytest.mark.parametrize(("target", "n"), [("ekman6", 6), ("plutchik8", 8), ("quadrants", 4), ("valence2", 2)])
    def test_every_coarse_label_is_reached(self, target, n):
        assert len(set(map_labels("goemotions27", target).values())) == n

    def test_the_two_basic_sets_never_disagree_where_they_overlap(self):
        ekman, plutchik = (map_labels("goemotions27", name) for name in ("ekman6", "plutchik8"))
        for label in GOEMOTIONS27:
            if plutchik[label] not in ("trust", "anticipation"):
                assert canonical(ekman[label]) == plutchik[label]

    @pytest.mark.parametrize("name", NAMES)
    def test_a_set_maps_onto_itself(self, name):
        assert map_labels(name, name) == {label: label for label in label_set(name)}

    def test_synonyms_and_case(self):
        words = ["joy", "sad", "Angry", " afraid", "surprised", "disgusted"]
        assert list(map_labels(words, "ekman6").values()) == [
            "happiness", "sadness", "anger", "fear", "surprise", "disgust",
        ]  # fmt: skip
        own = ["Happy", "SAD", "mad", "scared", "amazed", "revulsion"]
        assert list(map_labels("ekman6", own).values()) == [
            "mad", "SAD", "Happy", "scared", "amazed", "revulsion",
        ]  # fmt: skip

    def test_ekman_and_plutchik_share_joy(self):
        assert map_labels(["happiness"], "plutchik8") == {"happiness": "joy"}
        assert map_labels("ekman6", "goemotions27")["happiness"] == "joy"

    def test_the_same_word_beats_a_synonym(self):
        assert map_labels(["joy", "happiness"], ["happiness", "joy"]) == {
            "joy": "joy",
            "happiness": "happiness",
        }

    def test_without_counterpart_is_neutral_or_an_error(self):
        assert map_labels("plutchik8", "ekman6+neutral")["trust"] == "neutral"
        assert map_labels("plutchik8", [*EKMAN6, "none"])["anticipation"] == "none"
        with pytest.raises(InputError, match="trust, anticipation have no counterpart.*add 'neutral'"):
            map_labels("plutchik8", "ekman6")
        with pytest.raises(InputError, match="neutral have no counterpart"):
            map_labels(["neutral"], "ekman6")

    def test_a_misspelt_label_never_becomes_neutral(self):
        with pytest.raises(InputError, match="unknown emotion 'agner'; choose from admiration"):
            map_labels(["agner"], "ekman6+neutral")

    def test_own_words(self):
        assert map_labels(["boredom"], ["boredom", "fear"]) == {"boredom": "boredom"}
        assert map_labels(["Boredom"], "ekman6", parents={"boredom": "sad"}) == {"Boredom": "sadness"}
        assert map_labels(["boredom"], "quadrants", parents={"boredom": "sadness"}) == {"boredom": "negative_low"}
        assert map_labels(["boredom"], ["apathy"], parents={"boredom": "apathy"}) == {"boredom": "apathy"}

    def test_up_the_tiers(self):
        assert map_labels(["relief", "excitement"], "quadrants") == {
            "relief": "positive_low",
            "excitement": "positive_high",
        }
        assert map_labels("quadrants", ["negative", "positive"])["negative_low"] == "negative"


class TestMapProbabilities:
    @given(st.sampled_from(list(itertools.product(NAMES, NAMES))), st.integers(0, 1000))
    def test_mass_adds_up(self, pair, seed):
        source, target = f"{pair[0]}+neutral", f"{pair[1]}+neutral"
        probs = np.random.default_rng(seed).dirichlet(np.ones(len(label_set(source))), 4)
        out = map_probabilities(probs, source, target)
        assert out.shape == (4, len(label_set(target)))
        np.testing.assert_allclose(out.sum(axis=1), 1)

    def test_certain_rows_land_on_the_mapped_label(self):
        mapping = map_labels("goemotions27", "ekman6")
        out = map_probabilities(np.eye(27), "goemotions27", "ekman6")
        assert [EKMAN6[i] for i in out.argmax(axis=1)] == [mapping[label] for label in GOEMOTIONS27]

    def test_lost_mass_is_an_error_only_where_there_is_any(self):
        probs = np.zeros((2, 8))
        probs[:, 0] = 1
        assert map_probabilities(probs, "plutchik8", "ekman6")[:, EKMAN6.index("happiness")].tolist() == [
            1,
            1,
        ]
        probs[1, 1] = 0.2
        with pytest.raises(InputError, match="^trust have no counterpart"):
            map_probabilities(probs, "plutchik8", "ekman6")

    def test_undefined_rows_stay_undefined(self):
        probs = np.full((2, 6), 1 / 6)
        probs[1, 3] = math.nan
        out = map_probabilities(probs, "ekman6", "valence2")
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()

    def test_no_rows(self):
        assert map_probabilities(np.zeros((0, 6)), "ekman6", "valence2").shape == (0, 2)

    @pytest.mark.parametrize(
        ("probs", "message"),
        [(np.ones(6), r"\[n, 6\]"), (np.ones((2, 5)), r"\[n, 6\]"), (-np.ones((1, 6)), "negative")],
    )
    def test_bad_input(self, probs, message):
        with pytest.raises(InputError, match=message):
            map_probabilities(probs, "ekman6", "ekman6")


def test_the_data_package_is_lazy_and_needs_no_torch():
    code = (
        "import sys, emocircuits.data as d; assert 'EKMAN6' in dir(d) and 'load_sev' in d.__all__;"
        "assert 'emocircuits.data.emotions' not in sys.modules; d.EKMAN6, d.load_texts, d.map_labels;"
        "assert 'torch' not in sys.modules; d.EKMAN7"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("AttributeError: module 'emocircuits.data' has no attribute 'EKMAN7'")
