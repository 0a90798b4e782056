"""What every form of the policy loss takes and gives: checked tokens in, losses per sequence and statistics out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.losses.update_metrics import TokenStats
from megatron_fipo.ops.future_kl import as_bool_mask, compute_dtype, sequence_offsets


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """The arguments of a loss, checked and flattened to T tokens, this rank's share under a group of several ranks.

    Entries outside the mask may hold anything.
    """

    logprobs: Tensor  # [T] fp32 or float64, carries the gradient
    old_logprobs: Tensor  # [T], dtype of logprobs, as are the advantages
    advantages: Tensor  # [T]
    mask: Tensor  # [T] bool, the response before any drop
    offsets: Tensor  # [num_seqs + 1] int64, where the sequences lie in these T tokens
    shape: torch.Size  # the shape given, [B, L] or [T]
    mask_dtype: torch.dtype  # the dtype given
    cu_seqlens: Tensor | None  # as given
    group: Any | None  # as given
    token_weights: Tensor | None  # [T] w, dtype of logprobs; None: 1 everywhere
    reference_logprobs: Tensor | None  # [T], dtype of logprobs; None without a KL term


@dataclass(frozen=True, eq=False)
class PolicyTerms:
    """The loss before the sum over sequences. Counts are this rank's; n is the number of its response tokens."""

    weighted_sum: Callable[[Tensor], Tensor]  # factors [num_seqs] float64 -> sum of factor x w L [], with its gradient
    num_tokens: Tensor  # [num_seqs] int64, response tokens
    num_dual_clipped: Tensor  # [num_seqs] int64, those with A < 0 and Lc > L3
    influence_weights: Tensor | None  # [T] f; None for an algorithm without it, which reads as 1
    future_kl: Tensor | None  # [T] F; likewise 0
    token_stats: TokenStats  # [n] each, all but loss_sum and num_kept


def policy_batch(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    cu_seqlens: Tensor | None,
    group: Any | None,
    token_weights: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> PolicyBatch:
    """Check what a loss was given and flatten it. Raises ValueError as `future_kl` does, and when shapes differ."""
    offsets = sequence_offsets(logprobs, cu_seqlens, 1 if group is None else group.size())
    for name, tensor in (
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("token_weights", token_weights),
        ("reference_logprobs", reference_logprobs),
    ):
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but must have the log-probs' {tuple(logprobs.shape)}"
            )
    dtype = compute_dtype(logprobs)
    return PolicyBatch(
        logprobs.to(dtype).reshape(-1),
        old_logprobs.detach().to(dtype).reshape(-1),
        advantages.detach().to(dtype).reshape(-1),
        as_bool_mask(loss_mask, logprobs).reshape(-1),
        offsets,
        logprobs.shape,
        loss_mask.dtype,
        cu_seqlens,
        group,
        None if token_weights is None else token_weights.detach().to(dtype).reshape(-1),
        None if reference_logprobs is None else reference_logprobs.detach().to(dtype).reshape(-1),
    )
