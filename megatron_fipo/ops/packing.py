"""From sequences to packed micro-batches: a token budget, no padding. Deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.ops.balance import balanced_partition
from megatron_fipo.ops.zigzag import zigzag_indices
from megatron_fipo.types import PackedBatch, TrainSequence


def micro_batches(costs: Sequence[int], max_tokens: int, *, at_least: int = 1) -> list[list[int]]:
    """Split sequences into the fewest balanced micro-batches found, `at_least` that many, each within `max_tokens`.

    Where `at_least` exceeds the number of sequences, empty micro-batches make it up. Raises ValueError for a sequence
    that alone exceeds the budget.
    """
    if not costs:
        raise ValueError("no sequences to make micro-batches of")
    if max(costs) > max_tokens:
        raise ValueError(
            f"--max-tokens-per-micro-batch is {max_tokens}, but must be at least {max(costs)}, the longest sequence"
        )
    fewest = max(-(-sum(costs) // max_tokens), min(at_least, len(costs)))
    for num_batches in range(fewest, len(costs) + 1):
        batches = balanced_partition(costs, num_batches)
        if all(sum(costs[i] for i in batch) <= max_tokens for batch in batches):
            return batches + [[] for _ in range(at_least - num_batches)]
    raise AssertionError("one sequence per micro-batch always fits")


def shared_micro_batches(sequences: Sequence[TrainSequence], max_tokens: int, *, at_least: int = 1) -> list[list[int]]:
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
    return [
        [i for chunk in batch for i in chunks[chunk]] for batch in micro_batches(costs, max_tokens, at_least=at_least)
    ]


def padded_length(length: int, cp_size: int) -> int:
    """What a sequence of `length` tokens takes up when context parallelism cuts it into 2 cp_size equal pieces."""
    return length if cp_size == 1 else -(-length // (2 * cp_size)) * 2 * cp_size


def pack(
    sequences: Sequence[TrainSequence],
    members: Sequence[int],
    *,
    old_logprobs: Sequence[Tensor] | None = None,
    reference_logprobs: Sequence[Tensor] | None = None,
    share_prompts: bool = False,
    multiple_of: int = 1,
    cp_size: int = 1,
    cp_rank: int = 0,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay `sequences[i] for i in members` end to end; with `share_prompts`, equal prompts are one stretch of rows.

    `old_logprobs[i]` and `reference_logprobs[i]` are [L_i] fp32. A dummy sequence of mask 0 is appended when this
    rank's rows are not a `multiple_of`, or when there are no members. With `cp_size` > 1 the result is the share of
    `cp_rank`; prompts are then not shared.
    """
    assert not (share_prompts and cp_size > 1), "a shared prompt cannot be cut into several sequences' pieces"
    chosen = [sequences[i] for i in members]
    lengths = [padded_length(len(sequence.token_ids), cp_size) for sequence in chosen]
    rows, sources, positions = _rows(chosen, lengths, share_prompts)
    dummy = _dummy_length(len(sources), cp_size, multiple_of)
    lengths += [dummy] if dummy else []
    rows = np.append(rows, len(sources) + np.arange(dummy))
    sources = np.append(sources, sum(lengths) - dummy + np.arange(dummy))
    positions = np.append(positions, np.arange(dummy))
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    share = zigzag_indices(cu_seqlens, cp_size, cp_rank)

    def joined(arrays: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        whole = np.zeros(sum(lengths), dtype=arrays[0].dtype if arrays else np.int64)
        for start, array in zip(cu_seqlens.tolist(), arrays):
            whole[start : start + len(array)] = array
        return torch.from_numpy(whole)[share].to(device=device, dtype=dtype)

    def joined_logprobs(logprobs: Sequence[Tensor] | None) -> Tensor | None:
        return None if logprobs is None else joined([logprobs[i].cpu().numpy() for i in members], torch.float32)

    if cp_size > 1:  # rows are tokens: the share of the one is the share of the other
        positions, rows = positions[share.numpy()], np.arange(len(share))
        token_ids, sources = joined([s.token_ids for s in chosen], torch.int64), rows
    else:
        token_ids = joined([s.token_ids for s in chosen], torch.int64)[torch.from_numpy(sources).to(device)]
    return PackedBatch(
        token_ids=token_ids,
        position_ids=torch.from_numpy(positions).to(device),
        rows=torch.from_numpy(rows).to(device),
        positions_of_rows=torch.from_numpy(sources).to(device),
        labels=joined([s.token_ids[1:] for s in chosen], torch.int64),
        cu_seqlens=cu_seqlens.to(device),
        loss_mask=joined([s.loss_mask for s in chosen], torch.bool),
        advantages=joined([s.advantages for s in chosen], torch.float32),
        rollout_logprobs=joined([s.rollout_logprobs for s in chosen], torch.float32),
        old_logprobs=joined_logprobs(old_logprobs),
        reference_logprobs=joined_logprobs(reference_logprobs),
        members=tuple(members),
    )


def _dummy_length(num_rows: int, cp_size: int, multiple_of: int) -> int:
    """Tokens of the dummy sequence that makes a rank's rows a multiple; at least one row when there are none."""
    unit = 1 if cp_size == 1 else 2 * cp_size
    dummy = 0 if num_rows else unit
    for _ in range(multiple_of):
        if (num_rows + dummy) // cp_size % multiple_of == 0:
            return dummy
        dummy += unit
    raise AssertionError(f"{num_rows} rows over {cp_size} ranks cannot become a multiple of {multiple_of}")


def _rows(
    sequences: Sequence[TrainSequence], lengths: Sequence[int], share_prompts: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of every token [T], a token of every row [S], position of every row [S]), sequences padded to `lengths`."""
    rows = [np.zeros(0, dtype=np.int64)]
    sources, positions = rows.copy(), rows.copy()
    prompt_rows: dict[bytes, np.ndarray] = {}
    num_tokens = num_rows = 0
    for sequence, length in zip(sequences, lengths):
        prompt, key = _prompt_length(sequence), _prompt_key(sequence)
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
