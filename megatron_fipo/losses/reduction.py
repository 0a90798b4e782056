"""From losses per token to one number: what each `loss_agg` averages over, as local sums and a denominator.

Everything here works on flattened tokens [T] and `offsets` [num_seqs + 1], where each sequence starts in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import LossAggregation


@dataclass(frozen=True, eq=False)
class Reduction:
    """`local_sum` [] carries the gradient; `loss` = local_sum / denominator. `count` [] int64 is what `loss_agg`
    averages over: kept tokens, or sequences. Sums and counts of several micro-batches or ranks add up."""

    loss: Tensor
    local_sum: Tensor
    count: Tensor


def reduce_loss(
    token_losses: Tensor,
    kept: Tensor,
    offsets: Tensor,
    loss_agg: LossAggregation,
    *,
    denominator: float | Tensor | None = None,
    num_sequences: int | None = None,
    max_response_len: int | None = None,
) -> Reduction:
    """Sum token_losses [T] over the tokens in kept [T] bool as `loss_agg` says, and divide.

    token-mean: sum of tokens, counting kept tokens. seq-mean-token-sum: sum of tokens, counting sequences.
    seq-mean-token-mean: sum of each sequence's mean over its kept tokens; seq-mean-token-sum-norm: sum of tokens /
    max_response_len, which is then required; both counting sequences. Every sequence counts, empty and dropped ones
    too, unless num_sequences says how many are real. The divisor is `denominator`, or the count (1 if zero).
    token_losses must be finite outside the response: a token that is not kept is multiplied by 0, so that a NaN in a
    dropped sequence still shows. Raises ValueError on a denominator or number that cannot be meant.
    """
    count = kept.sum() if loss_agg == "token-mean" else _count_sequences(offsets, num_sequences)
    weights = kept.to(token_losses.dtype)
    if loss_agg == "seq-mean-token-mean":
        lengths = count_per_sequence(kept, offsets).clamp(min=1)
        weights = weights / spread_to_tokens(lengths, offsets)
    elif loss_agg == "seq-mean-token-sum-norm":
        if max_response_len is None or max_response_len < 1:
            raise ValueError(
                f"max_response_len is {max_response_len}, but must be >= 1 token: --loss-agg {loss_agg} divides by it"
            )
        weights = weights / max_response_len
    local_sum = (token_losses * weights).sum()
    if denominator is None:
        return Reduction(local_sum / count.clamp(min=1), local_sum, count)
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator is {denominator}, but must be > 0")
    return Reduction(local_sum / denominator, local_sum, count)


def count_per_sequence(flags: Tensor, offsets: Tensor) -> Tensor:
    """How many of flags [T] bool are set in each sequence: [num_seqs] int64. Integer sums: exact in any order."""
    running = torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))
    return running[offsets].diff()


def spread_to_tokens(values: Tensor, offsets: Tensor) -> Tensor:
    """values [num_seqs] repeated for every token of its sequence: [T]."""
    return values.repeat_interleave(offsets.diff())


def _count_sequences(offsets: Tensor, num_sequences: int | None) -> Tensor:
    in_tensors = offsets.numel() - 1
    if num_sequences is not None and not 0 <= num_sequences <= in_tensors:
        raise ValueError(f"num_sequences is {num_sequences}, but must be at most the {in_tensors} sequences given")
    return offsets.new_tensor(in_tensors if num_sequences is None else num_sequences)
