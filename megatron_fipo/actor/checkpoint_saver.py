"""When checkpoints are written, committed and removed: at once, or beside the training that goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import begin_together, commit_together, save_checkpoint, snapshot_of
from megatron_fipo.actor.checkpoint_files import CheckpointError, agreed, remove
from megatron_fipo.actor.checkpoint_reading import reason
from megatron_fipo.actor.checkpoint_writing import Snapshot, Written, write
from megatron_fipo.actor.retention import NO_SCORES, retire

T = TypeVar("T")


class CheckpointSaver:
    """Writes the actor's checkpoints under `root`, one at a time.

    With `is_async` a save returns as soon as this rank's state is copied; a thread, which takes part in no collective,
    writes and flushes the copy. The checkpoint is committed, and `root/latest` moved, by the first `poll`, `save` or
    `finish` after all ranks have written. Without, `save` does all of it.

    `keep_last` (None: all) newest checkpoints are kept, and the `keep_best` with the highest scores; `scores`, which
    may grow meanwhile, has those of steps that were evaluated after they were saved. `say` is told, on rank 0, of what
    could not be removed: that ends no run.
    """

    def __init__(
        self,
        actor: Actor,
        root: str | Path,
        *,
        is_async: bool = False,
        keep_last: int | None = None,
        keep_best: int = 0,
        scores: Mapping[int, float] = NO_SCORES,
        say: Callable[[str], None],
    ) -> None:
        self._actor = actor
        self._root = Path(root)
        self._is_async = is_async
        self._keep_last, self._keep_best, self._scores = keep_last, keep_best, scores
        self._say = say
        self._abandoned = threading.Event()
        self._pending: _Pending | None = None
        self._removal: _Background[None] | None = None

    def save(self, step: int, trainer_state: Mapping[str, Any] | None, *, score: float | None = None) -> None:
        """Save the state after `step` finished steps; one still being written is waited for and committed first.

        `trainer_state` (rank 0; JSON) is everything outside Megatron: data position and surplus groups. Raises
        CheckpointError on every rank when one cannot write, also what an earlier asynchronous save left to be said;
        `latest` then names the checkpoint it named before. Collective over all ranks.
        """
        self.finish()
        if not self._is_async:
            self._retire(save_checkpoint(self._actor, self._root, step, trainer_state, score=score))
            return
        aside = begin_together(self._root, step, self._actor.groups.control)
        snapshot = snapshot_of(self._actor, step, trainer_state, score)

        def work() -> Written:
            return write(snapshot, aside, self._abandoned)

        self._pending = _Pending(aside, snapshot, _Background(work))

    def poll(self) -> Path | None:
        """Commit the save being written if all ranks have written it; its directory, or None while there is nothing to
        commit. Raises CheckpointError on every rank when one could not write. Quick; collective over all ranks."""
        if self._pending is None:
            return None
        done = torch.tensor([self._pending.writing.is_done()], dtype=torch.int32)
        dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self._actor.groups.control)
        return self._commit() if done.item() else None

    def finish(self) -> Path | None:
        """Wait for the save being written, and commit it; its directory, or None when there is none. What it makes
        needless is gone afterwards. Raises CheckpointError on every rank when one could not write. Collective over all
        ranks."""
        directory = None if self._pending is None else self._commit()
        self._wait_for_removal()
        return directory

    def close(self) -> None:
        """Give up what is being written and end the thread. What is left aside is removed by the next save. This rank
        alone."""
        self._abandoned.set()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.writing.wait()
        if self._removal is not None:
            self._removal.wait()

    def _commit(self) -> Path:
        """Everything that is left to do once this rank's part is written. Collective."""
        assert self._pending is not None, "there is something to commit"
        pending, self._pending = self._pending, None
        control = self._actor.groups.control
        everywhere = agreed(pending.writing.result, control)
        directory = commit_together(pending.aside, pending.snapshot, everywhere, control)
        self._retire(directory)
        return directory

    def _retire(self, current: Path) -> None:
        """Rank 0 removes what need not be kept: the names now, the files in the background of an asynchronous saver."""
        if self._actor.groups.control.rank() != 0:
            return
        self._wait_for_removal()
        try:
            retired = retire(current, keep_last=self._keep_last, keep_best=self._keep_best, scores=self._scores)
        except CheckpointError as error:
            self._say(f"WARNING: {current} is saved, but an old checkpoint stays: {error}")
            return

        def remove_all() -> None:
            for directory in retired:
                remove(directory)

        if retired:
            self._removal = _Background(remove_all)
        if not self._is_async:
            self._wait_for_removal()

    def _wait_for_removal(self) -> None:
        removal, self._removal = self._removal, None
        if removal is not None:
            try:
                removal.result()
            except OSError as error:
                self._say(f"WARNING: an old checkpoint's files stay until the next save: {reason(error)}")


class _Background(Generic[T]):
    """One call on a thread of its own, and what came of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> T:
        """Wait; then what the call returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._function())
        except BaseException as error:
            self._error = error


@dataclass(frozen=True)
class _Pending:
    """A save that is being written, and not committed yet."""

    aside: Path
    snapshot: Snapshot
    writing: _Background[Written]
