"""The sparse TopK step is SAELens's TopK step: same losses, same gradients, same file."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

pytest.importorskip("sae_lens")

from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from saes.topk import SparseTopKTrainingSAE

D, WIDTH, K, BATCH = 12, 40, 4, 30


def pair(**options):
    """SAELens's SAE and ours with the same weights, in float64, away from their initial symmetry."""
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=D, d_sae=WIDTH, k=K, dtype="float64", **options)
    theirs = TopKTrainingSAE(cfg)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ours = SparseTopKTrainingSAE(deepcopy(cfg))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(sae, x, dead=None):
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    sae.zero_grad()
    output.loss.backward()
    return output, {name: p.grad for name, p in sae.named_parameters()}


@pytest.mark.parametrize("n_dead", [None, 0, 1, 3, D // 2, 25])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_losses_and_gradients(n_dead, rescale, apply_b_dec_to_input):
    theirs, ours = pair(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input)
    x = torch.randn(BATCH, D, dtype=torch.float64)
    dead = None if n_dead is None else torch.randperm(WIDTH) < n_dead
    (a, grads_a), (b, grads_b) = step(theirs, x, dead), step(ours, x, dead)
    assert a.losses.keys() == b.losses.keys()
    for name, loss in a.losses.items():
        torch.testing.assert_close(b.losses[name], loss, rtol=1e-12, atol=1e-12)
    assert bool(b.losses["auxiliary_reconstruction_loss"] > 0) == bool(n_dead)
    torch.testing.assert_close(b.sae_out, a.sae_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.feature_acts.to_dense(), a.feature_acts, rtol=1e-12, atol=1e-12)
    for name, grad in grads_a.items():
        torch.testing.assert_close(grads_b[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_negative_preactivations_are_off():
    """With fewer than k positive pre-activations, the rest of the k carry neither value nor gradient."""
    theirs, ours = pair()
    with torch.no_grad():
        for sae in (theirs, ours):
            sae.b_enc -= 4
    x = torch.randn(BATCH, D, dtype=torch.float64)
    (a, grads_a), (b, grads_b) = step(theirs, x), step(ours, x)
    assert (a.feature_acts > 0).sum(1).min() < K
    assert torch.equal(b.feature_acts.to_dense() > 0, a.feature_acts > 0)
    for name, grad in grads_a.items():
        torch.testing.assert_close(grads_b[name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_a_training_run_stays_together():
    """Under Adam, thirty steps of either end in the same weights."""
    theirs, ours = pair()
    data = torch.randn(30, BATCH, D, dtype=torch.float64)
    for sae in (theirs, ours):
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for x in data:
            step(sae, x)
            optimiser.step()
    for a, b in zip(theirs.parameters(), ours.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9)


def test_saves_the_same_files(tmp_path):
    theirs, ours = pair()
    for sae, folder in ((theirs, "theirs"), (ours, "ours")):
        sae.save_inference_model(tmp_path / folder)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    x = torch.randn(BATCH, D, dtype=torch.float64)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "ours")(x), step(ours, x)[0].sae_out)


def test_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match="as they are"):
        SparseTopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=WIDTH, k=K, normalize_activations="layer_norm"))
