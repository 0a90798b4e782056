"""Rank 0 drives rollouts; these are the ways its work and its errors reach the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fipo.ops.balance import balanced_partition, sequence_flops
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import TrainSequence

T = TypeVar("T")


class RankZeroFailed(RuntimeError):
    """What the other ranks raise when rank 0's part of a stage failed; rank 0 raises the real error."""


def on_rank_zero(function: Callable[[], T], layout: ParallelLayout, control: dist.ProcessGroup) -> T | None:
    """Run `function` on rank 0 while the others wait; its result on rank 0, None elsewhere.

    Whatever it raises is raised on rank 0, and RankZeroFailed on every other rank, so that nobody waits for ever.
    Collective over `control` (all ranks).
    """
    result: T | None = None
    error: BaseException | None = None
    if layout.rank == 0:
        try:
            result = function()
        except BaseException as raised:
            error = raised
    status = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(status, src=0, group=control)
    if error is not None:
        raise error
    if status[0] is not None:
        raise RankZeroFailed(f"rank 0 failed: {status[0]}")
    return result


def shares_of(
    sequences: Sequence[TrainSequence], num_updates: int, layout: ParallelLayout, hidden_size: int
) -> list[list[list[TrainSequence]]]:
    """[dp rank][update] -> that rank's sequences of that update.

    The batch is cut into `num_updates` equal mini-batches in order; inside each, the FLOPs that a model of
    `hidden_size` needs are balanced over the data-parallel ranks. Which rank a sequence goes to changes no result, the
    loss being a global sum.
    """
    size = len(sequences) // num_updates
    assert size * num_updates == len(sequences), (len(sequences), num_updates)
    shares: list[list[list[TrainSequence]]] = [[] for _ in range(layout.dp)]
    for start in range(0, len(sequences), size):
        mini_batch = sequences[start : start + size]
        costs = [sequence_flops(len(sequence.token_ids), hidden_size) for sequence in mini_batch]
        for rank, members in enumerate(balanced_partition(costs, layout.dp)):
            shares[rank].append([mini_batch[i] for i in members])
    return shares


def scatter_shares(
    sequences: Sequence[TrainSequence] | None,
    num_updates: int,
    layout: ParallelLayout,
    control: dist.ProcessGroup,
    hidden_size: int,
) -> list[list[TrainSequence]]:
    """Hand every rank its data-parallel share, by update. `sequences` is the whole batch on rank 0, None elsewhere."""
    everyone: list[Any] | None = None
    if layout.rank == 0:
        assert sequences is not None
        shares = shares_of(sequences, num_updates, layout, hidden_size)
        everyone = [shares[layout.dp_rank_of(rank)] for rank in range(layout.world_size)]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, everyone, src=0, group=control)
    return mine[0]


def gather_to_rank_zero(value: T, layout: ParallelLayout, control: dist.ProcessGroup) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None elsewhere."""
    values: list[Any] | None = [None] * layout.world_size if layout.rank == 0 else None
    dist.gather_object(value, values, dst=0, group=control)
    return values
