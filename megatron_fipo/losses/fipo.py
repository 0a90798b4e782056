"""FIPO (arXiv 2603.19835): DAPO's loss, each advantage weighted by what the tokens after it went through."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from megatron_fipo.config import FIPOSettings
from megatron_fipo.losses.policy import LossOptions, policy_loss


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
    **options: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Any]]:
    """DAPO's loss on A~ = A f, where f is the influence weight, detached.

    d = clamp(logprobs - old_logprobs, -20, 20);  k = d where d <= log c, else 0
    F_t = k_t + 2^(-1/half_life) F_{t+1};  f = clamp(exp(F), influence_low, influence_high)
    where A < 0 and exp(d) > safety_threshold: f = 1 (semantics paper), f clamped to [0.8, 1.0] (released)

    `released` also drops every sequence with more than one dual-clipped token, from the sum and from the count of
    tokens. With d = 0, the first update on a rollout batch, f = 1. Arguments, result and errors: the package's
    docstring.
    """
    if not isinstance(settings, FIPOSettings):
        raise ValueError(f"settings are {settings}, but must be FIPOSettings")
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        settings,
        with_influence=True,
        cu_seqlens=cu_seqlens,
        group=group,
        denominator=denominator,
        **options,
    )
