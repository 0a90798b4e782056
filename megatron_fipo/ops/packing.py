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


def shared_micro_batches(sequences: Sequence[TrainSequence], max_tokens: int) -> list[list[int]]:
    """`micro_batches` that keeps neighbours with the same prompt together, whose prompt is then computed once.

    A run of neighbours is cut where it would exceed `max_tokens` rows.
    """
    chunks: list[list[int]] = []
    costs: list[int] = []
    previous = b""
    for index, sequence in enumerate(sequences):
        key, length, prompt = _prompt_key(sequence), len(sequence.token_ids), _prompt_length(sequence)
        if chunks and key == previous and costs[-1] + length - prompt <= max_tokens:
            chunks[-1].append(index)
            costs[-1] += length - prompt
        else:
            chunks.append([index])
            costs.append(length)
        previous = key
    return [[i for chunk in batch for i in chunks[chunk]] for batch in micro_batches(costs, max_tokens)]


def pack(
    sequences: Sequence[TrainSequence],
    members: Sequence[int],
    *,
    old_logprobs: Sequence[Tensor] | None = None,
    share_prompts: bool = False,
    multiple_of: int = 1,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay `sequences[i] for i in members` end to end; with `share_prompts`, equal prompts are one stretch of rows.

    `old_logprobs[i]` is [L_i] fp32. A dummy sequence of mask 0 is appended when the rows are not a `multiple_of`.
    """
    chosen = [sequences[i] for i in members]
    rows, sources, positions = _rows(chosen, share_prompts)
    padding = -len(sources) % multiple_of
    num_tokens = len(rows)
    rows = np.append(rows, len(sources) + np.arange(padding))
    sources = np.append(sources, num_tokens + np.arange(padding))
    positions = np.append(positions, np.arange(padding))
    lengths = [len(sequence.token_ids) for sequence in chosen] + ([padding] if padding else [])

    def joined(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        flat = np.concatenate([*arrays, np.zeros(padding, dtype=arrays[0].dtype)])
        return torch.from_numpy(flat).to(device=device, dtype=dtype)

    token_ids = joined([s.token_ids for s in chosen], torch.int64)
    sources_tensor = torch.from_numpy(sources).to(device)
    return PackedBatch(
        token_ids=token_ids[sources_tensor],
        position_ids=torch.from_numpy(positions).to(device),
        rows=torch.from_numpy(rows).to(device),
        positions_of_rows=sources_tensor,
        labels=joined([np.append(s.token_ids[1:], 0) for s in chosen], torch.int64),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device),
        loss_mask=joined([s.loss_mask for s in chosen], torch.bool),
        advantages=joined([s.advantages for s in chosen], torch.float32),
        rollout_logprobs=joined([s.rollout_logprobs for s in chosen], torch.float32),
        old_logprobs=None
        if old_logprobs is None
        else torch.cat([*(old_logprobs[i].to(device) for i in members), torch.zeros(padding, device=device)]),
        members=tuple(members),
    )


def _rows(sequences: Sequence[TrainSequence], share_prompts: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of every token [T], a token of every row [S], position of every row [S])."""
    rows: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    prompt_rows: dict[bytes, np.ndarray] = {}
    num_tokens = num_rows = 0
    for sequence in sequences:
        length, prompt = len(sequence.token_ids), _prompt_length(sequence)
        key = _prompt_key(sequence)
        shared = prompt_rows[key] if share_prompts and key in prompt_rows else np.zeros(0, dtype=np.int64)
        own = np.arange(len(shared), length)
        mine = np.append(shared, num_rows + np.arange(len(own)))
        prompt_rows[key] = mine[:prompt]
        rows.append(mine)
        sources.append(num_tokens + own)
        positions.append(own)
        num_tokens += length
        num_rows += len(own)
    return np.concatenate(rows), np.concatenate(sources), np.concatenate(positions)


def _prompt_length(sequence: TrainSequence) -> int:
    """Tokens before the first that is trained on; entry i of the mask is about token i + 1."""
    return int(sequence.loss_mask.argmax()) + 1 if sequence.loss_mask.any() else len(sequence.token_ids)


def _prompt_key(sequence: TrainSequence) -> bytes:
    return sequence.token_ids[: _prompt_length(sequence)].tobytes()
