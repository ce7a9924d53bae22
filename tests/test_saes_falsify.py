"""Token injection tells a latent of one token from one of context, on a model in which both are planted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import step_model
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emocircuits.errors import InputError
from emocircuits.reasoning.traces import Steps, Trace
from saes.cues import find_cues, inject, rows_of, without
from saes.falsify import ANYWHERE, CONTEXT, NO_CUE, SILENT, SURFACE, Settings, falsify
from saes.tables import injection
from saes.tokens import StepTokens, place_steps

KEY = ("resid_post", 0)
TOKEN, PAIR, ALWAYS, NEVER, UNIQUE = range(5)


class Planted:
    """Latents of the model below: at Q; at Z with a Q before it; everywhere; nowhere; at the letters of one word."""

    W_dec = torch.eye(5, 16)

    def encode(self, x: Tensor) -> Tensor:
        seen = x[:, 2] > 0.003  # dimension 2 holds how much of what was read is Q
        unique = x[:, 3].clamp_min(0)
        fires = [(x[:, 0] - 1).clamp_min(0), x[:, 1] * (x[:, 1] > 1) * seen, x[:, 15], 0 * x[:, 0], unique]
        return torch.stack(fires, 1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any]:
    """A one-layer Llama: Q lights dimension 0, Z dimension 1, and a head writes the mean of Q so far to dimension 2."""
    tokenizer = step_model.tokenizer()
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.ones_like(weight) if "norm" in name else torch.zeros_like(weight))
        table = model.model.embed_tokens.weight
        table[:, 15] = 10.0
        for dimension, letter in enumerate("QZ"):
            table[token(tokenizer, letter), dimension] = 3.0
        table[token(tokenizer, "V"), 3] = 2.0
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, 0] = attention.o_proj.weight[2, 0] = 1.0
    return model, tokenizer


def token(tokenizer: Any, letter: str) -> int:
    (i,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
    return i


def traces(prefix: str, n: int, write: Callable[[np.random.Generator], str], seed: int) -> list[Trace]:
    rng = np.random.default_rng(seed)
    return [Trace("", Steps.of([write(rng)]), id=f"{prefix}{i}") for i in range(n)]


def words(rng: np.random.Generator, n: int = 5) -> str:
    return " ".join("".join(rng.choice(list("abdfgjmpuvy"), 3)) for _ in range(n))


def telling(rng: np.random.Generator) -> str:
    return f"{words(rng, 2)} Q {words(rng)} Z {words(rng, 2)}"


@pytest.fixture(scope="module")
def found(world: tuple[Any, Any]) -> dict[int, Any]:
    model, tokenizer = world
    known, unseen = traces("k", 30, telling, 0), traces("u", 25, telling, 1)
    known.append(Trace("", Steps.of(["abdV"]), id="once"))
    unseen.append(Trace("", Steps.of(["abdV"]), id="once"))
    quiet = traces("n", 24, words, 2)
    settings = Settings(cues=1, candidates=6, trials=3, top=20, steps=10, batch_size=16)
    made = falsify(model, tokenizer, Planted(), KEY, range(5), known, unseen, quiet, settings)
    return {f.latent: f for f in made}


def test_a_latent_of_one_token_is_a_surface_cue(found: dict[int, Any]) -> None:
    f = found[TOKEN]
    assert f.verdict == SURFACE
    assert [cue.text.strip() for cue in f.cues] == ["Q"]
    assert f.genuine == pytest.approx(2, abs=1e-4)
    assert f.injected.estimate == pytest.approx(1, abs=1e-4)
    assert (f.untouched.estimate, f.random.estimate) == (0, 0)
    assert (f.injected.n, f.injected.n_clusters) == (24, 24)
    assert f.p < 0.01
    assert f.removed.estimate == 0
    assert f.removed_random.estimate > 0.6


def test_a_latent_that_needs_what_came_before_is_not(found: dict[int, Any]) -> None:
    f = found[PAIR]
    assert f.verdict == CONTEXT
    assert "Z" in f.cues[0].text
    assert f.genuine == pytest.approx(3, abs=1e-4)
    assert f.injected.estimate == 0
    assert f.removed.estimate == 0


def test_latents_of_nothing_in_particular_are_told_apart(found: dict[int, Any]) -> None:
    assert found[ALWAYS].verdict == ANYWHERE
    assert found[ALWAYS].untouched.low == pytest.approx(1, abs=0.01)
    assert found[NEVER].verdict == SILENT
    assert math.isnan(found[NEVER].injected.estimate)
    assert "fires at no step" in found[NEVER].injected.reason
    assert found[UNIQUE].verdict == NO_CUE
    assert "no n-gram recurs" in found[UNIQUE].injected.reason


def test_tables_show_every_latent(found: dict[int, Any]) -> None:
    report = {
        "model": "tiny", "site": "resid_post", "layer": 0, "neutral_texts": 24,
        "emotions": {"fear": [TOKEN, PAIR], "joy": [NEVER]},
        "latents": [found[i].as_dict() for i in (TOKEN, PAIR, NEVER)],
    }  # fmt: skip
    told = injection(report)
    assert "| fear | 0 | ' Q' | 2 |" in told or "| fear | 0 | 'Q' | 2 |" in told
    assert told.count("needs context") == 1
    assert "| joy | 3 |  | 0 | n/a [n/a, n/a]" in told


def test_the_seed_decides(world: tuple[Any, Any]) -> None:
    model, tokenizer = world
    known, unseen, quiet = traces("k", 12, telling, 0), traces("u", 8, telling, 1), traces("n", 6, words, 2)
    small = Settings(cues=1, candidates=4, trials=2, steps=8, draws=10)
    made = [
        falsify(model, tokenizer, Planted(), KEY, [TOKEN], known, unseen, quiet, replace(small, seed=seed))[0]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert made[0].as_dict() == made[1].as_dict()
    assert len({f.removed_random.estimate for f in made}) > 1


def test_bad_input_is_refused_before_any_pass(world: tuple[Any, Any]) -> None:
    model, tokenizer = world
    some = traces("k", 3, words, 0)
    with pytest.raises(InputError, match="name latents of this SAE"):
        falsify(model, tokenizer, Planted(), KEY, [5], some, some, some)
    with pytest.raises(InputError, match="3 neutral texts and 1 clusters"):
        falsify(model, tokenizer, Planted(), KEY, [0], some, some, some, clusters=["a"])
    with pytest.raises(InputError, match="no steps to read"):
        falsify(model, tokenizer, Planted(), KEY, [0], some, some, [])


# ---- n-grams


def item(*ids: int, first: int = 1) -> StepTokens:
    read = [(a, a + 1) for a in range(first, len(ids))]
    return StepTokens("t", list(ids), read, [{"step": 0}] * len(read))


class Letters:
    """Decodes tokens as letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghij"[i] for i in ids)


