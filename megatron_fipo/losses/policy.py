"""What all algorithms share: checked tokens, the clipped policy loss per token, the sequence drop, the final result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.config import PPOSettings
from megatron_fipo.losses.reduction import count_per_sequence, reduce_loss, spread_to_tokens
from megatron_fipo.losses.update_metrics import update_metrics
from megatron_fipo.ops.future_kl import (
    SHIFT_BOUND,
    as_bool_mask,
    compute_dtype,
    require_single_rank,
    sequence_offsets,
)

MAX_DUAL_CLIPPED = 1  # a sequence with more dual-clipped tokens than this is dropped (released semantics)


@dataclass(frozen=True, eq=False)
class PolicyTokens:
    """The arguments of a loss, checked and flattened; every value outside the response is a plain 0."""

    shift: Tensor  # [T] fp32 or float64, d = clamp(logprobs - old_logprobs, -20, 20), carries the gradient
    advantages: Tensor  # [T], dtype of shift
    mask: Tensor  # [T] bool, the response before any drop
    offsets: Tensor  # [num_seqs + 1] int64
    shape: torch.Size  # the shape given, [B, L] or [T]
    mask_dtype: torch.dtype  # the dtype given


@dataclass(frozen=True, eq=False)
class PolicyTerms:
    """The clipped policy loss per token and the decisions in it, all [T]."""

    losses: Tensor  # carries the gradient
    clipped: Tensor  # bool, L2 > L1
    dual_clipped: Tensor  # bool, A < 0 and Lc > L3


def policy_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    group: Any | None = None,
) -> PolicyTokens:
    """Check what a loss was given and flatten it. All tensors [B, L], or packed [T] with cu_seqlens.

    Values outside the mask are never read. A NaN or infinite log-prob inside it makes shift, hence loss and gradient,
    NaN there. Raises ValueError as `future_kl` does, and when shapes differ.
    """
    require_single_rank(group)
    offsets = sequence_offsets(logprobs, cu_seqlens)
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but must have the log-probs' {tuple(logprobs.shape)}"
            )
    dtype = compute_dtype(logprobs)
    mask = as_bool_mask(loss_mask, logprobs)
    new = torch.where(mask, logprobs.to(dtype), 0)
    old = torch.where(mask, old_logprobs.detach().to(dtype), 0)
    delta = new - old
    # the clamp alone would turn an infinite log-prob into an ordinary shift; 0 * inf is NaN
    shift = delta.clamp(-SHIFT_BOUND, SHIFT_BOUND) + 0.0 * delta
    return PolicyTokens(
        shift.reshape(-1),
        torch.where(mask, advantages.detach().to(dtype), 0).reshape(-1),
        mask.reshape(-1),
        offsets,
        logprobs.shape,
        loss_mask.dtype,
    )


def clipped_policy_terms(shift: Tensor, advantages: Tensor, settings: PPOSettings) -> PolicyTerms:
    """The PPO loss with dual clip (arXiv 1912.09729) per token; advantages [T] already hold the influence weights.

    r = exp(shift);  L1 = -A r;  L2 = -A clip(r, 1 - clip_low, 1 + clip_high);  Lc = max(L1, L2)
    L = min(-A c, Lc) where A < 0, with c = dual_clip (off when None), Lc elsewhere
    """
    ratio = shift.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    worse = torch.maximum(plain, clipped)
    if settings.dual_clip is None:
        return PolicyTerms(worse, clipped > plain, torch.zeros_like(clipped, dtype=torch.bool))
    bound = -advantages * settings.dual_clip
    dual_clipped = (advantages < 0) & (worse > bound)
    return PolicyTerms(torch.where(dual_clipped, bound, worse), clipped > plain, dual_clipped)


def drop_dual_clipped(mask: Tensor, dual_clipped: Tensor, offsets: Tensor) -> Tensor:
    """mask [T] bool without the sequences that hold more than one of dual_clipped [T] bool, which is false off mask."""
    num_dual_clipped = count_per_sequence(dual_clipped, offsets)
    return mask & spread_to_tokens(num_dual_clipped <= MAX_DUAL_CLIPPED, offsets)


def policy_result(
    tokens: PolicyTokens,
    terms: PolicyTerms,
    kept: Tensor,
    settings: PPOSettings,
    *,
    influence_weights: Tensor | None = None,
    future_kl: Tensor | None = None,
    denominator: float | Tensor | None = None,
    num_sequences: int | None = None,
    max_response_len: int | None = None,
    with_metrics: bool = True,
) -> tuple[Tensor, dict[str, Any]]:
    """Reduce to (loss, info), what every loss returns; info is described in the package's docstring.

    kept, influence_weights, future_kl: [T]. The last two are None for an algorithm without them, which reads as f = 1
    and F = 0 in info and leaves their metrics out. [B, L] takes L for max_response_len when that is not given.
    """
    if max_response_len is None and len(tokens.shape) == 2:
        max_response_len = tokens.shape[1]
    reduction = reduce_loss(
        terms.losses,
        kept,
        tokens.offsets,
        settings.loss_agg,
        denominator=denominator,
        num_sequences=num_sequences,
        max_response_len=max_response_len,
    )
    per_token = {
        "shift": tokens.shift.detach(),
        "advantages": tokens.advantages,
        "clipped": terms.clipped,
        "dual_clipped": terms.dual_clipped,
    }
    if influence_weights is not None and future_kl is not None:
        per_token |= {"influence_weights": influence_weights, "future_kl": future_kl}
    token_stats = {name: values[tokens.mask] for name, values in per_token.items()}
    token_stats["loss_sum"] = reduction.local_sum.detach().double().reshape(1)
    token_stats["num_kept"] = reduction.count.reshape(1)
    without = tokens.shift.detach()
    info: dict[str, Any] = {
        "future_kl": (torch.zeros_like(without) if future_kl is None else future_kl).view(tokens.shape),
        "influence_weights": (torch.ones_like(without) if influence_weights is None else influence_weights).view(
            tokens.shape
        ),
        "loss_mask": kept.view(tokens.shape).to(tokens.mask_dtype),
        "num_kept": reduction.count,
        "token_stats": token_stats,
        **(update_metrics(token_stats, settings) if with_metrics else {}),
    }
    return reduction.loss, info
