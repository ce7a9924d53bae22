"""Circuits: effects of all heads and neurons, against the passes they would otherwise cost."""

from __future__ import annotations

import random
from typing import Any

import peers
import torch
from harness import MIB, Cell, Line, Table, Way, build, interleaved, memory_of
from torch import Tensor
from workloads import demo, text_ids

from emocircuits.circuits.heads import attribution, total_effects
from emocircuits.circuits.readout import Readout
from emocircuits.circuits.units import collect
from emocircuits.data.scenarios import ScenarioSet, discovery
from emocircuits.directions import DirectionSet, fit
from emocircuits.examples import prompt_examples
from emocircuits.models.anatomy import resolve
from emocircuits.reading import Example, read

EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
N_SCENARIOS, LENGTH = 12, 64
CAPTURE, DIRECT = "capture pass alone", "all heads and neurons, six emotions"
BRUTE, OURS, LAST, GRADIENT = (
    "one full HF forward per head", "emocircuits total_effects", "emocircuits total_effects, last position",
    "emocircuits attribution (gradient)",
)  # fmt: skip


def run(repetitions: int) -> list[Table]:
    """Direct effects beside their capture pass, then the sweep over all heads."""
    return [_direct(repetitions), _sweep(repetitions)]


def _directions(examples: list[Any]) -> DirectionSet:
    return fit(read(demo().model, demo().tokenizer, examples, position="last_prompt"), EMOTIONS)