def test_cues_are_the_ngrams_that_tell_the_strongest_tokens() -> None:
    """ "bc" is always strong, "c" alone is not, "d" is common everywhere."""
    items = [item(0, 1, 2, 3), item(0, 3, 2, 3), item(0, 1, 2, 3), item(0, 3, 3, 2)]
    values = [np.array(v, dtype=float) for v in ([0, 5, 0], [0, 0, 0], [0, 5, 0], [0, 0, 0])]
    cues = find_cues(items, values, Letters(), n=1, longest=3, top=2)
    assert [(c.text, c.ids, c.count) for c in cues] == [("bc", (1, 2), 2)]
    assert cues[0].lift == pytest.approx((2 / 2) / (2 / 12))
    assert find_cues(items, [np.zeros(3)] * 4, Letters()) == ()
    once = [np.array([0, 5.0, 0]), *[np.zeros(3)] * 3]
    assert find_cues(items, once, Letters(), top=5) == ()


def test_ngrams_go_in_where_they_are_put_and_everything_is_read() -> None:
    made = inject(item(0, 1, 2, 3), [2, 3], [(8, 9), (7,)])
    assert made.ids == [0, 1, 8, 9, 2, 7, 3]
    assert [a for a, _ in made.read] == [1, 2, 3, 4, 5, 6]
    same = inject(item(0, 1, 2, 3), [1], [(9,)])
    assert (same.ids, same.read[0]) == ([0, 9, 1, 2, 3], (1, 2))


def test_tokens_taken_out_leave_the_rest_of_the_step() -> None:
    whole = item(0, 1, 2, 3, 1, 2, 5)
    rows = (0, 1, 2, 3, 4)  # tokens 1 to 5
    assert rows_of(whole, rows, [(1, 2)]) == {0, 1, 3, 4}
    assert rows_of(whole, (0, 2), [(9,)]) == set()
    made = without(whole, rows, {0, 1, 3, 4})
    assert (made.ids, made.read) == ([0, 3], [(1, 2)])
    later = without(whole, (2, 3), {2})
    assert (later.ids, later.read) == ([0, 1, 2, 1], [(3, 4)])


def test_texts_come_apart_and_together_as_the_tokenizer_has_them(world: tuple[Any, Any]) -> None:
    model, tokenizer = world
    (placed,) = place_steps(model, tokenizer, ["abd fgj. Q mpu"], "all")
    assert "".join(r["piece"] for r in placed.records) == "abd fgj. Q mpu"
    assert "piece" not in place_steps(model, tokenizer, ["abd fgj"], "mean")[0].records[0]


def test_the_committed_table_is_that_of_the_committed_numbers() -> None:
    folder = Path(__file__).parents[1] / "experiments/results/saes"
    report = json.loads((folder / "injection.json").read_text("utf-8"))
    assert (folder / "injection.md").read_text("utf-8") == injection(report)
    tested = {i for latents in report["emotions"].values() for i in latents}
    assert {f["latent"] for f in report["latents"]} == tested
