"""The log of a run: metrics.jsonl, evaluations, sampled texts, TensorBoard, the live display, the curves at the end.

A run directory holds metrics.jsonl (one object per step), evaluations.jsonl (one per evaluation), samples.jsonl (one
per sampled text), config.json (the settings of the latest start), tensorboard/ (per step; per update in
tensorboard/updates), curves.png, and with Weights & Biases wandb/ and wandb_id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_fipo.metrics.curves import draw_curves
from megatron_fipo.metrics.display import Display, Progress, open_display
from megatron_fipo.metrics.histograms import histogram_of
from megatron_fipo.metrics.records import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    append_record,
    open_records,
    plain,
    read_metrics,
)
from megatron_fipo.metrics.tensorboard_log import TensorBoardLog
from megatron_fipo.metrics.timings import StageClock, timings_table
from megatron_fipo.metrics.wandb_log import WandbLog, import_wandb

CONFIG_FILE = "config.json"
CURVES_FILE = "curves.png"
HISTOGRAMS = "histograms"  # of a step's metrics: not for metrics.jsonl

# metric, the count it divides, the stages whose seconds it divides by
_SPEEDS = (
    ("tokens_per_s", "num_tokens", ("step",)),
    ("rollout_tokens_per_s", "num_generated_tokens", ("rollout",)),
    ("train_tokens_per_s", "num_tokens", ("logprobs", "update")),
)


class RunLogger:
    """Rank 0's log of a run; on other ranks every method does nothing (stages are timed all the same).

    `resume_step` None starts a fresh run, and k continues one after step k and `num_updates` updates: whatever a later,
    dead run wrote after step k is dropped. `total_steps` is the last step's number; `influence_bounds` are drawn into
    the curves.
    `config` (setting -> value, of JSON's types) and `config_text` (the same, to be read) go into config.json,
    TensorBoard and W&B. `wandb_project` logs to Weights & Biases too; `wandb_module` stands in for the package.
    Raises ValueError when a fresh run's directory already holds one, a record file is damaged, or W&B is not there.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        rank: int = 0,
        resume_step: int | None = None,
        num_updates: int = 0,
        tensorboard_dir: str | Path | None = None,
        influence_bounds: tuple[float, float] | None = None,
        config: Mapping[str, Any] | None = None,
        config_text: str = "",
        wandb_project: str | None = None,
        wandb_exp_name: str | None = None,
        wandb_module: Any = None,
    ) -> None:
        self._clock = StageClock()
        self._run_dir = Path(run_dir)
        self._influence_bounds = influence_bounds
        self._step = resume_step or 0
        self.num_updates = num_updates  # logged so far, by this run and those that it continues
        self._files: dict[str, IO[str]] = {}
        self._display: Display | None = None
        self._tensorboard: TensorBoardLog | None = None
        self._wandb: WandbLog | None = None
        self._is_closed = False
        if rank != 0:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE):
            self._files[name] = open_records(self._run_dir / name, resume_step=resume_step)
        self._tensorboard = TensorBoardLog(
            Path(tensorboard_dir or self._run_dir / "tensorboard"),
            resume_step=resume_step,
            num_updates=self.num_updates,
        )
        if config is not None:
            self._path(CONFIG_FILE).write_text(json.dumps(dict(config), indent=1) + "\n", encoding="utf-8")
            self._tensorboard.add_config(config, config_text)
        if wandb_project is not None:
            self._wandb = WandbLog(
                wandb_module or import_wandb(wandb_project),
                self._run_dir,
                project=wandb_project,
                name=wandb_exp_name,
                resume_step=resume_step,
                config=config or {},
                say=self.say,
            )
        self._progress = Progress(total_steps, self._step)
        self._display = open_display(self._progress)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(succeeded=kind is None)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds per stage since the start, on this rank."""
        return dict(self._clock.totals)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the logger was made."""
        return self._clock.elapsed_s

    @contextmanager
    def stage(self, name: str, *, part_of_step: bool = True) -> Iterator[None]:
        """Show `name` as what is going on now and charge the block's seconds to it.

        Seconds of a stage that is `part_of_step` go into the next step's record as `time/NAME`; start-up, evaluation
        and checkpoints are not. A stage inside another takes its seconds from it.
        """
        if self._display is not None and part_of_step:
            self._progress.begin_steps()
        with self._clock.stage(name, part_of_step=part_of_step):
            self._show_stage()
            yield
        self._show_stage()

    def log_step(self, metrics: Mapping[str, Any]) -> None:
        """Append one step to metrics.jsonl, to TensorBoard and to the display.

        `metrics` holds `step` (one more than the last step), numbers and lists by name, and `updates`: one mapping
        per optimizer update. `histograms` (name -> numbers, or {"edges": [n + 1], "counts": [n]}) and entries called
        NAME_histogram become pictures; the former are left out of the file. Added here: `time/STAGE` and their sum
        `time/step`, and tokens per second (of the whole step, of the rollout, of log-probs and updates) where the
        counts are given. Raises ValueError naming the key for NaN, infinity, or what is no number.
        """
        seconds = self._clock.take_step()
        if self._display is None:
            return
        assert self._tensorboard is not None
        step = metrics["step"]
        assert step == self._step + 1, f"step {step} logged after step {self._step}"
        record = {key: plain(key, value, step) for key, value in metrics.items() if key != HISTOGRAMS}
        found = {name: histogram_of(name, values) for name, values in metrics.get(HISTOGRAMS, {}).items()}
        histograms = {name: histogram for name, histogram in found.items() if histogram is not None}
        record |= {f"time/{name}": value for name, value in seconds.items()}
        record["time/step"] = sum(seconds.values())
        for name, tokens, stages in _SPEEDS:
            spent = sum(record.get(f"time/{stage}", 0.0) for stage in stages)
            if tokens in record and spent > 0:
                record[name] = record[tokens] / spent
        append_record(self._files[METRICS_FILE], record)
        self._step = step
        self._tensorboard.add(record, step)
        self._tensorboard.add_histograms(histograms, step)
        if self._wandb is not None:
            self._wandb.add(record, step, histograms)
        for update in record.get("updates", ()):
            self.num_updates += 1
            self._tensorboard.add_update(update, self.num_updates)
            if self._wandb is not None:
                self._wandb.add_update(update, self.num_updates)
        self._display.step(record)

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one evaluation after `step` steps (0: before training) to evaluations.jsonl; TensorBoard: `eval/NAME`.

        Raises ValueError as `log_step`.
        """
        if self._tensorboard is None:
            return
        record = {"step": step, **{key: plain(key, value, step) for key, value in metrics.items()}}
        append_record(self._files[EVALUATIONS_FILE], record)
        named = {f"eval/{key}": value for key, value in record.items() if key != "step"}
        self._tensorboard.add(named, step)
        if self._wandb is not None:
            self._wandb.add(named, step)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append sampled texts, one mapping of strings and numbers each, to samples.jsonl and TensorBoard's texts."""
        if self._tensorboard is None:
            return
        for sample in samples:
            append_record(self._files[SAMPLES_FILE], {"step": step, **sample})
        self._tensorboard.add_texts(samples, step)

    def flush_to_disk(self) -> None:
        """Have all records on the disk, so that no checkpoint outlives those of its steps. Raises ValueError."""
        if not self._files:
            return
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
            directory = os.open(self._run_dir, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise ValueError(f"the records in {self._run_dir} cannot be written: {error}") from error

    def say(self, message: str) -> None:
        """One message to the person watching, on stderr of rank 0, beside the live display."""
        if self._display is not None:
            self._display.say(message)

    def timings_table(self) -> str:
        """Where the time went so far, as a text table."""
        return timings_table(self.timings, self.elapsed_s)

    def close(self, *, succeeded: bool = True) -> None:
        """Draw curves.png when there is a step to draw, put the terminal back, close the files. Safe to call twice."""
        if self._display is None or self._tensorboard is None or self._is_closed:
            return
        self._is_closed = True
        self._display.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(succeeded=succeeded)
        for file in self._files.values():
            with nullcontext() if succeeded else suppress(OSError):  # it would write again what could not be written
                file.close()
        steps = read_metrics(self._path(METRICS_FILE))
        if steps:
            draw_curves(
                steps,
                read_metrics(self._path(EVALUATIONS_FILE)),
                self._path(CURVES_FILE),
                influence_bounds=self._influence_bounds,
            )

    def _path(self, name: str) -> Path:
        return self._run_dir / name

    def _show_stage(self) -> None:
        if self._display is not None:
            self._display.stage(self._clock.current)
