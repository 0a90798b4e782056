"""From sequences to packed micro-batches: balanced shares, a token budget, no padding. Deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.types import PackedBatch, TrainSequence


def balanced_shares(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split items into `num_shares` lists of indices with nearly equal total cost: largest first to the lightest share.

    Every share gets at least one item; each list is in ascending order. Raises ValueError with fewer items than shares.
    """
    if len(costs) < num_shares:
        raise ValueError(f"{len(costs)} sequences cannot be shared by {num_shares} ranks: every rank needs one")
    totals = [0] * num_shares
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        # an empty share comes before any other, so that none stays empty even when costs are zero
        lightest = min(range(num_shares), key=lambda s: (bool(shares[s]), totals[s], s))
        shares[lightest].append(index)
        totals[lightest] += costs[index]
    return [sorted(share) for share in shares]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequences into the fewest balanced micro-batches found whose tokens stay within `max_tokens`.

    Raises ValueError for a sequence that alone exceeds the budget.
    """
    if not lengths:
        raise ValueError("no sequences to make micro-batches of")
    if max(lengths) > max_tokens:
        raise ValueError(
            f"--max-tokens-per-micro-batch is {max_tokens}, but must be at least {max(lengths)}, the longest sequence"
        )
    for num_batches in range(-(-sum(lengths) // max_tokens), len(lengths) + 1):
        batches = balanced_shares(lengths, num_batches)
        if all(sum(lengths[i] for i in batch) <= max_tokens for batch in batches):
            return batches
    raise AssertionError("one sequence per micro-batch always fits")


def pack(
    sequences: Sequence[TrainSequence],
    members: Sequence[int],
    *,
    old_logprobs: Sequence[Tensor] | None = None,
    multiple_of: int = 1,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay `sequences[i] for i in members` end to end.

    `old_logprobs[i]` is [L_i] fp32. A dummy sequence of mask 0 is appended when the total is not a `multiple_of`.
    """
    chosen = [sequences[i] for i in members]
    lengths = [len(sequence.token_ids) for sequence in chosen]
    padding = -sum(lengths) % multiple_of
    tail = [padding] if padding else []

    def joined(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        flat = np.concatenate([*arrays, np.zeros(padding, dtype=arrays[0].dtype)])
        return torch.from_numpy(flat).to(device=device, dtype=dtype)

    return PackedBatch(
        token_ids=joined([s.token_ids for s in chosen], torch.int64),
        labels=joined([np.append(s.token_ids[1:], 0) for s in chosen], torch.int64),
        position_ids=torch.cat([torch.arange(n, device=device) for n in [*lengths, *tail]]),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths, *tail]), dtype=torch.int32, device=device),
        loss_mask=joined([s.loss_mask for s in chosen], torch.bool),
        advantages=joined([s.advantages for s in chosen], torch.float32),
        rollout_logprobs=joined([s.rollout_logprobs for s in chosen], torch.float32),
        old_logprobs=None
        if old_logprobs is None
        else torch.cat([*(old_logprobs[i].to(device) for i in members), torch.zeros(padding, device=device)]),
        members=tuple(members),
    )
