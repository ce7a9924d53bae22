"""Contrastive decoding equals its formula token by token, also with beams."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

from emocircuits.errors import InputError
from emocircuits.steering.contrast import ContrastiveDecoding, noised

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["qwen2_5_omni", "llava", "qwen2_5_vl"])
def test_every_token_follows_the_formula(name: str) -> None:
    model = zoo.build(name)
    inputs = zoo.multimodal_inputs(name, model)
    distorted = noised(inputs, ["pixel_values"], 0.9)
    placeholders = list(zoo.placeholder_ids(name).values())
    how = {**GREEDY, "suppress_tokens": placeholders}
    processor = ContrastiveDecoding(model, distorted, alpha=2.0, beta=0.3)
    found = model.generate(**inputs, **how, logits_processor=[processor])
    ids, n = inputs["input_ids"], inputs["input_ids"].shape[1]
    for step in range(4):
        both = []
        for given in (inputs, distorted):
            grown = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for key in ("mm_token_type_ids", "token_type_ids"):
                if key in given:
                    grown[key] = torch.nn.functional.pad(given[key], (0, step))
            with torch.no_grad():
                both.append(model(**grown).logits[:, -1])
        clean, other = both
        scores = (3 * clean - 2 * other).masked_fill(clean < clean.amax(-1, keepdim=True) + math.log(0.3), -torch.inf)
        scores[:, [*placeholders, model.generation_config.eos_token_id or 2]] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found[:, n:], ids[:, n:])
    same = ContrastiveDecoding(model, inputs, alpha=2.0, beta=1e-6)
    plain = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, logits_processor=[same]), plain)
    assert not torch.equal(found, plain)
    beams = model.generate(**inputs, **how, num_beams=2, logits_processor=[same])
    assert torch.equal(beams, model.generate(**inputs, **how, num_beams=2))


def test_noise_keeps_mean_and_spread_and_needs_its_feature() -> None:
    x = torch.randn(4, 1000) * 3 + 5
    made = noised({"pixel_values": x}, ["pixel_values"], 0.5)["pixel_values"]
    assert float(made.mean()) == pytest.approx(5, abs=0.2)
    assert float(made.std()) == pytest.approx(3, rel=0.05)
    assert float(torch.corrcoef(torch.stack([x.flatten(), made.flatten()]))[0, 1]) == pytest.approx(0.5**0.5, abs=0.05)
    assert torch.equal(made, noised({"pixel_values": x}, ["pixel_values"], 0.5)["pixel_values"])
    with pytest.raises(InputError, match="feature"):
        noised({"pixel_values": x}, ["input_features"])
    with pytest.raises(InputError, match="share"):
        noised({"pixel_values": x}, ["pixel_values"], 2.0)
    with pytest.raises(InputError, match="beta"):
        ContrastiveDecoding(None, {}, beta=0.0)
