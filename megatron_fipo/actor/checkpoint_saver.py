"""Checkpoints of a run as it goes on: when they are written and which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import save_checkpoint


class CheckpointSaver:
    """Writes the checkpoints of one run to `root`."""

    def __init__(
        self,
        actor: Actor,
        root: str,
        *,
        is_async: bool,
        keep_last: int | None,
        keep_best: int,
        say: Callable[[str], None],
    ) -> None:
        self._actor, self._root = actor, root

    def save(self, step: int, trainer_state: Mapping[str, Any] | None, *, score: float | None = None) -> None:
        """Save the state after `step` steps. Collective over all ranks."""
        save_checkpoint(self._actor, self._root, step, trainer_state)

    def poll(self) -> Path | None:
        """Commit what has been written meanwhile. Collective over all ranks."""
        return None

    def finish(self) -> None:
        """Wait for what is being written, and commit it. Collective over all ranks."""

    def close(self) -> None:
        """Abandon what is being written."""
