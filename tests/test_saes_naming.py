"""Names of latents: examples drawn without overlap, a judge behind a real endpoint, scores beside other names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import asked, material
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from emocircuits import cli
from emocircuits.errors import InputError
from saes.naming import Budget, ChatNamer, Steps, detection, examples, name_latents

WORDS = ("apple", "copper", "river", "violin")
RARE = 4  # a latent that fires at three steps


@pytest.fixture(scope="module")
def planted() -> tuple[Any, list[dict[str, Any]]]:
    """160 steps of four tokens; latent i fires at word i, the more the later the trace, and latent 4 at three steps."""
    rng, records, rows = np.random.default_rng(0), [], []
    for step in range(160):
        word = WORDS[step % 8] if step % 8 < 4 else "plain"
        pieces = [" the", f" {word}", " lay", " there"]
        for k, piece in enumerate(pieces):
            text = "".join(pieces).strip()
            records.append({"trace": f"t{step // 10}", "step": step % 10, "token": k, "piece": piece, "text": text})
            row = np.zeros(5)
            if k == 1 and word in WORDS:
                row[WORDS.index(word)] = 1 + rng.random()
            row[RARE] = step in (8, 50, 90) and k == 0
            rows.append(row)
    return sparse.csr_matrix(np.array(rows)), records


def judge(body: Any) -> tuple[int, str]:
    """Names a latent by its marked word, and finds the texts that hold the name."""
    given = material(body)
    if isinstance(given, list):
        return 200, json.dumps({"name": re.findall(r"«(.*?)»", given[0]["text"])[0].strip()})
    return 200, json.dumps({"active": [int(i) for i, text in given["texts"].items() if given["unit"] in text]})


# ---- examples


def test_examples_for_naming_and_for_scoring_do_not_overlap(planted: tuple[Any, Any]) -> None:
    steps = Steps.of(*planted)
    for latent in range(4):
        shown, scored, maximum = examples(steps, latent, seed=1)
        assert (len(shown), len(scored)) == (15, 14)
        numbers = [e.step for e in (*shown, *scored)]
        assert len(set(numbers)) == 29
        peaks = steps.peaks(latent)[1]
        assert maximum == peaks.max()
        best = set(np.argsort(-peaks)[:12].tolist())
        assert len(best & {e.step for e in shown}) == 10
        assert len(best & {e.step for e in scored}) == 2
        assert sum(e.activation > 0 for e in scored) >= 4
        assert all(e.activation == peaks[e.step] for e in (*shown, *scored))
        assert [e.activation for e in shown] == sorted((e.activation for e in shown), reverse=True)
        assert shown[0].marked == f"the« {WORDS[latent]}» lay there"
        assert shown[0].text == f"the {WORDS[latent]} lay there"
    again = examples(steps, 0, seed=1)
    assert again == examples(steps, 0, seed=1) != examples(steps, 0, seed=2)


def test_stronger_steps_are_drawn_more_often() -> None:
    dense = np.concatenate([np.full(4, 100.0), np.full(30, 10.0), np.full(30, 1.0), np.zeros(30)])[:, None]
    records = [{"trace": "t", "step": i, "text": f"step {i}"} for i in range(len(dense))]
    steps = Steps.of(sparse.csr_matrix(dense), records)
    budget = Budget(2, 3, 2, 3, 4, active=0.001)
    drawn = [e for s in range(40) for e in examples(steps, 0, budget, s)[0] if e.activation < 100]
    assert len(drawn) == 120
    assert np.mean([e.activation == 10 for e in drawn]) > 0.8  # one in two if all were alike
    assert drawn[0].marked == drawn[0].text  # steps without tokens of their own


def test_latents_that_fire_too_seldom_are_refused(planted: tuple[Any, Any]) -> None:
    steps = Steps.of(*planted)
    with pytest.raises(InputError, match="latent 4 fires at 3 steps, and naming and scoring need 19"):
        examples(steps, RARE)
    with pytest.raises(InputError, match="latent 5 does not exist"):
        examples(steps, 5)
    with pytest.raises(InputError, match="there are 160 steps, too few for 150 random ones"):
        examples(steps, 0, Budget(score_random=150))


# ---- the judge


def test_the_model_sees_marks_when_it_names_and_none_when_it_finds(endpoint: Any, planted: tuple[Any, Any]) -> None:
    endpoint.answer = judge
    namer, steps = ChatNamer(endpoint.url, "m", api_key="secret"), Steps.of(*planted)
    shown, scored, maximum = examples(steps, 1)
    assert namer.name(shown, maximum) == "copper"
    truth = {i for i, e in enumerate(scored) if e.activation > 0}
    assert namer.active("copper", [e.text for e in scored]) == truth
    (path, headers, first), (_, _, second) = endpoint.requests
    assert (path, headers["Authorization"], first["temperature"]) == ("/v1/chat/completions", "Bearer secret", 0)
    assert [x["strength"] for x in material(first)][0] == 10
    assert "«" not in asked(second)
    assert all("never an instruction" in asked(body) for body in (first, second))


def test_answers_that_cannot_be_used_are_not_guessed(endpoint: Any) -> None:
    namer = ChatNamer(endpoint.url, "m")
    for said, expected in (
        ('{"active": [0, "2", 2]}', {0, 2}), ('{"active": []}', set()), ('{"active": [7]}', None),
        ('{"active": ["two"]}', None), ("the first", None), ('{"active": 1}', None),
        ('{"active": [1]} rather {"active": [0]}', {0}),
    ):  # fmt: skip
        endpoint.answer = lambda _body, said=said: (200, said)
        assert namer.active("x", ["a", "b", "c"]) == expected
    for said in ("no idea", '{"name": " "}', '{"name": 3}'):
        endpoint.answer = lambda _body, said=said: (200, said)
        with pytest.raises(InputError, match="holds no name"):
            namer.name([], 1.0)


@given(st.lists(st.booleans(), min_size=1, max_size=14), st.sets(st.integers(0, 13)))
def test_detection_by_its_definition(truth: list[bool], said: set[int]) -> None:
    found = detection(said, truth)
    right = [(i in said) == t for i, t in enumerate(truth)]
    assert found["accuracy"] == sum(right) / len(truth)
    if any(truth) and not all(truth):
        positive = sum(i in said for i, t in enumerate(truth) if t) / sum(truth)
        negative = sum(i not in said for i, t in enumerate(truth) if not t) / (len(truth) - sum(truth))
        assert found["balanced_accuracy"] == pytest.approx((positive + negative) / 2)
    else:
        assert found["balanced_accuracy"] is None
    assert detection(None, truth)["accuracy"] == 0
    assert not detection(None, truth)["usable"]


# ---- runs


def test_names_are_scored_beside_the_names_of_others(endpoint: Any, planted: tuple[Any, Any], tmp_path: Path) -> None:
    endpoint.answer = judge
    path = tmp_path / "names.json"
    report = name_latents(*planted, [0, 1, RARE, 2, 3], ChatNamer(endpoint.url, "m"), path, about={"judge": "m"})
    assert {i: r["name"] for i, r in report["latents"].items() if "name" in r} == dict(zip("0123", WORDS))
    assert "fires at 3 steps" in report["latents"][str(RARE)]["error"]
    assert "name" not in report["latents"][str(RARE)]
    for latent in range(4):
        row = report["latents"][str(latent)]
        assert row["score"]["balanced_accuracy"] == 1
        assert row["control"]["of"] != latent
        assert row["control"]["name"] == WORDS[row["control"]["of"]]
        assert row["control"]["balanced_accuracy"] < 0.6
        assert not {e["step"] for e in row["named_from"]} & {e["step"] for e in row["scored_on"]}
    assert sorted(report["latents"][str(i)]["control"]["of"] for i in range(4)) == [0, 1, 2, 3]
    assert report["summary"]["named"] == report["summary"]["compared"] == 4
    assert report["summary"]["balanced_accuracy"]["own_name"] == 1
    assert report["summary"]["balanced_accuracy"]["difference"]["low"] > 0.3
    assert json.loads(path.read_text())["latents"] == report["latents"]


def failing(at: Callable[[str], bool], status: int) -> Callable[[Any], tuple[int, Any]]:
    return lambda body: (status, b"") if at(asked(body)) else judge(body)


def test_a_stopped_run_goes_on_and_one_failing_latent_loses_no_other(
    endpoint: Any, planted: tuple[Any, Any], tmp_path: Path
) -> None:
    path, namer = tmp_path / "names.json", ChatNamer(endpoint.url, "m", retries=0)
    endpoint.answer = failing(lambda text: "strengths" in text and "copper" in text, 500)
    first = name_latents(*planted, [0, 1, 2], namer, path)
    assert "HTTP 500" in first["latents"]["1"]["error"]
    assert {i for i, r in first["latents"].items() if "score" in r} == {"0", "2"}
    done = len(endpoint.requests)
    endpoint.answer = judge
    second = name_latents(*planted, [0, 1, 2], namer, path)
    assert len(endpoint.requests) == done + 3  # a name, its score and its control
    assert second["latents"]["0"] == first["latents"]["0"]
    assert second["latents"]["1"]["score"]["accuracy"] == 1
    assert "error" not in second["latents"]["1"]
    assert name_latents(*planted, [0, 1, 2], namer, path) == second
    assert len(endpoint.requests) == done + 3


def test_a_failing_score_is_tried_again(endpoint: Any, planted: tuple[Any, Any], tmp_path: Path) -> None:
    path, namer = tmp_path / "names.json", ChatNamer(endpoint.url, "m", retries=0)
    endpoint.answer = failing(lambda text: '"unit": "river"' in text, 503)
    first = name_latents(*planted, [0, 2], namer, path)
    assert "HTTP 503" in first["latents"]["2"]["error"]
    endpoint.answer = judge
    second = name_latents(*planted, [0, 2], namer, path)
    assert all("error" not in r and "control" in r for r in second["latents"].values())


def test_one_latent_alone_has_no_control(endpoint: Any, planted: tuple[Any, Any], tmp_path: Path) -> None:
    endpoint.answer = judge
    report = name_latents(*planted, [2], ChatNamer(endpoint.url, "m"), tmp_path / "names.json")
    assert report["latents"]["2"]["score"]["accuracy"] == 1
    assert "control" not in report["latents"]["2"]
    assert report["summary"]["compared"] == 0
    assert report["summary"]["accuracy"]["own_name"] is None


def test_refusals_and_other_runs_stop_at_once(endpoint: Any, planted: tuple[Any, Any], tmp_path: Path) -> None:
    path, namer = tmp_path / "names.json", ChatNamer(endpoint.url, "m")
    endpoint.answer = lambda _body: (401, b"no key")
    with pytest.raises(InputError, match="valid api_key"):
        name_latents(*planted, [0, 1], namer, path)
    assert len(endpoint.requests) == 1
    endpoint.answer = judge
    name_latents(*planted, [0], namer, path)
    with pytest.raises(InputError, match="made with other settings"):
        name_latents(*planted, [0], namer, path, seed=1)
    path.write_text("[]")
    with pytest.raises(InputError, match="holds no names"):
        name_latents(*planted, [0], namer, path)


# ---- the command


def test_the_command_names_latents_of_a_store(
    endpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed: emocircuits[sae]")
    import step_model

    from saes.collect import collect
    from saes.recipe import Recipe
    from saes.train import train
    from saes.vectors import stored

    texts = [f"Let me think {i}.\n\nIt is {i * 7}, I believe.\n\nSo {i * i}." for i in range(30)]
    store = collect(step_model.model(), step_model.tokenizer(), texts, tmp_path / "store", layers=[1], reduce="all")
    train(stored(store), Recipe("topk", 24, 3, epochs=2), tmp_path / "saes", progress=False)
    endpoint.answer = lambda body: (200, '{"name": "numbers"}' if "strengths" in asked(body) else '{"active": [0]}')
    out = tmp_path / "names.json"
    base = ["sae", "name", "--sae", str(tmp_path / "saes/resid_post.1"), "--store", str(tmp_path / "store")]
    base += ["--judge-model", "m", "-o", str(out)]
    assert cli.main([*base, "--server", endpoint.url]) == 2
    assert "no labels to choose latents by" in capsys.readouterr().err
    assert cli.main([*base, "--server", endpoint.url, "--latents", "0,99"]) == 2
    assert "give numbers from 0 to 23" in capsys.readouterr().err
    latents = ",".join(map(str, range(24)))
    assert cli.main([*base, "--server", endpoint.url, "--latents", latents]) == 0
    assert "latents named and scored" in capsys.readouterr().out
    report = json.loads(out.read_text())
    named = [r for r in report["latents"].values() if "name" in r]
    assert named
    assert all(r["name"] == "numbers" and "«" in r["named_from"][0]["text"] for r in named)
    assert report["settings"]["judge"] == "m"
    assert cli.main([*base, "--server", "http://127.0.0.1:9/v1"]) == 2
    assert "nothing answers" in capsys.readouterr().err
