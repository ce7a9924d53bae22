"""Edges say where an effect goes: they add up to the attribution, equal path patching, and draw the planted circuit."""

from __future__ import annotations

from typing import Any

import organisms
import pytest
import torch
import zoo
from test_circuits import EMOTIONS, padded, random_readout
from test_organisms import texts

from emocircuits.activations import Patch, capture
from emocircuits.activations.edit import edit
from emocircuits.circuits.assemble import Circuit, top
from emocircuits.circuits.edges import Graph, graph
from emocircuits.circuits.gradients import attribution
from emocircuits.circuits.readout import Readout
from emocircuits.circuits.sublayers import attention_side
from emocircuits.circuits.units import collect
from emocircuits.directions import fit
from emocircuits.errors import InputError
from emocircuits.models.anatomy import resolve
from emocircuits.reading import read

NOTHING = {"z": None, "mlp_post": None}


def everything(model: Any, emotion: str) -> Circuit:
    a = resolve(model)
    heads, neurons = torch.ones(a.n_layers, a.n_heads), torch.ones(a.n_layers, int(a.d_mlp or 0))
    return top(emotion, heads, neurons, heads.numel(), neurons.numel())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "gpt2", "gpt_neox", "qwen3"])
def test_edges_of_a_whole_model_add_up_to_each_unit_s_attribution(name: str) -> None:
    model = zoo.build(name)
    inputs, readout = padded(model), random_readout(model)
    found = graph(model, inputs, readout, everything(model, EMOTIONS[1]), NOTHING)
    expected = attribution(model, inputs, readout, NOTHING)
    mine = [_own(expected["z" if kind == "heads" else "mlp_post"][:, layer, unit]) for kind, layer, unit in found.nodes]
    scale = float(found.effects.abs().max())
    torch.testing.assert_close(found.effects, torch.stack(mine), rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(found.edges.sum(1) + found.direct, found.effects, rtol=1e-3, atol=1e-4 * scale)


def _own(effects: torch.Tensor) -> torch.Tensor:
    """[B, E] -> mean effect on the second emotion less the others'."""
    return (effects[:, 1] - (effects.sum(1) - effects[:, 1]) / (effects.shape[1] - 1)).mean()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_an_edge_is_the_slope_of_path_patching(name: str) -> None:
    """Give one unit alone an input without a little of what another unit writes, and see what it does to the score."""
    model = zoo.build(name)
    inputs = padded(model)
    readout = random_readout(model)
    sender, receiver = ("heads", 1, 0), ("neurons", 2, 5)
    circuit = Circuit(EMOTIONS[1], ((1, 0),), ((2, 5),), (1.0,), (1.0,))
    found = graph(model, inputs, readout, circuit, NOTHING)
    assert found.nodes == (sender, receiver)
    side = attention_side(model, 1)
    acts = capture(model, inputs, ["z", "mlp_post", "resid_pre"], positions="all")
    z = acts["z", 1]
    y, step = side.project.forward(z.flatten(2)), 1e-2
    less = z.clone()
    less[:, :, 0] *= 1 - step
    lost = side.added(y) - side.added(side.project.forward(less.flatten(2)))
    site = "resid_pre" if "resid_mid" in resolve(model).missing else "resid_mid"
    stream = capture(model, inputs, site, 2, positions="all")[site, 2] - lost
    with edit(model, Patch(site=site, layer=2, value=stream), compile_to="hook"):
        changed = capture(model, inputs, "mlp_post", 2, positions="all")["mlp_post", 2]
    patched = acts["mlp_post", 2].clone()
    patched[..., 5] = changed[..., 5]
    clean = capture(model, inputs, "final_norm")["final_norm", 0]
    with edit(model, Patch(site="mlp_post", layer=2, value=patched), compile_to="hook"):
        after = capture(model, inputs, "final_norm")["final_norm", 0]
    slope = _own((clean - after) @ readout.weights.T) / step
    assert float(found.edges[0, 1]) == pytest.approx(float(slope), rel=3e-2)


def planted_graph(emotion: str) -> Graph:
    organism = organisms.planted()
    model, tokenizer = organism.model, organism.tokenizer
    directions = fit(read(model, tokenizer, texts(), position="last_prompt"), organisms.EMOTIONS)
    units = collect(model, tokenizer, texts(), directions)
    behaviour = Readout.of_words(model, tokenizer, {e: [f"={e}"] for e in organisms.EMOTIONS})
    mine = [tokenizer(t.prompt)["input_ids"] for t in texts(6, 5) if t.label == emotion]
    inputs = {"input_ids": torch.tensor(mine), "attention_mask": torch.ones(len(mine), len(mine[0]), dtype=torch.long)}
    heads = (*organisms.HEADS, organisms.DISTRACTOR)
    circuit = Circuit(emotion, heads, organisms.NEURONS, (1.0,) * 3, (1.0,) * 3)
    return graph(model, inputs, behaviour, circuit, {s: units.baseline(s) for s in ("z", "mlp_post")})


@pytest.mark.parametrize("e", range(3))
def test_the_planted_path_is_drawn_and_nothing_else(e: int) -> None:
    found = planted_graph(organisms.EMOTIONS[e])
    at = {node: i for i, node in enumerate(found.nodes)}
    first, neuron, last = at["heads", 1, 2], at[("neurons", *organisms.NEURONS[e])], at["heads", 3, 1]
    whole = float(found.effects[first])
    assert whole > 0.5
    flow = found.edges[first]
    assert float(flow[[at[("neurons", *n)] for n in organisms.NEURONS]].sum()) == pytest.approx(whole, rel=0.05)
    assert float(flow[last].abs()) < 0.02 * whole
    assert float(found.direct[first].abs()) < 0.02 * whole
    assert float(found.edges[neuron, last]) == pytest.approx(float(found.effects[neuron]), rel=0.1)
    assert float(found.direct[last]) == pytest.approx(float(found.effects[last]), rel=0.01)
    distractor = at[("heads", *organisms.DISTRACTOR)]
    flows = torch.cat([found.edges[distractor], found.direct[distractor, None]])
    assert float(flows.abs().max()) < 0.02 * whole, "it correlates, and nothing reads it"


def test_members_after_the_readout_are_left_out() -> None:
    model = zoo.build("llama")
    weights = torch.randn(3, resolve(model).d_model, generator=torch.Generator().manual_seed(0))
    early = Readout(EMOTIONS, "resid_post", 1, weights, "projection at layer 1")
    circuit = Circuit(EMOTIONS[0], ((0, 1), (1, 2), (3, 0)), ((2, 4),), (1.0,) * 3, (1.0,))
    found = graph(model, padded(model), early, circuit, NOTHING)
    assert found.nodes == (("heads", 0, 1), ("heads", 1, 2))
    with pytest.raises(InputError, match="before the readout"):
        graph(model, padded(model), early, Circuit(EMOTIONS[0], ((3, 0),), (), (1.0,), ()), NOTHING)
    with pytest.raises(InputError, match="emotion"):
        graph(model, padded(model), early, Circuit("joy", ((0, 0),), (), (1.0,), ()), NOTHING)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
