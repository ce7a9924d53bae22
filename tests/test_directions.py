"""Directions: planted ones are recovered, the estimator equals a plain re-implementation, errors are clear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emocircuits import quality
from emocircuits.directions import METHODS, DirectionSet, agreement, centre, fit
from emocircuits.errors import ArtefactError, HookError, InputError
from emocircuits.reading import Example, Features

EMOTIONS = ("anger", "sadness", "fear")


def planted(n_groups: int = 24, width: int = 20, signal: float = 2.0, seed: int = 0) -> tuple[Features, torch.Tensor]:
    """Readings = group offset + planted direction of the emotion + noise, at two layers (layer 0 holds noise only)."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, len(EMOTIONS), generator=g))[0].T
    rows, labels, groups = [], [], []
    for i in range(n_groups):
        offset = 5 * torch.randn(width, generator=g)
        for e, name in enumerate(EMOTIONS):
            noise = torch.randn(2, width, generator=g)
            rows.append(torch.stack([offset + noise[0], offset + signal * axes[e] + 0.5 * noise[1]]))
            labels.append(name)
            groups.append(f"g{i}")
    themes = tuple(f"theme{int(name[1:]) % 4}" for name in groups)
    made = Features(
        torch.stack(rows), tuple(labels), tuple(groups), themes, tuple(groups), "resid_post", (3, 7), "response_mean"
    )
    return made, axes - axes.mean(0)


@pytest.mark.parametrize("method", METHODS)
def test_planted_directions_are_recovered_and_generalise(method: str) -> None:
    features, truth = planted()
    inside = [t != "theme0" for t in features.themes]
    made = fit(features.where(inside), EMOTIONS, method=method)
    rows = quality.held_out(made, features.where([not k for k in inside]))
    assert rows[1]["accuracy"] > 0.9
    assert rows[1]["auroc"] > 0.95
    assert rows[0]["low"] < 1 / 3 + 0.25, "a layer of noise must not look good"
    if method == "diff_means":
        cosine = torch.nn.functional.cosine_similarity(made.units[:, 1], truth, dim=-1)
        assert (cosine > 0.95).all()


def test_difference_of_means_equals_the_formula() -> None:
    features, _ = planted(n_groups=6)
    x = features.x.numpy().astype(np.float64).reshape(6, 3, 2, 20)
    means = (x - x.mean(1, keepdims=True)).mean(0)
    expected = means - means.mean(0)
    np.testing.assert_allclose(fit(features, EMOTIONS).vectors.numpy(), expected, atol=1e-5)
    assert np.abs(fit(features, EMOTIONS).vectors.sum(0)).max() < 1e-5, "centroids sum to zero over emotions"


def test_incomplete_groups_do_not_count() -> None:
    features, _ = planted(n_groups=6)
    keep = [not (g == "g0" and lab == "fear") for g, lab in zip(features.groups, features.labels)]
    whole = [g != "g0" for g in features.groups]
    a, b = fit(features.where(keep), EMOTIONS), fit(features.where(whole), EMOTIONS)
    assert torch.equal(a.vectors, b.vectors)
    assert a.provenance["n_groups"] == 5


@given(shift=st.floats(-50, 50), seed=st.integers(0, 5))
def test_group_centring_ignores_what_a_scenario_adds(shift: float, seed: int) -> None:
    features, _ = planted(n_groups=4, seed=seed)
    moved = Features(features.x + shift, *(getattr(features, n) for n in (
        "labels", "groups", "themes", "clusters", "site", "layers", "position")))  # fmt: skip
    torch.testing.assert_close(centre(moved), centre(features), atol=1e-3, rtol=1e-3)


def test_tokens_of_a_reply_share_its_weight() -> None:
    """A long reply (many token rows) must not pull its group's centre towards its emotion."""
    features, _ = planted(n_groups=4)
    index = [i for i, lab in enumerate(features.labels) for _ in range(5 if lab == "fear" else 1)]
    longer = Features(features.x[index], *(tuple(getattr(features, n)[i] for i in index) for n in (
        "labels", "groups", "themes", "clusters")), features.site, features.layers, features.position)  # fmt: skip
    torch.testing.assert_close(fit(longer, EMOTIONS).vectors, fit(features, EMOTIONS).vectors, atol=1e-5, rtol=1e-4)


