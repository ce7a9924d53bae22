"""TopK training at the cost of its nonzeros: SAELens's losses and gradients with one dense product a step, not six.

The codes of a batch are a matrix [B, d_sae] with k nonzeros a row. Read by rows it makes the reconstruction, read by
columns the gradients of both weight matrices, and either reading is one embedding bag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import embedding_bag

from emocircuits.errors import InputError

from .lens import TopKTrainingSAE, TopKTrainingSAEConfig, TrainStepInput, TrainStepOutput


def by_column(latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Order [B * k] that sorts the nonzeros by latent, and where each latent's run begins [d_sae]."""
    flat = latents.flatten()
    counts = torch.bincount(flat, minlength=d_sae)
    return flat.argsort(stable=True), counts.cumsum(0) - counts


class _Encode(Function):
    """Passes on the values [B, k] of the chosen `latents` of x [B, d]; backward touches those k per row only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, latents: Tensor, x: Tensor, *weights: Tensor) -> Any:
        W_enc, _, b_in = weights
        ctx.save_for_backward(values, latents, x, W_enc, b_in)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, latents, x, W_enc, b_in = ctx.saved_tensors
        grad = (grads[0] * (values > 0)).flatten()
        order, starts = by_column(latents, W_enc.shape[1])
        rows = order.div(latents.shape[1], rounding_mode="floor")
        W_grad = embedding_bag(rows, x - b_in, starts, per_sample_weights=grad[order], mode="sum").T
        b_grad = torch.zeros_like(W_enc[0]).index_add_(0, latents.flatten(), grad)
        return None, None, None, W_grad, b_grad, -(W_enc @ b_grad)


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's TopK training SAE, several times faster a step; what it saves is a TopK SAE like any other.

    Losses and gradients equal SAELens's to rounding, the auxiliary loss for dead latents included. With
    `rescale_acts_by_decoder_norm` the norm of a decoder row cancels between encoder and decoder, so it decides which
    latents are chosen and nothing else. Of a step's output, `feature_acts` is a
    sparse COO tensor and `hidden_pre` has no gradient.
    """

    def __init__(self, cfg: TopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if cfg.normalize_activations != "none" or cfg.reshape_activations != "none":
            raise InputError("the sparse step takes activations as they are; scale or reshape them before")

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step's losses on x [B, d_in]."""
        x = step_input.sae_in.to(self.dtype)
        with torch.no_grad():
            norm = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else torch.ones_like(self.b_enc)
            pre = torch.addmm(self.b_enc, x - self._b_in, self.W_enc).mul_(norm)
            values, latents = pre.topk(self.cfg.k, sorted=False)
            values = values.relu_().div_(norm[latents])
        values = _Encode.apply(values, latents, x, self.W_enc, self.b_enc, self._b_in)
        sae_out = embedding_bag(latents, self.W_dec, per_sample_weights=values, mode="sum") + self.b_dec
        mse_loss = self.mse_loss_fn(sae_out, x).sum(-1).mean()
        aux_loss = self._auxk(x, sae_out, step_input.dead_neuron_mask, norm)
        losses = {"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss}
        acts = _coo(latents, (values.detach() * norm[latents]), pre.shape)
        return TrainStepOutput(x, sae_out, acts, pre, mse_loss + aux_loss, losses)

    @property
    def _b_in(self) -> Tensor:
        """What is subtracted before encoding."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else torch.zeros_like(self.b_dec)

    def _auxk(self, x: Tensor, sae_out: Tensor, dead: Tensor | None, norm: Tensor) -> Tensor:
        """The top d_in / 2 dead latents reconstruct what the live ones left over (arXiv 2406.04093, appendix A.2).

        Only the columns of dead latents are encoded again, so that no gradient runs through the others.
        """
        if dead is None or not bool(dead.any()):
            return sae_out.new_tensor(0.0)
        index = dead.nonzero()[:, 0]
        half = x.shape[-1] // 2
        acts = (x - self._b_in) @ self.W_enc[:, index] + self.b_enc[index]
        if len(index) > half:
            chosen = (acts.detach() * norm[index]).topk(half, sorted=False).indices
            acts = torch.zeros_like(acts).scatter(1, chosen, acts.gather(1, chosen))
        left = (x - sae_out).detach()
        scale = self.cfg.aux_loss_coefficient * min(len(index) / half, 1.0)
        return scale * (acts @ self.W_dec[index] - left).pow(2).sum(-1).mean()


def _coo(latents: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The codes as a sparse matrix; torch checks it, or says that it does not, unless told."""
    rows = torch.arange(len(latents), device=latents.device).repeat_interleave(latents.shape[1])
    index = torch.stack([rows, latents.flatten()])
    return torch.sparse_coo_tensor(index, values.flatten(), shape, check_invariants=False)
