"""Reading: replies that share a prompt share its forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Line, Table, interleaved
from torch import Tensor
from workloads import demo

from emocircuits.activations import batches, capture
from emocircuits.data.prompts import encode_prompt
from emocircuits.data.scenarios import ScenarioSet, discovery
from emocircuits.examples import reply_examples
from emocircuits.reading import Example, read

EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
N_SCENARIOS, BATCH, TARGET = 6, 16, 0.6
SHARED, WHOLE, SINGLE = "emocircuits read (shared prompts)", "capture of every text whole", "HF, one text at a time"


def run(repetitions: int) -> list[Table]:
    """Mean residual over each reply: shared prompts, whole texts in batches, and the common one-by-one loop."""
    examples = reply_examples(ScenarioSet(discovery().rows[:N_SCENARIOS]), EMOTIONS)
    model, tokenizer = demo().model, demo().tokenizer
    texts = [_tokens(e) for e in examples]
    ways = {
        SHARED: lambda: read(model, tokenizer, examples).x,
        WHOLE: lambda: _read_whole(texts),
        SINGLE: lambda: _read_singly(texts),
    }
    timing = interleaved(ways, repetitions)
    reference: Tensor = timing.results[SHARED]
    lines = [
        Line(
            name,
            {"time, x whole texts": timing.ratio(name, WHOLE, TARGET if name == SHARED else None)},
            "" if name == SHARED else _difference(timing.results[name], reference),
        )
        for name in ways
    ]
    workload = f"{len(examples)} replies to {N_SCENARIOS} scenarios, mean resid_post over the reply, {demo().name}"
    return [Table("Reading", workload, lines)]


def _tokens(example: Example) -> tuple[list[int], int]:
    """Ids of the whole text and where its reply begins."""
    prompt = encode_prompt(demo().tokenizer, example.prompt)
    reply = demo().tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return prompt + reply, len(prompt)


def _read_whole(texts: Sequence[tuple[list[int], int]]) -> Tensor:
    """[N, n_layers, d_model], in batches of similar length."""
    rows: dict[int, Tensor] = {}
    for index in batches(len(texts), [len(ids) for ids, _ in texts], BATCH):
        width = max(len(texts[i][0]) for i in index)
        ids = torch.tensor([texts[i][0] + [0] * (width - len(texts[i][0])) for i in index])
        mask = torch.tensor([[1] * len(texts[i][0]) + [0] * (width - len(texts[i][0])) for i in index])
        spans = [(texts[i][1], len(texts[i][0])) for i in index]
        inputs = {"input_ids": ids, "attention_mask": mask}
        found = capture(demo().model, inputs, "resid_post", positions=spans, reduce="mean").stack("resid_post")
        rows.update(zip(index, found.transpose(0, 1)))
    return torch.stack([rows[i] for i in range(len(texts))])


@torch.no_grad()
def _read_singly(texts: Sequence[tuple[list[int], int]]) -> Tensor:
    """[N, n_layers - 1, d_model]; the last hidden state has been through the final norm and is left out."""
    rows = []
    for ids, begin in texts:
        states = demo().model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, begin:].mean(0) for state in states[1:-1]]))
    return torch.stack(rows)


def _difference(found: Tensor, reference: Tensor) -> str:
    reference = reference[:, : found.shape[1]]
    return f"differs by {float((found - reference).abs().max() / reference.abs().max()):.0e}"
