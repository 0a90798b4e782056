"""A submitted job as it goes: changes of its state, what its log and its rank 0 say, and how it ended."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_fipo.slurm_options import SlurmJob
from megatron_fipo.train import RUN_FAILED

LOOK_EVERY_S = 2.0
SAYS_SO_AFTER = 2  # looks in vain
ENDED = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())
INTERRUPTED = 130
SIGNALLED = 128


def follow(job: SlurmJob, job_id: str, *, look_every_s: float = LOOK_EVERY_S) -> int:
    """Print until every task of the job has ended. Returns 0 when all completed, else the first failure's status.

    Ctrl-C ends the following, not the job.
    """
    print("following; Ctrl-C stops that, and leaves the job alone", flush=True)
    shown: dict[str, str] = {}
    ended: dict[str, dict[str, str]] = {}  # Slurm forgets a task some minutes after its end
    files = _Files(Path(job.log_dir), job_id, with_ranks=not job.seeds)
    try:
        while True:
            tasks = _look(job_id)
            if tasks is None:
                print("Slurm does not know the job any more, or does not answer", file=sys.stderr)
                return RUN_FAILED
            for name, task in tasks.items():
                if shown.get(name) != (line := _line(name, task)):
                    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
                    shown[name] = line
            files.show()
            ended = {name: task for name, task in {**ended, **tasks}.items() if task["JobState"] in ENDED}
            if all(name in ended for name in tasks):
                return next((status for task in ended.values() if (status := _status(task))), 0)
            time.sleep(look_every_s)
    except KeyboardInterrupt:
        print(f"\nno longer following; cancel with: scancel {job_id}", file=sys.stderr)
        return INTERRUPTED


def _look(
    job_id: str, *, tries: int = 60, pause: Callable[[float], None] = time.sleep
) -> dict[str, dict[str, str]] | None:
    """Fields of the job, or of every task of its array, by name."""
    for turn in range(tries):
        words = ["scontrol", "--oneliner", "show", "job", job_id]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return dict(read_jobs(done.stdout))
        if "Invalid job id" in done.stderr:
            return None
        if turn == SAYS_SO_AFTER:
            said = done.stderr.strip().rpartition("\n")[2]
            print(f"Slurm does not answer, and is asked again: {said}", file=sys.stderr, flush=True)
        pause(LOOK_EVERY_S)
    return None


def read_jobs(text: str) -> list[tuple[str, dict[str, str]]]:
    """(name, fields) of every line that `scontrol --oneliner show job` printed."""
    jobs = []
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line))
        if "JobState" in fields:
            task = fields.get("ArrayTaskId")
            jobs.append((f"{fields['ArrayJobId']}_{task}" if task is not None else fields["JobId"], fields))
    return sorted(jobs)


def _line(name: str, task: Mapping[str, str]) -> str:
    state, reason, nodes = task["JobState"], task.get("Reason", "None"), task.get("NodeList", "")
    text = f"job {name}: {state}"
    if state == "PENDING" and reason != "None":
        text += f" ({reason})"
    if nodes not in ("", "(null)"):
        text += f" on {nodes}"
    if task.get("Restarts", "0") != "0":
        text += f", requeued {task['Restarts']} times"
    return text


def _status(task: Mapping[str, str]) -> int:
    """As a shell has it, from Slurm's "status:signal"."""
    if task["JobState"] == "COMPLETED":
        return 0
    status, _, number = task.get("ExitCode", "0:0").partition(":")
    return int(status) or (SIGNALLED + int(number) if number.isdecimal() and int(number) else RUN_FAILED)


class _Files:
    """Log files that grow: what is new in them, each line with the file's name before it."""

    def __init__(self, directory: Path, job_id: str, *, with_ranks: bool) -> None:
        self._directory, self._with_ranks = directory, with_ranks
        self._pattern = re.compile(rf"{re.escape(job_id)}(_\d+)?")
        self._read: dict[Path, int] = {}

    def show(self) -> None:
        """Print the whole lines that were added since the last call."""
        found = [path for path in self._directory.glob("*.log") if self._pattern.fullmatch(path.stem)]
        if self._with_ranks:
            for directory in self._directory.glob("*.*"):
                if self._pattern.fullmatch(directory.stem):
                    found += directory.glob("rank-0-*.log")
        for path in sorted(found):
            start = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                whole, _, _ = file.read().rpartition(b"\n")
            if not whole:
                continue
            self._read[path] = start + len(whole) + 1
            label = "rank 0" if path.name.startswith("rank-0-") else f"job {path.stem}"
            for line in whole.decode(errors="replace").split("\n"):
                print(line if line.startswith(f"{label}:") else f"{label}: {line}", flush=True)
