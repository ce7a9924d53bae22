"""Serving: what steering per request costs a server with 16 clients, through HTTP and the real client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from harness import Line, Table, interleaved
from workloads import demo, steerer, text_ids

CLIENTS, NEW_TOKENS = 16, 24
UNSTEERED, COLUMN = "16 clients, unsteered", "time, x unsteered"
LAYERS = tuple(range(4, 14))


def run(repetitions: int) -> list[Table]:
    """16 requests at once on the demo model: none steered, half of them, all of them with six different steerers."""
    import openai

    from emocircuits.serving.app import create_app
    from emocircuits.serving.engine import Engine, Limits
    from emocircuits.serving.registry import Registry
    from emocircuits.serving.run import background

    loaded, ids = demo(), text_ids(1, 8)
    names = [f"s{seed}" for seed in range(6)]
    every = [names[i % len(names)] for i in range(CLIENTS)]
    registry = Registry({name: steerer(loaded.model, ids, LAYERS, seed) for seed, name in enumerate(names)})
    engine = Engine(loaded, registry, Limits(max_batch=CLIENTS))
    with background(create_app(engine, model_name="demo")) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        ways = {
            UNSTEERED: partial(_all, client, [None] * CLIENTS),
            "half of the requests steered": partial(_all, client, [n if i % 2 else None for i, n in enumerate(every)]),
            "every request steered": partial(_all, client, every),
        }
        timing = interleaved(ways, repetitions)
    engine.close()
    lines = [Line(name, {COLUMN: timing.ratio(name, UNSTEERED, None if name == UNSTEERED else 1.10)}) for name in ways]
    return [
        Table("Server throughput, demo model", f"{CLIENTS} clients at once, greedy, {NEW_TOKENS} new tokens", lines)
    ]


def _all(client: Any, steering: list[str | None]) -> list[str]:
    """The answers to 16 requests that are sent at once."""

    def ask(index: int) -> str:
        name = steering[index]
        answer = client.completions.create(
            model="demo", prompt=f"Letter {index}: I opened the door and", max_tokens=NEW_TOKENS, temperature=0,
            extra_body={"steering": {name: 1.0}} if name else {},
        )  # fmt: skip
        return answer.choices[0].text

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(ask, range(CLIENTS)))
