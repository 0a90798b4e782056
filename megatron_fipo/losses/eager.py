"""The policy loss from tensor operations and autograd: the definition that the fused form is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import FIPOSettings, PPOSettings
from megatron_fipo.losses.reduction import count_per_sequence, spread_to_tokens
from megatron_fipo.losses.terms import PolicyBatch, PolicyTerms
from megatron_fipo.ops.future_kl import SHIFT_BOUND, influence_weights


def eager_terms(batch: PolicyBatch, settings: PPOSettings, *, with_influence: bool) -> PolicyTerms:
    """The shift d, with `with_influence` (FIPOSettings) f and F, and the clipped loss of every token, 0 off the mask.

    A NaN or infinite log-prob in the mask makes shift, hence loss and gradient, NaN there.
    """
    mask = batch.mask
    delta = torch.where(mask, batch.logprobs, 0) - torch.where(mask, batch.old_logprobs, 0)
    # the clamp alone would turn an infinite log-prob into an ordinary shift; 0 * inf is NaN
    shift = delta.clamp(-SHIFT_BOUND, SHIFT_BOUND) + 0.0 * delta
    advantages = torch.where(mask, batch.advantages, 0)
    weights, future_kl = _influence(batch, shift, advantages, settings) if with_influence else (None, None)
    losses = clipped_losses(shift, advantages if weights is None else advantages * weights, settings)
    values = losses.values
    if batch.token_weights is not None:
        values = values * torch.where(mask, batch.token_weights, 0)
    per_token = {
        "shift": shift.detach(),
        "advantages": advantages,
        "clipped": losses.clipped,
        "dual_clipped": losses.dual_clipped,
    }
    if weights is not None and future_kl is not None:
        per_token |= {"influence_weights": weights, "future_kl": future_kl}
    return PolicyTerms(
        weighted_sum=lambda factors: (values * spread_to_tokens(factors.to(shift.dtype), batch.offsets)).sum(),
        num_tokens=count_per_sequence(mask, batch.offsets),
        num_dual_clipped=count_per_sequence(losses.dual_clipped, batch.offsets),
        influence_weights=weights,
        future_kl=future_kl,
        token_stats={name: values[mask] for name, values in per_token.items()},
    )


@dataclass(frozen=True, eq=False)
class ClippedLosses:
    """The clipped policy loss per token and the decisions in it, all [T]."""

    values: Tensor  # carries the gradient
    clipped: Tensor  # bool, L2 > L1
    dual_clipped: Tensor  # bool, A < 0 and Lc > L3


def clipped_losses(shift: Tensor, advantages: Tensor, settings: PPOSettings) -> ClippedLosses:
    """The PPO loss with dual clip (arXiv 1912.09729) per token; advantages [T] already hold the influence weights.

    r = exp(shift);  L1 = -A r;  L2 = -A clip(r, 1 - clip_low, 1 + clip_high);  Lc = max(L1, L2)
    L = min(-A c, Lc) where A < 0, with c = dual_clip (off when None), Lc elsewhere
    """
    ratio = shift.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    worse = torch.maximum(plain, clipped)
    if settings.dual_clip is None:
        return ClippedLosses(worse, clipped > plain, torch.zeros_like(clipped, dtype=torch.bool))
    bound = -advantages * settings.dual_clip
    dual_clipped = (advantages < 0) & (worse > bound)
    return ClippedLosses(torch.where(dual_clipped, bound, worse), clipped > plain, dual_clipped)


def _influence(batch: PolicyBatch, shift: Tensor, advantages: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    assert isinstance(settings, FIPOSettings), f"influence weights, but the settings are {settings}"
    assert settings.dual_clip is not None, "FIPOSettings require a dual clip"
    weights, future_kl = influence_weights(
        shift.detach().view(batch.shape),
        advantages.view(batch.shape),
        batch.mask.view(batch.shape),
        half_life=settings.half_life,
        dual_clip=settings.dual_clip,
        influence_low=settings.influence_low,
        influence_high=settings.influence_high,
        safety_threshold=settings.safety_threshold,
        semantics=settings.semantics,
        cu_seqlens=batch.cu_seqlens,
        group=batch.group,
    )
    return weights.reshape(-1), future_kl.reshape(-1)
