"""Rollouts: continuations of every prefix of a text, with the prefixes read once or anew."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness import Cell, Line, Table, interleaved
from transformers import DynamicCache
from workloads import demo

from emocircuits.data.prompts import encode_prompt
from emocircuits.data.scenarios import discovery
from emocircuits.reasoning.engines import Job, LocalEngine, Sampling
from emocircuits.reasoning.traces import Steps, Trace

STEPS, ROLLOUTS, NEW_TOKENS = 5, 4, 12
PLAIN, ONCE, SHARED = "one generate() a prefix", "the same, each prefix read once", "LocalEngine"
TOKENS, TIME = "computed tokens, x plain", "time, x plain"


def run(repetitions: int) -> list[Table]:
    """4 rollouts of 12 tokens at each of 6 boundaries of a text on the demo model, 4 rows at a time in every way."""
    loaded, trace = demo(), _trace()
    prefixes = [trace.prefix(k) for k in range(len(trace) + 1)]
    ids = [encode_prompt(loaded.tokenizer, prefix) for prefix in prefixes]
    ways = {
        PLAIN: partial(_generated, loaded.model, ids, 0.6, once=False),
        ONCE: partial(_generated, loaded.model, ids, 0.6, once=True),
        SHARED: partial(_rollouts, loaded, prefixes, 0.6),
    }
    timing = interleaved(ways, repetitions)
    steps = (NEW_TOKENS - 1) * ROLLOUTS * len(ids)  # a first token comes with its prefix
    engine = timing.results[SHARED][0]
    computed = {
        PLAIN: ROLLOUTS * sum(map(len, ids)) + steps,
        ONCE: sum(map(len, ids)) + steps,
        SHARED: engine.computed_tokens,
    }
    lines = [
        Line(
            name,
            {
                TOKENS: Cell(computed[name] / computed[PLAIN], target=1 / 3 if name == SHARED else None),
                TIME: timing.ratio(name, PLAIN, 0.5 if name == SHARED else None),
            },
            f"{computed[name]:,} tokens" + (f"; {_agreement(loaded, prefixes, ids)}" if name == SHARED else ""),
        )
        for name in ways
    ]
    workload = (
        f"{ROLLOUTS} continuations of {NEW_TOKENS} tokens at {len(ids)} boundaries of a text of {len(ids[-1])} tokens,"
        f" {ROLLOUTS} rows at a time, temperature 0.6, top-p 0.95, {loaded.name}"
    )
    return [Table("Rollouts", workload, lines)]


def _trace() -> Trace:
    """Scenarios as steps, after one that stands for the prompt."""
    texts = [group.text for group in discovery().groups()[: STEPS + 1]]
    bounds = [0]
    for text in texts[1:]:
        bounds.append(bounds[-1] + len(text) + 1)
    return Trace(texts[0] + "\n", Steps("".join(text + "\n" for text in texts[1:]), tuple(bounds)))


def _rollouts(loaded: Any, prefixes: list[str], temperature: float) -> tuple[LocalEngine, dict[tuple[int, int], str]]:
    engine = LocalEngine(loaded.model, loaded.tokenizer, batch_size=ROLLOUTS)
    jobs = [Job(prefix, k, i) for k, prefix in enumerate(prefixes) for i in range(ROLLOUTS)]
    found = engine.complete(jobs, Sampling(NEW_TOKENS, temperature))
    return engine, {(c.boundary, c.index): c.text for c in found}


@torch.no_grad()
def _generated(model: Any, ids: list[list[int]], temperature: float, once: bool) -> list[torch.Tensor]:
    """New tokens [4, 12] of every prefix."""
    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0} if temperature else {
        "do_sample": False
    }  # fmt: skip
    return [
        model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, **sampling, **cached
        )[:, tokens.shape[1] :]
        for tokens, cached in _inputs(model, ids, once)
    ]


def _inputs(model: Any, ids: list[list[int]], once: bool) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for row in ids:
        cached = {}
        if once:
            cache = DynamicCache(config=model.config)
            model(input_ids=torch.tensor([row[:-1]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(ROLLOUTS)
            cached = {"past_key_values": cache}
        yield torch.tensor([row] * ROLLOUTS), cached


def _agreement(loaded: Any, prefixes: list[str], ids: list[list[int]]) -> str:
    """How many greedy texts of the engine are those of generate()."""
    _, ours = _rollouts(loaded, prefixes, 0)
    theirs = [
        loaded.tokenizer.batch_decode(new, skip_special_tokens=True) for new in _generated(loaded.model, ids, 0, False)
    ]
    same = sum(theirs[k][i] == text for (k, i), text in ours.items())
    return f"greedy texts equal to generate()'s: {same} of {len(ours)}"
