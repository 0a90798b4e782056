"""From the losses of sequences to one number: what each `loss_agg` averages over, as factors and a divisor.

Per-sequence tensors are [num_seqs]. Over a context-parallel group a rank has a part of every sequence, so what decides
about a sequence is summed over the group first: integers, so exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import LossAggregation

MAX_DUAL_CLIPPED = 1  # a sequence with more dual-clipped tokens than this is dropped (released semantics)


@dataclass(frozen=True, eq=False)
class Normaliser:
    """loss = sum over sequences of factor x (sum of L over its tokens) / divisor. Counts of micro-batches, and of the
    ranks of a group, add up."""

    factors: Tensor  # [num_seqs] float64, 0 for a dropped sequence: 0 x NaN shows
    kept: Tensor  # [num_seqs] bool
    count: Tensor  # [] int64, this rank's share of what loss_agg averages over: kept tokens, or sequences
    divisor: float | Tensor


def normalise(
    num_tokens: Tensor,
    num_dual_clipped: Tensor | None,
    loss_agg: LossAggregation,
    *,
    group: Any | None,
    denominator: float | Tensor | None,
    num_sequences: int | None,
    max_response_len: int | None,
) -> Normaliser:
    """What to multiply each sequence's sum of losses by, and what to divide the whole by, as `loss_agg` says.

    num_tokens, num_dual_clipped: [num_seqs] int64, this rank's; None: no sequence is dropped. Over a `group` (the
        context-parallel axis) of several ranks they are summed, by one all-reduce.

    token-mean: sum of tokens, counting kept tokens. seq-mean-token-sum: sum of tokens, counting sequences.
    seq-mean-token-mean: sum of each sequence's mean over its kept tokens; seq-mean-token-sum-norm: sum of tokens /
    max_response_len, which is then required; both counting sequences. Every sequence counts, empty and dropped ones
    too, unless num_sequences says how many are real; the group's first rank counts them. The divisor is `denominator`,
    or the count over the group (1 if zero). Raises ValueError on a denominator or number that cannot be meant.
    """
    in_tensors = num_tokens.numel()
    if num_sequences is not None and not 0 <= num_sequences <= in_tensors:
        raise ValueError(f"num_sequences is {num_sequences}, but must be from 0 to the {in_tensors} sequences given")
    if loss_agg == "seq-mean-token-sum-norm" and (max_response_len is None or max_response_len < 1):
        raise ValueError(
            f"max_response_len is {max_response_len}, but must be >= 1 token: --loss-agg {loss_agg} divides by it"
        )
    if isinstance(denominator, Tensor):  # its value stays unread: that would wait for the device
        if denominator.dim() > 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}, but must be one number, of shape ()")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}, but must be > 0")
    whole = torch.stack([num_tokens, torch.zeros_like(num_tokens) if num_dual_clipped is None else num_dual_clipped])
    if group is not None and group.size() > 1:
        dist.all_reduce(whole, group=group)
    kept = whole[1] <= MAX_DUAL_CLIPPED
    factors = kept.double()
    if loss_agg == "seq-mean-token-mean":
        factors = factors / whole[0].clamp(min=1)
    elif loss_agg == "seq-mean-token-sum-norm":
        assert max_response_len is not None
        factors = factors / max_response_len
    if loss_agg == "token-mean":
        count, whole_count = (num_tokens * kept).sum(), (whole[0] * kept).sum()
    else:
        whole_count = num_tokens.new_tensor(in_tensors if num_sequences is None else num_sequences)
        is_first = group is None or group.size() == 1 or group.rank() == 0
        count = whole_count if is_first else torch.zeros_like(whole_count)
    return Normaliser(factors, kept, count, whole_count.clamp(min=1) if denominator is None else denominator)


def count_per_sequence(flags: Tensor, offsets: Tensor) -> Tensor:
    """How many of flags [T] bool are set in each sequence: [num_seqs] int64. Integer sums: exact in any order."""
    running = torch.nn.functional.pad(flags.long().cumsum(0), (1, 0))
    return running[offsets].diff()


def spread_to_tokens(values: Tensor, offsets: Tensor) -> Tensor:
    """values [num_seqs] repeated for every token of its sequence: [T]."""
    return values.repeat_interleave(offsets.diff())
