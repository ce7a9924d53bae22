"""Emotion at single steps: read where it was planted, pushed where it was asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from organisms import D_MODEL, EMOTIONS, TOKENS, Organism, planted

from emocircuits.activations.edit import edit
from emocircuits.activations.edits import Add
from emocircuits.circuits.assemble import Circuit
from emocircuits.circuits.units import Units
from emocircuits.directions import DirectionSet
from emocircuits.errors import InputError
from emocircuits.multimodal.balance import Answers
from emocircuits.reasoning.emotion import carried, carried_by_circuit, push_steps
from emocircuits.reasoning.steps import split
from emocircuits.reasoning.tokens import trace_tokens
from emocircuits.reasoning.traces import Trace


@pytest.fixture(scope="module")
def organism() -> Organism:
    return planted()


# The second step names an emotion; a full stop ends each.
TRACE = Trace("w9 w10 ", split("w7 w8 w0. w6 fear w1. w11 w12 w2.", min_chars=1))
ANSWERS = Answers(EMOTIONS, (50, 51, 52))


def directions() -> DirectionSet:
    """Where the planted code of each emotion stands: block A of the residual."""
    vectors = torch.zeros(len(EMOTIONS), 2, D_MODEL)
    for e in range(len(EMOTIONS)):
        vectors[e, :, e] = 1.0
    return DirectionSet(EMOTIONS, "resid_post", (0, 1), vectors, torch.full((2,), 2.0), torch.zeros(2, D_MODEL))


def test_ids_and_bounds_of_a_trace() -> None:
    ids, bounds = trace_tokens(TOKENS, TRACE, " w13")
    assert len(ids) == 12
    assert bounds == (2, 5, 8, 11)
    with pytest.raises(InputError, match="load the fast one"):
        trace_tokens(object(), TRACE)


def test_emotion_is_read_where_it_was_said(organism: Organism) -> None:
    found = carried(organism.model, TOKENS, TRACE, directions(), 0)
    assert found.sum(1).abs().max() < 1e-5
    assert found.argmax().item() == 1 * 3 + EMOTIONS.index("fear")
    assert found[1, 2] > 5 * found[[0, 2]].abs().max()
    closing = carried(organism.model, TOKENS, TRACE, directions(), 0, read="last")
    assert closing[1, 2] < 0.2 * found[1, 2]  # the code stands at the word, not at the full stop
    with pytest.raises(InputError, match="unknown reading of a step"):
        carried(organism.model, TOKENS, TRACE, directions(), 0, read="first")


def test_a_circuit_gets_what_its_head_moves_and_another_gets_nothing(organism: Organism) -> None:
    """Head (1, 2) moves the code from block A to block B; read in B, that is all of the emotion there."""
    made = directions()
    moved = torch.zeros_like(made.vectors)
    moved[..., 3:6] = made.vectors[..., :3]
    made = replace(made, vectors=moved)
    n = organism.model.config.num_hidden_layers
    zeros = torch.zeros(3, 1, n, 4, 8), torch.zeros(3, 1, n, 48), torch.zeros(3, 1, n, D_MODEL)
    units = Units(
        EMOTIONS, ("all",), torch.ones(3, 1), *zeros, torch.zeros(3, 1, n, 4, 3), torch.zeros(3, 1, n, 48),
        torch.zeros(n, 48), torch.zeros(3, n, 48), torch.ones(n, D_MODEL), torch.ones(n, D_MODEL),
    )  # fmt: skip
    whole = carried(organism.model, TOKENS, TRACE, made, 1)
    own = Circuit("fear", ((1, 2),), (), (1.0,), ())
    other = Circuit("fear", ((0, 3),), ((0, 5),), (1.0,), (1.0,))
    found = carried_by_circuit(organism.model, TOKENS, TRACE, made, 1, own, units)
    assert whole[1, 2] > 0.03  # the noise of all other weights is ten times less
    assert found[1:, 2] == pytest.approx(whole[1:, 2], rel=0.05)
    stray = carried_by_circuit(organism.model, TOKENS, TRACE, made, 1, other, units)
    assert stray.abs().max() < 0.02 * whole[1, 2]
    nothing = carried_by_circuit(organism.model, TOKENS, TRACE, made, 1, Circuit("fear", (), (), (), ()), units)
    assert nothing.abs().max() == 0


def test_pushes_equal_one_edited_pass_each(organism: Organism) -> None:
    found = push_steps(
        organism.model, TOKENS, TRACE, directions(), "sadness", ANSWERS, " w13", doses=(-0.5, 1.0), layers=[0],
        n_controls=2, batch_size=3,
    )  # fmt: skip
    ids, bounds = trace_tokens(TOKENS, TRACE, " w13")
    vector = directions().units[1, 0] * 2.0

    def odds(span: tuple[int, int], dose: float) -> float:
        push = Add(site="resid_post", layer=0, vector=vector * dose, positions=[span])
        with torch.no_grad(), edit(organism.model, [push]):
            logits = organism.model(torch.tensor([ids])).logits[0, -1, 50:53]
        return float(logits[1] - torch.cat([logits[:1], logits[2:]]).logsumexp(0))

    clean = odds((2, 5), 0.0)
    assert found.clean == pytest.approx(clean, abs=1e-4)
    for d, dose in enumerate(found.doses):
        for i, span in enumerate(pairwise(bounds)):
            assert found.odds[i, d].item() == pytest.approx(odds(span, dose) - clean, abs=2e-4)
        together = odds((bounds[0], bounds[-1]), dose) - clean
        assert found.everywhere[d].item() == pytest.approx(together, abs=2e-4)
    assert (found.odds[:, 1] > 0).all()  # towards sadness
    assert (found.odds[:, 0] < 0).all()
    assert found.odds[:, 1].min() > 5 * found.control[:, 1].abs().max()
    assert not organism.model.model.layers[0]._forward_hooks


def test_bad_requests_are_refused(organism: Organism) -> None:
    with pytest.raises(InputError, match="unknown emotion 'joy'"):
        push_steps(organism.model, TOKENS, TRACE, directions(), "joy", ANSWERS, " w13")
    with pytest.raises(InputError, match="doses must be"):
        push_steps(organism.model, TOKENS, TRACE, directions(), "fear", ANSWERS, " w13", doses=())
    with pytest.raises(InputError, match="unknown answer 'joy'"):
        push_steps(organism.model, TOKENS, TRACE, directions(), "fear", ANSWERS, " w13", label="joy")
