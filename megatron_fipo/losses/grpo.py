"""GRPO (arXiv 2402.03300): symmetric clip range, mean over each sequence and then over sequences, no dual clip."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses.dapo import dapo_loss
from megatron_fipo.losses.policy import LossOptions


def grpo_loss(
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
    """loss = mean over sequences of the mean over a sequence's tokens of L (eq. 3 without its KL term).

    L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(logprobs - old_logprobs)

    It is DAPO's loss; the mean over sequences and the absence of a dual clip come with GRPO's LOSS_SETTINGS.
    Arguments, result and errors: the package's docstring.
    """
    return dapo_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        settings,
        cu_seqlens=cu_seqlens,
        group=group,
        denominator=denominator,
        **options,
    )