def test_null_and_split_half_tell_signal_from_noise() -> None:
    features, _ = planted()
    null = quality.shuffled_null(features, features, EMOTIONS, n=10)
    assert null["mean"][1] < 0.6
    cosines = quality.split_half(features, EMOTIONS, n=4)
    assert cosines[:, 1].min() > 0.9
    assert np.abs(cosines[:, 0]).max() < 0.7
    assert quality.across_themes(features, EMOTIONS).argmax() == 1


def test_words_alone_are_told_from_texts_that_carry_nothing() -> None:
    rng = np.random.default_rng(0)

    def replies(marked: bool, themes: range) -> list[Example]:
        made = []
        for theme in themes:
            for i in range(8):
                for emotion in EMOTIONS:
                    noise = " ".join("".join(rng.choice(list("bcdlmnrt"), 5)) for _ in range(6))
                    text = f"{noise} {emotion[:4]}ish" if marked else noise
                    made.append(Example("Event.", emotion, f"{theme}/{i}", "", text, str(theme), f"{theme}/{i}"))
        return made

    told = quality.without_model(replies(True, range(4)), replies(True, range(4, 6)), EMOTIONS)
    assert (told["accuracy"], told["across_themes"], told["layer"]) == (1.0, 1.0, None)
    nothing = quality.without_model(replies(False, range(4)), replies(False, range(4, 6)), EMOTIONS)
    assert nothing["low"] < 1 / 3 < nothing["high"]


def test_saved_directions_come_back_bit_identical(tmp_path) -> None:
    features, _ = planted(n_groups=5)
    made = fit(features, EMOTIONS, fingerprint={"name": "m", "config_sha256": "x"})
    again = DirectionSet.load(made.save(tmp_path / "d.safetensors"))
    assert torch.equal(again.vectors, made.vectors)
    assert (again.emotions, again.layers, again.fingerprint) == (made.emotions, made.layers, made.fingerprint)
    (tmp_path / "cut").write_bytes((tmp_path / "d.safetensors").read_bytes()[:200])
    with pytest.raises(ArtefactError):
        DirectionSet.load(tmp_path / "cut")


def test_without_removes_exactly_the_named_span() -> None:
    features, _ = planted(n_groups=5)
    basis = torch.randn(2, 20)
    cleaned = fit(features, EMOTIONS).without(basis)
    assert (cleaned.vectors @ basis.T).abs().max() < 1e-4
    torch.testing.assert_close(cleaned.without(basis).vectors, cleaned.vectors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: fit(f, ("anger",)), "at least two"),
        (lambda f: fit(f, ("anger", "joyfulness")), "no group holds all"),
        (lambda f: fit(f, EMOTIONS, method="pca"), "choose from diff_means"),
        (lambda f: fit(f, EMOTIONS).steerer("anger", layers=[4]), "choose from 3, 7"),
        (lambda f: fit(f, EMOTIONS).steerer("love"), "choose from anger, sadness, fear"),
        (lambda f: fit(f.where([g == "g0" for g in f.groups]), EMOTIONS), "only one text per emotion"),
    ],
)
def test_bad_requests_are_one_clear_sentence(call, message: str) -> None:
    features, _ = planted(n_groups=5)
    with pytest.raises(InputError, match=message):
        call(features)


def test_nan_readings_name_the_layer() -> None:
    features, _ = planted(n_groups=5)
    features.x[0, 1, 0] = float("nan")
    with pytest.raises(HookError, match="layer 7"):
        fit(features, EMOTIONS)


def test_cosines_between_emotions_and_between_runs() -> None:
    vectors = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]])
    made = DirectionSet(("anger", "fear"), "resid_post", (4, 9), vectors, torch.ones(2), torch.zeros(2, 2))
    assert torch.allclose(made.cosines(4), torch.eye(2))
    assert float(made.cosines(9)[0, 1]) == pytest.approx(0.5**0.5)
    other = DirectionSet(("anger", "fear"), "resid_post", (4, 9), -3 * vectors, torch.ones(2), torch.zeros(2, 2))
    assert torch.allclose(agreement(made, other), -torch.ones(2, 2))
    with pytest.raises(InputError, match="no cosines"):
        agreement(made, made.select([4]))
