"""GRPO (arXiv 2402.03300): symmetric clip range, mean over each sequence and then over sequences, no dual clip."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses.policy import clipped_policy_terms, policy_result, policy_tokens


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
    num_sequences: int | None = None,
    max_response_len: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """loss = mean over sequences of the mean over a sequence's tokens of L (eq. 3 without its KL term).

    L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(logprobs - old_logprobs)

    The mean over sequences and the absence of a dual clip are GRPO's defaults in LOSS_SETTINGS; `settings` decide.
    Arguments, result and errors: the package's docstring.
    """
    tokens = policy_tokens(logprobs, old_logprobs, advantages, loss_mask, cu_seqlens=cu_seqlens, group=group)
    terms = clipped_policy_terms(tokens.shift, tokens.advantages, settings)
    return policy_result(
        tokens,
        terms,
        tokens.mask,
        settings,
        denominator=denominator,
        num_sequences=num_sequences,
        max_response_len=max_response_len,
    )
