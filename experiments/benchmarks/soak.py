"""Many clients of every kind against one server: right answers, no hooks left behind, no growing memory.

python experiments/benchmarks/soak.py --requests 1000                # a tiny random model
python experiments/benchmarks/soak.py --requests 200 --model demo    # Gemma-3-270M
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from served import hooks, registry, tiny  # noqa: E402

from emocircuits.artefact import write_json_atomic  # noqa: E402
from emocircuits.serving.app import create_app  # noqa: E402
from emocircuits.serving.engine import Engine, Limits  # noqa: E402
from emocircuits.serving.registry import Registry  # noqa: E402
from emocircuits.serving.run import background  # noqa: E402

THREADS, DISTINCT, WARM_UP = 16, 24, 0.2
KINDS = {"whole": 4, "stream": 4, "cancelled": 2, "wrong": 2}
PROMPTS = ("I opened the door and", "She said", "The letter from the bank came on a Monday, and when he read it,")
WRONG: tuple[dict[str, Any], ...] = (
    {"extra_body": {"steering": {"nobody": 1.0}}},
    {"extra_body": {"steering": [{"name": "/etc/passwd"}]}},
    {"extra_body": {"steering": {"all": 99}}},
    {"n": 2},
    {"max_tokens": 10**6},
)
MIB = 1 << 20


@dataclass(frozen=True)
class Ask:
    """A request whose answer is known: the fields of a completion."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    steering: tuple[tuple[str, float], ...]

    def fields(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in ("prompt", "max_tokens", "temperature", "seed")}
        return {"model": "soak", **plain, "extra_body": {"steering": dict(self.steering)}}


def asks(names: Sequence[str]) -> list[Ask]:
    """A fixed variety: steered and not, greedy and sampled, short and long."""
    found = []
    for i in range(DISTINCT):
        steering = ((names[i % len(names)], (0.5, 1.0, -1.0)[i % 3]),) if i % 4 else ()
        found.append(Ask(PROMPTS[i % 3], 4 + 2 * (i % 12), 0.7 * (i % 2), i, steering))
    return found


def one(client: Any, known: dict[Ask, str], index: int) -> str:
    """Send one request; what happened: its kind, or "MISMATCH"."""
    dice = random.Random(index)
    (kind,) = dice.choices(list(KINDS), list(KINDS.values()))
    ask = dice.choice(list(known))
    if kind == "whole":
        return kind if client.completions.create(**ask.fields()).choices[0].text == known[ask] else "MISMATCH"
    if kind == "stream":
        chunks = client.completions.create(**ask.fields(), stream=True)
        return kind if "".join(c.choices[0].text for c in chunks) == known[ask] else "MISMATCH"
    if kind == "cancelled":
        with client.completions.create(**{**ask.fields(), "max_tokens": 100}, stream=True) as chunks:
            for _ in zip(range(dice.randint(0, 3)), chunks):
                pass
        return kind
    try:
        client.completions.create(**{**ask.fields(), **dice.choice(WRONG)})
    except openai.BadRequestError:
        return kind
    return "MISMATCH"


def soak(engine: Engine, requests: int) -> dict[str, Any]:
    """Run the requests and check what must hold; raises AssertionError where it does not."""
    variety = asks(sorted(engine.registry.steerers))
    process = psutil.Process()
    with background(create_app(engine, model_name="soak")) as url, ThreadPoolExecutor(THREADS) as pool:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        known = {ask: client.completions.create(**ask.fields()).choices[0].text for ask in variety}
        warm = round(WARM_UP * requests)
        outcomes = Counter(pool.map(partial(one, client, known), range(warm)))
        rss, start = process.memory_info().rss, time.monotonic()
        outcomes += Counter(pool.map(partial(one, client, known), range(warm, requests)))
        seconds = time.monotonic() - start
        _settle(engine)
        grown = process.memory_info().rss - rss
    left = hooks(engine.batch.module)
    counted = dict(engine.metrics.requests)
    assert not outcomes["MISMATCH"], f"{outcomes['MISMATCH']} answers differ from those of single requests"
    assert left == 0, f"{left} hooks are left on the model"
    assert counted["error"] == 0, f"{counted['error']} requests failed"
    return {
        "requests": requests,
        "threads": THREADS,
        "outcomes": dict(outcomes),
        "server_outcomes": counted,
        "distinct_answers": len(set(known.values())),
        "hooks_left": left,
        "rss_after_warm_up_mib": round(rss / MIB, 1),
        "rss_growth_mib": round(grown / MIB, 1),
        "requests_per_second": round((requests - warm) / seconds, 1),
    }


def _settle(engine: Engine) -> None:
    end = time.monotonic() + 60
    while engine.batch_size or engine.queue_length:
        assert time.monotonic() < end, "cancelled requests keep running"
        time.sleep(0.01)


def engine_for(model: str) -> Engine:
    """The tiny random model of the tests, or the demo model with random steerers."""
    limits = Limits(max_batch=8, max_queue=64, max_tokens=200)
    if model == "tiny":
        return Engine(tiny(), registry(), limits)
    from workloads import demo, steerer, text_ids

    loaded, layers = demo(), tuple(range(4, 14))
    made = {name: steerer(loaded.model, text_ids(2, 32), layers, seed) for seed, name in enumerate(("all", "other"))}
    return Engine(loaded, Registry(made), limits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Soak a server and print what was seen; with --out, also write it as JSON."""
    parser = argparse.ArgumentParser(description="Soak test of emocircuits serve.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--model", choices=["tiny", "demo"], default="tiny")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    engine = engine_for(options.model)
    found = {"model": options.model, **soak(engine, options.requests)}
    engine.close()
    for name, value in found.items():
        print(f"{name:<22} {value}")
    if options.out:
        write_json_atomic(options.out, found)


if __name__ == "__main__":
    main()
