"""What the tests of an error on one rank alone run on two ranks: turns and saves in which rank 1 has no memory left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups
from checkpoint_on_ranks import train_steps
from fake_pool import FakeActor, FakeOffloader, FakePool, sums

from megatron_fipo.actor import checkpoint, optimizer_shards
from megatron_fipo.actor.checkpoint import save_checkpoint
from megatron_fipo.actor.checkpoint_writing import _SnapshotWriter
from megatron_fipo.hybrid import node_engines, turns
from megatron_fipo.hybrid.turns import HybridEngine

TURNS: dict[str, tuple[str, int]] = {  # what fails on rank 1: the move, and the how manieth time it is made
    "gradients leave in a sync": ("leave", 1),
    "parameters leave in a sync": ("leave", 2),
    "everything comes back to train": ("enter", 2),
    "parameters come back in a sync": ("enter", 3),
    "parameters come back to save": ("enter", 4),
    "parameters leave after a save": ("leave", 5),
}


class FailingOffloader(FakeOffloader):
    """Has no memory at the `number`-th call of `move`."""

    def __init__(self, diary: list[Any], move: str, number: int) -> None:
        super().__init__(diary)
        self._move, self._left = move, number

    def leave(self, *parts: str) -> None:
        self._count("leave")
        super().leave(*parts)

    def enter(self, *parts: str) -> None:
        self._count("enter")
        super().enter(*parts)

    def _count(self, move: str) -> None:
        self._left -= move == self._move
        if self._left == 0 and move == self._move:
            raise MemoryError(f"no memory to {move}")


def turns_that_fail() -> dict[str, Any]:
    """In each case, what this rank's turns ended with, how far they got and when; and one that does not fail."""
    node_engines.expected_checksums = sums
    found = {}
    for name, (move, number) in {**TURNS, "nothing": ("enter", 0)}.items():
        rank, diary = dist.get_rank(), []
        offloader = FailingOffloader(diary, move, number if rank == 1 else 0)
        turns.Offloader = lambda *_, offloader=offloader: offloader
        actor = FakeActor(diary, rank, tp=2)
        actor.groups = SimpleNamespace(control=dist.group.WORLD)
        pool = FakePool(diary) if rank == 0 else None
        engine = HybridEngine(actor, pool, bucket_bytes=1 << 20, offload_trainer=True, say=diary.append)
        reached: list[str] = []

        def take_turns(engine: HybridEngine = engine, reached: list[str] = reached) -> None:
            engine.sync_weights(0)
            engine.start_training()
            reached.append("training")
            engine.sync_weights(1)
            with engine.actor_at_work():
                reached.append("saving")
            reached.append("saved")

        began = time.monotonic()
        error = error_of(take_turns)
        found[name] = {"error": error, "state": engine.state, "reached": reached, "s": time.monotonic() - began}
        dist.barrier()
    return found


def error_inside() -> dict[str, Any]:
    """Rank 1 fails at its work while rank 0 still waits for it at its own, and hears of it only when rank 1 is gone."""
    node_engines.expected_checksums = sums
    rank, diary = dist.get_rank(), []
    turns.Offloader = lambda *_: FakeOffloader(diary)
    actor = FakeActor(diary, rank, tp=2)
    actor.groups = SimpleNamespace(control=dist.new_group())
    engine = HybridEngine(actor, FakePool(diary) if rank == 0 else None, bucket_bytes=1 << 20, offload_trainer=True)
    engine.sync_weights(0)

    def work() -> None:
        with engine.actor_at_work():
            if rank == 1:
                raise OSError("the disk is full")
            dist.barrier()  # until rank 1 is out
            raise ConnectionError("rank 1 is gone")

    began = time.monotonic()
    error = error_of(work)
    if rank == 1:
        dist.barrier()
    return {"error": error, "state": engine.state, "s": time.monotonic() - began}


def saves_that_fail(model_dir: str, root: str) -> dict[str, Any]:
    """A save in which rank 1 has no memory for a part of its snapshot, for each part; and one that succeeds."""
    actor = make_actor(model_dir, *make_groups(tp=2))
    train_steps(actor, range(1))
    found = {}
    for name, (holder, attribute) in {
        "for moments": (checkpoint, "_begin_optimizer_state"),
        "for its share of the optimizer's state": (optimizer_shards, "_own_states"),
        "for a copy": (_SnapshotWriter, "_copied"),
    }.items():
        before = getattr(holder, attribute)
        if dist.get_rank() == 1:
            setattr(holder, attribute, out_of_memory)
        began = time.monotonic()
        error = error_of(lambda: save_checkpoint(actor, root, 1, {}))
        found[name] = {"error": error, "s": time.monotonic() - began}
        setattr(holder, attribute, before)
        dist.barrier()
    save_checkpoint(actor, root, 1, {})
    found["left"] = sorted(path.name for path in Path(root).iterdir())
    return found


def out_of_memory(*_: Any) -> None:
    raise MemoryError("no memory for it")


def error_of(function: Callable[[], object]) -> str | None:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
