"""DAPO (arXiv 2503.14476): decoupled clip range, token mean over the mini-batch, dual clip."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses.policy import LossOptions, policy_loss


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    settings: PPOSettings,
    *,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
    denominator: float | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Any]]:
    """loss = sum over response tokens of L / number of response tokens (eq. 8), as `settings` say.

    r = exp(logprobs - old_logprobs);  Lc = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    L = min(-A c, Lc) where A < 0, Lc elsewhere

    It is FIPO with f = 1 and no sequence drop. Arguments, result and errors: the package's docstring.
    """
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        settings,
        with_influence=False,
        cu_seqlens=cu_seqlens,
        group=group,
        denominator=denominator,
        **options,
    )
