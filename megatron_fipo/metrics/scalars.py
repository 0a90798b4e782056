"""TensorBoard: a run's numbers under their own names, steps and updates as two runs since their x axes differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

UPDATES_DIR = "updates"


class Scalars:
    """Writers of per-step scalars (`directory`) and per-update ones (`directory`/updates).

    On resume TensorBoard is told to forget what came after step `resume_step` and after `num_updates` updates.
    """

    def __init__(self, directory: Path, *, resume_step: int | None, num_updates: int) -> None:
        resumed = resume_step is not None
        self._steps = SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)
        self._updates = SummaryWriter(str(directory / UPDATES_DIR), purge_step=num_updates + 1 if resumed else None)

    def add(self, record: Mapping[str, Any], step: int) -> None:
        """Every plain number of a step's record; lists and mappings are for the JSON file alone."""
        _add(self._steps, record, step)

    def add_update(self, record: Mapping[str, Any], update: int) -> None:
        """Every plain number of one optimizer update, at the update's number counted from 1."""
        _add(self._updates, record, update)

    def add_texts(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Sampled texts, as indented JSON."""
        for index, sample in enumerate(samples):
            text = json.dumps(sample, indent=2, ensure_ascii=False)
            # Markdown shows an indented block as it is
            self._steps.add_text(f"samples/{index}", "\n".join("    " + line for line in text.splitlines()), step)
        self._steps.flush()

    def close(self) -> None:
        """Flush and close both writers."""
        self._steps.close()
        self._updates.close()


def _add(writer: SummaryWriter, record: Mapping[str, Any], step: int) -> None:
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)):
            writer.add_scalar(key, value, step)
    writer.flush()
