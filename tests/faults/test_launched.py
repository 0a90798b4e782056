"""The program under its launcher, as a user or a batch system starts it: signals to the launcher and to all at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_program import DONE
from fault_table import FaultTable
from left_behind import MARK, marked
from processes import REPO_ROOT, TESTS
from runs import REPLAYED_FLAGS, Runs, arguments_of, differences, steps_done

REQUEUE = 75
STARTS_WITHIN_S = 240.0
ENDS_WITHIN_S = 60.0
READ = "megatron_fipo.trainer.recording:read_rollouts"
UPDATE = "megatron_fipo.actor.actor:Actor.update"
GENERATING = {"at": READ, "when": "before", "call": 4, "pause_s": 300.0}
SLOW_UPDATE = {"at": UPDATE, "when": "after", "call": 7, "pause_s": 4.0, "rank": None}


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ended = runs.on_ranks(2).run(directory)
    assert set(ended.statuses) == {0}, ended.stderr
    return directory


class Launched:
    """`python -m megatron_fipo.launch` with two ranks of the program, in a process group of its own."""

    def __init__(self, runs: Runs, directory: Path, faults: list[dict[str, Any]]) -> None:
        self.directory = directory
        self.done = directory / "faults-done.txt"
        flags = {**runs.input_flags(), **REPLAYED_FLAGS, "auto-resume": True}
        path = [str(TESTS), str(TESTS / "faults"), str(REPO_ROOT)]
        with (directory / "launched.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "megatron_fipo.launch", "--nproc-per-node", "2"),
                    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
                    *(str(TESTS / "faults" / "fault_program.py"), json.dumps(faults), *arguments_of(flags)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=directory,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path),
                    "TORCHDYNAMO_DISABLE": "1",
                    "SPT_NOENV": "1",
                    DONE: str(self.done),
                },
                process_group=0,
            )

    @property
    def output(self) -> str:
        return (self.directory / "launched.txt").read_text(errors="replace")

    def wait_for_fault(self) -> None:
        """Until the program is where its fault wants it to be."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not self.done.exists() or not self.done.read_text():
            assert self.process.poll() is None, self.output[-3000:]
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.05)

    def wait(self) -> tuple[int | None, float]:
        """The launcher's status (None: it did not end) and the seconds until it and all it started were gone."""
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDS_WITHIN_S)
        while marked(os.environ[MARK]) and time.monotonic() < began + ENDS_WITHIN_S:
            time.sleep(0.1)
        return self.process.poll(), time.monotonic() - began


@pytest.fixture
def launched(runs: Runs, tmp_path: Path) -> Iterator[Any]:
    """Starts the launched program with faults; ends what is left of it."""
    started: list[Launched] = []

    def start(faults: list[dict[str, Any]]) -> Launched:
        started.append(Launched(runs, tmp_path, faults))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.mark.parametrize(
    ("name", "fault", "how", "status"),
    [
        pytest.param("SIGTERM", GENERATING, "launcher", REQUEUE, id="SIGTERM-generation"),
        pytest.param("SIGUSR1", SLOW_UPDATE, "launcher", REQUEUE, id="SIGUSR1-update"),
        pytest.param("SIGINT", GENERATING, "group", REQUEUE, id="SIGINT-group-generation"),
        pytest.param("SIGINT", SLOW_UPDATE, "group", REQUEUE, id="SIGINT-group", marks=pytest.mark.full_only),
        pytest.param("SIGTERM", SLOW_UPDATE, "group", REQUEUE, id="SIGTERM-group", marks=pytest.mark.full_only),
        pytest.param("SIGHUP", SLOW_UPDATE, "group", REQUEUE, id="SIGHUP-group", marks=pytest.mark.full_only),
        pytest.param("SIGKILL", GENERATING, "launcher", -9, id="SIGKILL-launcher"),
        pytest.param("SIGKILL", SLOW_UPDATE, "launcher", -9, id="SIGKILL-update", marks=pytest.mark.full_only),
    ],
)
def test_a_launched_run_ends_whole_and_goes_on_bit_for_bit(
    name: str,
    fault: dict[str, Any],
    how: str,
    status: int,
    launched: Any,
    runs: Runs,
    undisturbed: Path,
    tmp_path: Path,
    faults: FaultTable,
) -> None:
    """The program tells by a signal that does nothing, SIGURG, that it is where the fault is to meet it."""
    command = launched([{"do": "SIGURG", **fault}])
    command.wait_for_fault()
    number = signal.Signals[name]
    if how == "group":
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    found_status, seconds = command.wait()
    left = marked(os.environ[MARK])
    steps = steps_done(tmp_path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    resumed = runs.on_ranks(2).run(tmp_path, auto_resume=True)
    found = "; ".join(differences(tmp_path, undisturbed)) if set(resumed.statuses) == {0} else resumed.stderr[-500:]
    outcome = (
        f"status {found_status} after {seconds:.1f} s and {steps} steps, left: {left}, resumed {found or 'bitwise'}"
    )
    ok = found_status == status and not left and not found and "Traceback" not in command.output
    faults.record("launched run", f"{name} to the {how}", outcome, ok)
    assert ok, f"{outcome}\n{command.output[-3000:]}"
