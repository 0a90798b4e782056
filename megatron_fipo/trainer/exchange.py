"""Rank 0 drives rollouts; these are the ways its work and its errors reach the other ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_fipo.interruption import Signals
from megatron_fipo.ops.balance import balanced_partition, sequence_flops
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import TrainSequence

T = TypeVar("T")


class RankZeroFailed(RuntimeError):
    """What the other ranks raise when rank 0's part of a stage failed; rank 0 raises the real error."""


class StopRequested(Exception):
    """A signal asks the run to end; what was under way is abandoned. Raised on every rank."""


@dataclass(frozen=True, eq=False)
class RankZero:
    """Runs rank 0's part of a stage while the other ranks wait for it.

    `together` are functions of all ranks that rank 0 may call for in the middle of its part, with `call`; those of
    `after_failure` all ranks call when its part failed, before they raise.
    `signals` are those of this rank; the other ranks' hear of one that ended rank 0's part.
    """

    layout: ParallelLayout
    control: dist.ProcessGroup
    signals: Signals = field(default_factory=Signals)
    together: dict[str, Callable[[], None]] = field(default_factory=dict)
    after_failure: list[Callable[[], None]] = field(default_factory=list)

    def run(self, function: Callable[[], T], *, interruptible: bool = False) -> T | None:
        """Run `function` on rank 0 while the others wait; its result on rank 0, None elsewhere.

        Whatever it raises is raised on rank 0, and RankZeroFailed on every other rank, so that nobody waits for ever.
        KeyboardInterrupt is raised on every rank; with `interruptible` a signal to rank 0 may do that, and
        StopRequested takes its place. Collective.
        """
        result: T | None = None
        error: BaseException | None = None
        if self.layout.rank == 0:
            try:
                with self.signals.interruptible() if interruptible else nullcontext():
                    result = function()
            except BaseException as raised:
                error = raised
        if isinstance(error, KeyboardInterrupt):
            self.signals.hear_of(signal.SIGINT)  # where no signal did that, but a user's function
            error = StopRequested() if interruptible else error
        kind, text = self._agreed(self._ending_of(error))
        if kind in ("failed", "interrupted"):
            for collective in self.after_failure:
                collective()
        if error is not None:
            raise error
        if kind in ("stop", "interrupted"):
            self.signals.hear_of(int(text))
            raise StopRequested if kind == "stop" else KeyboardInterrupt
        if kind == "failed":
            raise RankZeroFailed(f"rank 0 failed: {text}")
        return result

    def call(self, name: str) -> None:
        """Have every rank call `together[name]`; only for rank 0, and only inside `run`. No signal interrupts it."""
        assert self.layout.rank == 0, "only rank 0 calls for the others"
        with self.signals.deferred():
            self._broadcast(("call", name))
            self.together[name]()

    def _agreed(self, mine: tuple[str, str] | None) -> tuple[str, str]:
        """What rank 0's part came to. The other ranks meanwhile do what it calls for."""
        while True:
            kind, text = self._broadcast(mine)
            if kind != "call":
                return kind, text
            self.together[text]()

    def _broadcast(self, message: tuple[str, str] | None) -> tuple[str, str]:
        box: list[Any] = [message]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def _ending_of(self, error: BaseException | None) -> tuple[str, str]:
        if error is None:
            return "done", ""
        if isinstance(error, StopRequested | KeyboardInterrupt):
            return "stop" if isinstance(error, StopRequested) else "interrupted", str(self.signals.first)
        return "failed", f"{type(error).__name__}: {error}"


def largest(value: int, control: dist.ProcessGroup) -> int:
    """The largest `value` of all ranks. Collective over `control`."""
    found = torch.tensor(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=control)
    return int(found)


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
