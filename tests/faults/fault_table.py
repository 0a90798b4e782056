"""The count of injected faults: every fault test records here what it did to the program and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"


@dataclass(frozen=True)
class Fault:
    """One fault that really happened: `outcome` is what the program made of it, `ok` whether that is what is wanted."""

    kind: str
    name: str
    outcome: str
    ok: bool
    seconds: float
    test: str


class FaultTable:
    """Every fault of a test run, in the order of injection."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.faults: list[Fault] = []
        self._clock = clock
        self._test = ""
        self._since = clock()

    def begin(self, test: str) -> None:
        """From here on faults belong to `test`; called once its fixtures are ready."""
        self._test, self._since = test, self._clock()

    def record(self, kind: str, name: str, outcome: str, ok: bool) -> None:
        """Count one fault, once it has been injected and its outcome is known.

        kind: a line of the table, such as "SIGKILL" or "bit flip". name: which of that kind. ok: whether the program
        did what is wanted; the run of the tests fails if any is False, whatever the test itself asserts.
        """
        now = self._clock()
        self.faults.append(Fault(kind, name, outcome, bool(ok), now - self._since, self._test))
        self._since = now

    @property
    def failed(self) -> list[Fault]:
        return [fault for fault in self.faults if not fault.ok]

    def rows(self) -> list[tuple[str, int, int, float]]:
        """(kind, number injected, number survived as wanted, seconds), in the order in which the kinds came up."""
        kinds = dict.fromkeys(fault.kind for fault in self.faults)
        return [self._row(kind, [fault for fault in self.faults if fault.kind == kind]) for kind in kinds]

    def total(self) -> tuple[str, int, int, float]:
        """The last row: all kinds together."""
        return self._row("all", self.faults)

    def lines(self) -> list[str]:
        """The table for a terminal, and every fault that did not end as wanted."""
        rows = [*self.rows(), self.total()]
        width = max(len(row[0]) for row in rows)
        return [
            f"{'fault':<{width}}  injected  as wanted  seconds",
            *(f"{kind:<{width}}  {count:>8}  {good:>9}  {seconds:>7.1f}" for kind, count, good, seconds in rows),
            *(f"not as wanted: {fault.kind}: {fault.name}: {fault.outcome} ({fault.test})" for fault in self.failed),
        ]

    def write_markdown(self, path: Path) -> None:
        """The table as it stands in the documentation: between BEGIN and END where the file has these, else alone."""
        lines = ["| fault | injected | as wanted | seconds |", "|---|---:|---:|---:|"]
        lines += [f"| {kind} | {count} | {good} | {seconds:.0f} |" for kind, count, good, seconds in self.rows()]
        _, count, good, seconds = self.total()
        lines.append(f"| **all** | **{count}** | **{good}** | **{seconds:.0f}** |")
        table = "\n".join(lines) + "\n"
        if path.exists() and BEGIN in (text := path.read_text(encoding="utf-8")):
            before, after = text.split(BEGIN)[0], text.split(END)[1]
            table = f"{before}{BEGIN}\n{table}{END}{after}"
        path.write_text(table, encoding="utf-8")

    @staticmethod
    def _row(kind: str, faults: list[Fault]) -> tuple[str, int, int, float]:
        return kind, len(faults), sum(fault.ok for fault in faults), sum(fault.seconds for fault in faults)