def _equally_long(n: int) -> list[Example]:
    """n prompts of the same length in tokens, so that batches differ in nothing but their number."""
    words = ("red", "dog", "sun", "box", "hill", "road", "man", "tree", "fish", "hand", "book", "door", "bird", "star",
             "cold", "milk", "rain", "hat", "cup", "ring")  # fmt: skip
    prompts = [" ".join(random.Random(i).sample(words, len(words))) for i in range(n)]
    return [
        Example(prompt=p, label=EMOTIONS[i % len(EMOTIONS)], group=str(i // len(EMOTIONS)), theme="t", cluster=str(i))
        for i, p in enumerate(prompts)
    ]


def _direct(repetitions: int) -> Table:
    model, tokenizer = demo().model, demo().tokenizer
    examples = prompt_examples(ScenarioSet(discovery().rows[:N_SCENARIOS]), EMOTIONS)
    directions = _directions(examples)
    ways: dict[str, Way] = {
        CAPTURE: lambda: read(model, tokenizer, examples, position="last_prompt"),
        DIRECT: lambda: collect(model, tokenizer, examples, directions, position="last_prompt"),
    }
    timing = interleaved(ways, repetitions)
    column = "time, x capture pass"
    lines = [Line(n, {column: timing.ratio(n, CAPTURE, 1.3 if n == DIRECT else None)}) for n in ways]
    texts = _equally_long(len(examples))
    held = [
        memory_of(lambda e=e: collect(model, tokenizer, e, directions, position="last_prompt", batch_size=4))
        for e in (texts[: len(texts) // 3], texts)
    ]
    ratio = {"peak memory, x a third of the prompts": Cell(held[1].peak / held[0].peak, target=1.05)}
    lines.append(Line("the same, memory", ratio, f"peak {held[1].peak / MIB:.0f} MiB"))
    anatomy = resolve(model)
    units = anatomy.n_layers * anatomy.n_heads
    workload = (
        f"{len(examples)} prompts, last token, {demo().name}; the published way needs {units} forward passes more for"
        f" each prompt ({units} heads)"
    )
    return Table("Circuits: direct effects", workload, lines)


def _sweep(repetitions: int) -> Table:
    model, ids = demo().model, text_ids(1, LENGTH)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    weights = torch.randn(6, resolve(model).d_model, generator=torch.Generator().manual_seed(0))
    readout = Readout(EMOTIONS, "final_norm", 0, weights, "random")
    others, missing = build({"HookedTransformer, restarted at the layer": lambda: _hooked(ids, weights)})
    ways: dict[str, Way] = {
        BRUTE: lambda: _brute(inputs, weights),
        OURS: lambda: total_effects(model, inputs, readout),
        LAST: lambda: total_effects(model, inputs, readout, positions="last", rows=128),
        GRADIENT: lambda: attribution(model, inputs, readout),
        **others,
    }
    timing = interleaved(ways, repetitions)
    targets = {OURS: 1 / 5.5, LAST: 1 / 40}
    column = "time, x one forward per head"
    exact: Tensor = timing.results[BRUTE]
    lines = [
        Line(n, {column: timing.ratio(n, BRUTE, targets.get(n))}, _note(n, timing.results[n], exact)) for n in ways
    ]
    heads = resolve(model).n_layers * resolve(model).n_heads
    workload = f"zero ablation of each of {heads} heads, 1 x {LENGTH} tokens of scenario text, {demo().name}"
    return Table("Circuits: total effects of all heads", workload, lines + missing)


def _note(name: str, found: Tensor, exact: Tensor) -> str:
    if name == BRUTE:
        return ""
    if name == LAST:
        return "another quantity: only the last position loses the head"
    if name == GRADIENT:
        pair = torch.stack([found.flatten(), exact.flatten()])
        return f"Pearson {float(torch.corrcoef(pair)[0, 1]):.2f} with the exact effects"
    return f"differs by {float((found - exact).abs().max() / exact.abs().max()):.0e}"


@torch.no_grad()
def _brute(inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
    """[1, L, heads, 6] with plain hooks on the model's o_proj modules and a full forward each, as published."""
    model, anatomy = demo().model, resolve(demo().model)
    seen: list[Tensor] = []
    norm = model.get_submodule(anatomy.final_norm)
    watch = norm.register_forward_hook(lambda _, __, out: seen.append(out[:, -1] @ weights.T))
    out = torch.zeros(1, anatomy.n_layers, anatomy.n_heads, 6)
    try:
        model(**inputs, use_cache=False)
        for layer in range(anatomy.n_layers):
            o_proj = model.get_submodule(anatomy.point("z", layer).module)
            for head in range(anatomy.n_heads):
                part = slice(head * anatomy.head_dim, (head + 1) * anatomy.head_dim)
                handle = o_proj.register_forward_pre_hook(lambda _, args, part=part: _zeroed(args[0], part))
                model(**inputs, use_cache=False)
                handle.remove()
                out[:, layer, head] = seen[0] - seen[-1]
    finally:
        watch.remove()
    return out


def _zeroed(x: Tensor, part: slice) -> tuple[Tensor]:
    x = x.clone()
    x[..., part] = 0
    return (x,)


def _hooked(ids: Tensor, weights: Tensor) -> Way:
    """TransformerLens with its own restart: the residual entering the layer is cached, one head per row of a batch."""
    lens = peers.hooked_model(demo().model, demo().tokenizer)
    n_heads, n_layers = lens.cfg.n_heads, lens.cfg.n_layers
    final = lens.ln_final.w.detach() if hasattr(lens.ln_final, "w") else torch.ones(lens.cfg.d_model)

    @torch.no_grad()
    def run() -> Tensor:
        names = [f"blocks.{i}.hook_resid_pre" for i in range(n_layers)]
        _, cache = lens.run_with_cache(ids, names_filter=lambda name: name in names)
        seen: list[Tensor] = []
        keep = ("ln_final.hook_normalized", lambda x, hook: seen.append((x[:, -1] * final) @ weights.T))
        lens.run_with_hooks(ids, fwd_hooks=[keep], return_type=None)  # no unembedding, as in ours
        out = torch.zeros(1, n_layers, n_heads, 6)
        for layer in range(n_layers):
            rows = cache[names[layer]].expand(n_heads, -1, -1)
            cut = (f"blocks.{layer}.attn.hook_z", lambda z, hook: _without_own_head(z, n_heads))
            lens.run_with_hooks(rows, start_at_layer=layer, fwd_hooks=[cut, keep], return_type=None)
            out[0, layer] = seen[0] - seen[-1]
        return out

    return run


def _without_own_head(z: Tensor, n_heads: int) -> Tensor:
    """Row h loses head h."""
    view = z.clone().reshape(*z.shape[:2], n_heads, -1)
    index = torch.arange(n_heads)
    view[index, :, index] = 0
    return view.reshape(z.shape)
