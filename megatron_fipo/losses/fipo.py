"""FIPO (arXiv 2603.19835): DAPO's loss, each advantage weighted by what the tokens after it went through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_fipo.config import FIPOSettings
from megatron_fipo.losses.policy import clipped_policy_terms, drop_dual_clipped, policy_result, policy_tokens
from megatron_fipo.ops.future_kl import influence_weights


def fipo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    settings: FIPOSettings,
    *,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
    denominator: float | Tensor | None = None,
    num_sequences: int | None = None,
    max_response_len: int | None = None,
    with_metrics: bool = True,
) -> tuple[Tensor, dict[str, Any]]:
    """DAPO's loss on A~ = A f, where f is the influence weight, detached.

    d = clamp(logprobs - old_logprobs, -20, 20);  k = d where d <= log c, else 0
    F_t = k_t + 2^(-1/half_life) F_{t+1};  f = clamp(exp(F), influence_low, influence_high)
    where A < 0 and exp(d) > safety_threshold: f = 1 (semantics paper), f clamped to [0.8, 1.0] (released)

    `released` also drops every sequence with more than one dual-clipped token, from the sum and from the count of
    tokens. With d = 0, the first update on a rollout batch, f = 1. Arguments, result and errors: the package's
    docstring.
    """
    assert settings.dual_clip is not None, "FIPOSettings require a dual clip"
    tokens = policy_tokens(logprobs, old_logprobs, advantages, loss_mask, cu_seqlens=cu_seqlens, group=group)
    weights, future_kl = influence_weights(
        tokens.shift.detach().view(tokens.shape),
        tokens.advantages.view(tokens.shape),
        tokens.mask.view(tokens.shape),
        half_life=settings.half_life,
        dual_clip=settings.dual_clip,
        influence_low=settings.influence_low,
        influence_high=settings.influence_high,
        safety_threshold=settings.safety_threshold,
        semantics=settings.semantics,
        cu_seqlens=cu_seqlens,
        group=group,
    )
    weights, future_kl = weights.reshape(-1), future_kl.reshape(-1)
    terms = clipped_policy_terms(tokens.shift, tokens.advantages * weights, settings)
    kept = tokens.mask
    if settings.semantics == "released":
        kept = drop_dual_clipped(tokens.mask, terms.dual_clipped, tokens.offsets)
    return policy_result(
        tokens,
        terms,
        kept,
        settings,
        influence_weights=weights,
        future_kl=future_kl,
        denominator=denominator,
        num_sequences=num_sequences,
        max_response_len=max_response_len,
        with_metrics=with_metrics,
    )
