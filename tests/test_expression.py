"""Expression scoring: naming, forced choice, degeneration and unparseable answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.errors import InputError
from emocircuits.evaluation.expression import (
    EMOTION_FORMS,
    confusion_matrix,
    names_emotion,
    score_expression,
)

LABELS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust", "neutral")


class FixedJudge:
    """Answers with rows decided in advance and remembers what it was shown."""

    name = "fixed"

    def __init__(self, rows, labels=LABELS):
        self.rows, self.labels, self.seen = np.asarray(rows, dtype=float), labels, []

    def probabilities(self, texts):
        self.seen.extend(texts)
        return self.rows


def one_hot(*names):
    return [[1.0 if name == label else 0.0 for label in LABELS] for name in names]


@pytest.mark.parametrize(
    ("emotion", "words"),
    [
        ("anger", "anger angers angered angering angry angrier angriest angrily"),
        ("sadness", "sad sadness sadly sadder saddest sadden saddens saddened saddening"),
        ("happiness", "happy happiness happily happier happiest"),
        ("fear", "fear fears feared fearing fearful fearfully"),
        ("surprise", "surprise surprises surprised surprising surprisingly"),
        ("disgust", "disgust disgusts disgusted disgusting disgustingly"),
        ("neutral", "neutral neutrally neutrality"),
        ("pride", "pride prides prided priding"),
        ("calm", "calm calms calmed calmer calmest calming calmly calmness"),
        ("joy", "joy joys joyful joyfully joyous"),
        ("envy", "envy envies envied envying envious"),
        ("loneliness", "loneliness lonely lonelier loneliest"),
        ("hope", "hope hopes hoped hoping hopeful hopefully"),
    ],
)
def test_every_inflection_names_its_emotion(emotion, words):
    missed = [word for word in words.split() if not names_emotion(f"I was, well, {word.upper()}!", emotion)]
    assert missed == []


@pytest.mark.parametrize(
    ("emotion", "text"),
    [
        ("anger", "The danger of a manger; Angela lingered by the hanger, endangered."),
        ("sadness", "The crusade crossed sadhu land in a saddle, an ambassador in tow."),
        ("happiness", "It happened by happenstance, and perhaps unhappily."),
        ("fear", "The feathers were near the ear of the fearmonger; she was fearless."),
        ("surprise", "An enterprise of some sunrise."),
        ("disgust", "We discussed a gust of wind and took disguises."),
        ("pride", "The bride rode the pried-open price."),
        ("hope", "The shop sells hops and hopscotch chalk."),
    ],
)
def test_look_alikes_do_not_name_it(emotion, text):
    assert not names_emotion(text, emotion)


@pytest.mark.parametrize("text", ["_angry_", "**Angry**", "“angry”", "angry's", "un-angry", "so angry.", "ANGRY"])
def test_markup_and_punctuation_do_not_hide_the_word(text):
    assert names_emotion(text, "anger")


def test_label_of_several_words_ignores_the_separator():
    assert names_emotion("full of self-pity today", "self_pity")
    assert names_emotion("Self pitying again", "self pity")
    assert not names_emotion("a pity for myself", "self_pity")


def test_label_without_a_word_is_an_error():
    with pytest.raises(InputError, match="no word"):
        names_emotion("text", " - ")


def test_users_may_add_forms(monkeypatch):
    assert not names_emotion("so grateful", "gratitude")
    monkeypatch.setitem(EMOTION_FORMS, "gratitude", "gratitude|grateful(ly)?")
    assert names_emotion("so grateful", "gratitude")


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "Z"))))
def test_a_label_always_names_itself_and_only_as_a_word(noise):
    for emotion in EMOTION_FORMS:
        assert names_emotion(f"{noise} {emotion} {noise}", emotion)
        assert not names_emotion(f"x{emotion}x", emotion)


def test_coherent_needs_all_three():
    texts = ["Get out of my house!", "I am angry.", "out out out out", "A lovely day.", ""]
    judge = FixedJudge(one_hot("anger", "anger", "anger", "happiness", "anger"))
    loops = np.array([False, False, True, False, False])
    scores = score_expression(texts, ["anger"] * 5, judge, loops)
    assert scores.predicted.tolist() == ["anger", "anger", "anger", "happiness", "anger"]
    assert scores.expressed.tolist() == [True, True, True, False, True]
    assert scores.named.tolist() == [False, True, False, False, False]
    assert scores.degenerate.tolist() == [False, False, True, False, True]
    assert scores.coherent.tolist() == [True, False, False, False, False]
    assert scores.summary() == pytest.approx(
        {
            "n": 5,
            "coherent_expression_rate": 0.2,
            "expression_rate": 0.8,
            "named_rate": 0.2,
            "degenerate_rate": 0.4,
            "unparseable_rate": 0.0,
        }
    )
    assert judge.seen == texts


def test_naming_another_emotion_is_allowed():
    scores = score_expression(["Do not be sad!"], ["happiness"], FixedJudge(one_hot("happiness")))
    assert scores.coherent.tolist() == [True]


def test_unparseable_counts_as_wrong_even_for_the_first_label():
    rows = [[np.nan] * len(LABELS), *one_hot("anger")]
    scores = score_expression(["a", "b"], ["anger", "anger"], FixedJudge(rows))
    assert scores.predicted.tolist() == ["", "anger"]
    assert scores.expressed.tolist() == [False, True]
    assert np.isnan(scores.target_probability[0])
    assert scores.target_probability[1] == 1.0
    assert scores.unparseable_rate == scores.coherent_expression_rate == 0.5
    assert scores.confusion(["anger"], normalise=True).sum() == pytest.approx(0.5)


def test_no_texts_gives_nan_rates_without_asking_the_judge():
    scores = score_expression([], [], FixedJudge([]), np.array([], dtype=bool))
    assert np.isnan(scores.coherent_expression_rate)
    assert scores.confusion().tolist() == np.zeros((7, 7)).tolist()


@pytest.mark.parametrize(
    ("texts", "targets", "degenerate", "message"),
    [
        (["a"], ["joy"], None, "unknown target emotion"),
        (["a", "b"], ["anger"], None, "one target per text"),
        (["a"], ["anger"], np.array([True, False]), "one per text"),
        (["a"], ["anger"], np.array([0.5]), "booleans"),
    ],
)
def test_bad_input_is_refused_before_judging(texts, targets, degenerate, message):
    judge = FixedJudge(one_hot("anger"))
    with pytest.raises(InputError, match=message):
        score_expression(texts, targets, judge, degenerate)
    assert judge.seen == []


def test_a_judge_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match="returned shape"):
        score_expression(["a", "b"], ["anger", "fear"], FixedJudge(one_hot("anger")))


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, ""])), max_size=40))
def test_confusion_counts_every_parsed_text_once(pairs):
    targets, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    counts = confusion_matrix(targets, predicted, LABELS, LABELS)
    assert counts.sum() == sum(p != "" for p in predicted)
    assert np.trace(counts) == sum(t == p for t, p in pairs)
    shares = confusion_matrix(targets, predicted, LABELS, LABELS, normalise=True)
    for row, label in zip(shares, LABELS):
        assert np.isnan(row).all() if label not in targets else row.sum() <= 1 + 1e-12


def test_confusion_refuses_unknown_labels():
    with pytest.raises(InputError, match="unknown predicted label 'joy'"):
        confusion_matrix(["anger"], ["joy"], LABELS, LABELS)
    with pytest.raises(InputError, match="unknown target emotion 'joy'"):
        confusion_matrix(["joy"], ["anger"], LABELS, LABELS)
