"""Weights & Biases beside TensorBoard, for who asks for it (--wandb-project). The package is imported only then.

What W&B shows is a copy: metrics.jsonl holds everything. So a run that W&B refuses at its start stops there, in time to
be corrected, and one that loses W&B later goes on without it and says so once. A network that is down is neither:
the wandb package keeps what it could not send and sends it later. WANDB_MODE=offline and the other variables of the
package hold.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.metrics.histograms import SUFFIX, Histogram, histogram_of

ID_FILE = "wandb_id"  # in the run's directory; a resumed run goes on under the same id
UPDATES = "updates/"


def import_wandb(project: str) -> Any:
    """The package. Raises ValueError naming the flag when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise ValueError(
            f"--wandb-project is {project!r}, but the package wandb is not installed: pip install wandb"
        ) from None


class WandbLog:
    """One run at W&B: steps and evaluations over `step`, updates (as updates/NAME) over `update`.

    `module` is the wandb package. W&B cannot forget what a dead run logged after `resume_step`: those steps appear
    twice. `say` gets the message when W&B fails. Raises ValueError when W&B does not take the run.
    """

    def __init__(
        self,
        module: Any,
        run_dir: Path,
        *,
        project: str,
        name: str | None,
        resume_step: int | None,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._module = module
        self._say = say
        self._failures: tuple[type[Exception], ...] = (module.Error, OSError)  # OSError: its helper process is gone
        self._defined: set[str] = {"step", "update"}
        try:
            self._run: Any = module.init(
                project=project,
                name=name or run_dir.resolve().name,
                id=_run_id(run_dir / ID_FILE, is_fresh=resume_step is None),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=module.Settings(console="off"),  # the live display owns the terminal
            )
            for axis in ("step", "update"):
                self._run.define_metric(axis)
        except self._failures as error:
            raise ValueError(
                f"--wandb-project is {project!r}, but Weights & Biases does not take the run: {error} "
                "(WANDB_MODE=offline logs to the run's directory)"
            ) from error

    def add(self, record: Mapping[str, Any], step: int, histograms: Mapping[str, Histogram] | None = None) -> None:
        """The numbers and histograms of a step or of an evaluation."""
        self._log("step", step, self._values(record) | self._pictures(histograms or {}))

    def add_update(self, record: Mapping[str, Any], update: int) -> None:
        """The numbers and histograms of one optimizer update, at its number counted from 1."""
        values = self._values(record)
        self._log("update", update, {UPDATES + name: value for name, value in values.items()})

    def close(self, *, succeeded: bool) -> None:
        """Tell W&B that the run is over, and how it ended; waits until what can be sent is sent."""
        self._attempt(lambda: self._run.finish(exit_code=0 if succeeded else 1))
        self._run = None

    def _log(self, axis: str, position: int, values: dict[str, Any]) -> None:
        def log() -> None:
            for name in values.keys() - self._defined:
                self._run.define_metric(name, step_metric=axis)
            self._defined |= values.keys()
            self._run.log({axis: position, **values})

        self._attempt(log)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            act()
        except self._failures as error:
            self._run = None
            self._say(f"Weights & Biases failed, and this run logs no more to it: {type(error).__name__}: {error}")

    def _values(self, record: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
        found = {
            name.removesuffix(SUFFIX): histogram_of(name, value)
            for name, value in record.items()
            if isinstance(value, Mapping) and name.endswith(SUFFIX)
        }
        return numbers | self._pictures({name: each for name, each in found.items() if each is not None})

    def _pictures(self, histograms: Mapping[str, Histogram]) -> dict[str, Any]:
        return {
            f"histograms/{name}": self._module.Histogram(np_histogram=(list(each.counts), list(each.edges)))
            for name, each in histograms.items()
        }


def _run_id(path: Path, *, is_fresh: bool) -> str:
    """The id of a resumed run, or a new one written down for the next resume."""
    if not is_fresh and path.exists():
        return path.read_text(encoding="utf-8").strip()
    new = secrets.token_hex(8)
    path.write_text(new + "\n", encoding="utf-8")
    return new
