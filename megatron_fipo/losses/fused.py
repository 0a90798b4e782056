"""The policy loss from `ops.fipo_terms`: its gradient is computed with it, the backward pass only scales it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses.terms import PolicyBatch, PolicyTerms
from megatron_fipo.ops.fipo_terms import fused_terms, scale_sequences


def fused_policy_terms(batch: PolicyBatch, settings: PPOSettings, *, with_influence: bool) -> PolicyTerms:
    """What `eager_terms` gives, without its temporaries: one pass over the tokens on the CPU, three kernels on CUDA."""
    terms = fused_terms(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        batch.offsets,
        settings,
        with_influence=with_influence,
        group=batch.group,
        token_weights=batch.token_weights,
    )
    return PolicyTerms(
        weighted_sum=lambda factors: _WeightedSum.apply(
            batch.logprobs, terms.gradient, terms.loss_sums, factors, batch.offsets
        ),
        num_tokens=terms.num_tokens,
        num_dual_clipped=terms.num_dual_clipped,
        influence_weights=terms.influence_weights,
        future_kl=terms.future_kl,
        token_stats=terms.token_stats,
    )


class _WeightedSum(torch.autograd.Function):
    """Sum over sequences of factor x loss_sum; d / d logprobs is gradient [T] x the factor of its sequence."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, gradient: Tensor, loss_sums: Tensor, factors: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gradient, factors, offsets)
        return (loss_sums * factors).sum().to(logprobs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient, factors, offsets = ctx.saved_tensors
        return scale_sequences(gradient, factors * grad_output, offsets), None, None, None, None
