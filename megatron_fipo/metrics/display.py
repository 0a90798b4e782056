"""What a person sees while a run goes on, on stderr: a live table in a terminal, plain aligned lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_fipo.metrics.columns import COLUMNS, TIME_LEFT, WIDTH, cells, clock_time

HEADER_INTERVAL = 20  # lines between headers of the plain display
LIVE_ROWS = 12  # latest steps the live table keeps in sight


class Display(Protocol):
    """Shows steps, the stage going on now, and messages."""

    def step(self, record: Mapping[str, Any]) -> None: ...

    def stage(self, name: str | None) -> None: ...

    def say(self, message: str) -> None: ...

    def close(self) -> None: ...


def open_display(progress: Progress, stream: TextIO | None = None) -> Display:
    """The display that suits `stream` (default: stderr)."""
    stream = sys.stderr if stream is None else stream
    return LiveDisplay(progress, Console(file=stream)) if stream.isatty() else PlainDisplay(progress, stream)


class Progress:
    """How far the run is, and how long the rest takes at the mean pace of this process.

    `done_steps` were made before this process started.
    """

    def __init__(self, total_steps: int, done_steps: int) -> None:
        self.total_steps = total_steps
        self.first_step = done_steps
        self.step = done_steps
        self.started = time.monotonic()

    @property
    def seconds_left(self) -> float | None:
        """None before the first step is done."""
        done = self.step - self.first_step
        if done <= 0:
            return None
        return (time.monotonic() - self.started) / done * max(0, self.total_steps - self.step)

    def begin_steps(self) -> None:
        """Called when work on steps begins, so that start-up does not count as a step's time."""
        if self.step == self.first_step:
            self.started = time.monotonic()


class PlainDisplay:
    """One line per step, the header again every 20 lines; for logs and pipes."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self._progress = progress
        self._stream = stream
        self._lines = 0

    def step(self, record: Mapping[str, Any]) -> None:
        self._progress.step = record["step"]
        total = str(self._progress.total_steps)
        step_width = max(len("step"), 2 * len(total) + 1)
        if self._lines % HEADER_INTERVAL == 0:
            titles = [column.title for column in COLUMNS]
            self.say("  ".join([f"{'step':>{step_width}}", *(f"{title:>{WIDTH}}" for title in [*titles, TIME_LEFT])]))
        self._lines += 1
        texts = [*cells(record), clock_time(self._progress.seconds_left)]
        step = f"{record['step']:>{len(total)}}/{total}"
        self.say("  ".join([f"{step:>{step_width}}", *(f"{text:>{WIDTH}}" for text in texts)]))

    def stage(self, name: str | None) -> None:
        """Plain lines do not show stages: one line per step is what a log wants."""

    def say(self, message: str) -> None:
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to put back."""


class LiveDisplay:
    """A table of the latest steps above a progress bar with the stage going on now, redrawn in place."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._rows: deque[list[str]] = deque(maxlen=LIVE_ROWS)
        self._stage: str | None = None
        self._stage_since = time.monotonic()
        # stdout stays the program's own; rich would send it to the display's stream
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def step(self, record: Mapping[str, Any]) -> None:
        self._progress.step = record["step"]
        self._rows.append([str(record["step"]), *cells(record)])
        self._live.refresh()

    def stage(self, name: str | None) -> None:
        self._stage, self._stage_since = name, time.monotonic()

    def say(self, message: str) -> None:
        self._live.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        self._stage = None
        self._live.stop()

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2), header_style="bold")
        for title in ["step", *(column.title for column in COLUMNS)]:
            table.add_column(title, justify="right", min_width=WIDTH if title != "step" else 4)
        for row in self._rows:
            table.add_row(*row)
        progress = self._progress
        line = Table.grid(padding=(0, 2))
        stage = f"{self._stage} {time.monotonic() - self._stage_since:.0f} s" if self._stage else ""
        line.add_row(
            Text(f"step {progress.step}/{progress.total_steps}"),
            ProgressBar(total=progress.total_steps, completed=progress.step, width=30),
            Text(f"{TIME_LEFT} {clock_time(progress.seconds_left)}"),
            Text(stage, style="cyan"),
        )
        return Group(table, line) if self._rows else Group(line)
