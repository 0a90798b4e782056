"""Where a run's seconds go: named stages, the one that is going on now, and the table printed at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageClock:
    """Accumulates seconds per stage. A stage inside another is charged to itself alone, so the seconds add up."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._resumed = self._started  # when the innermost open stage last began to be charged
        self._open: list[str] = []
        self._outside: set[str] = set()
        self._step: dict[str, float] = {}
        self.totals: dict[str, float] = {}  # seconds per stage since the start

    @property
    def current(self) -> str | None:
        """The innermost stage going on now."""
        return self._open[-1] if self._open else None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._started

    @contextmanager
    def stage(self, name: str, *, part_of_step: bool = True) -> Iterator[None]:
        """Charge the block's seconds to `name`; `part_of_step` False keeps them out of the steps' own seconds."""
        if not part_of_step:
            self._outside.add(name)
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take_step(self) -> dict[str, float]:
        """The step's seconds per stage since the last call, stages outside the steps left out."""
        self._charge()
        taken, self._step = self._step, {}
        return taken

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self.totals[name] = self.totals.get(name, 0.0) + now - self._resumed
            if not any(stage in self._outside for stage in self._open):
                self._step[name] = self._step.get(name, 0.0) + now - self._resumed
        self._resumed = now


def timings_table(timings: Mapping[str, float], total_s: float) -> str:
    """A text table of seconds and share per stage, longest first; what no stage was charged with is `other`."""
    rows = sorted(timings.items(), key=lambda item: -item[1])
    rows += [("other", max(0.0, total_s - sum(timings.values()))), ("total", total_s)]
    width = max(len("stage"), *(len(name) for name, _ in rows))
    lines = [f"{'stage':<{width}}  {'seconds':>9}  {'share':>6}"]
    for name, seconds in rows:
        share = 100 * seconds / total_s if total_s > 0 else 0.0
        lines.append(f"{name:<{width}}  {seconds:>9.1f}  {share:>5.1f}%")
    return "\n".join(lines)
