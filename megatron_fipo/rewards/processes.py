"""One grader process as its parent sees it: its pipes, what it has been given, how it failed and how it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.sheltered import sheltered_children
from megatron_fipo.types import GraderError, RewardResult

MAX_REPLY_BYTES = 1 << 16  # the worker cuts its texts far below this
READ_BYTES = 1 << 16
EXIT_TIMEOUT_S = 1.0
OUT_OF_MEMORY_EXIT_CODE = 86  # of a worker that has no memory left to say so


@dataclass(frozen=True)
class Job:
    """One answer to grade. `extra` is the JSON text of the call's keyword arguments."""

    id: int
    response: str
    ground_truth: str
    extra: str

    @property
    def num_characters(self) -> int:
        return len(self.response) + len(self.ground_truth) + len(self.extra)

    def line(self) -> bytes:
        """The job as the worker reads it: its id, then [response, ground truth, extra] in ASCII."""
        texts = json.dumps([self.response, self.ground_truth])
        return f"{self.id} {texts[:-1]}, {self.extra}]\n".encode()


@dataclass(eq=False)
class Worker:
    """A grader process that has been started; `ready` once it has loaded its reward."""

    process: subprocess.Popen[bytes]
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytearray = field(default_factory=bytearray)
    replies: deque[dict[str, Any]] = field(default_factory=deque)
    in_flight: deque[Job] = field(default_factory=deque)
    ready: bool = False
    num_verdicts: int = 0
    last_progress_s: float = field(default_factory=time.monotonic)  # of its start, of the answer it is at
    failure: GraderError | None = None

    def __post_init__(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)

    def give(self, job: Job) -> None:
        """Queue an answer for the worker."""
        if self.ready and not self.in_flight:
            self.last_progress_s = time.monotonic()
        self.in_flight.append(job)
        self.outgoing += job.line()

    def read(self) -> None:
        """Take what the worker has written; its end, or a line that is no reply, becomes `failure`."""
        assert self.process.stdout is not None
        try:
            data = os.read(self.process.stdout.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.failure = _how_it_ended(self.process.pid)
            return
        self.incoming += data
        *lines, rest = self.incoming.split(b"\n")
        self.incoming = bytearray(rest)
        try:
            self.replies += [json.loads(line) for line in lines]
        except ValueError:
            self.failure = GraderError("crash", "the grader process wrote what is no reply")
        if len(rest) > MAX_REPLY_BYTES:
            self.failure = GraderError(
                "crash", f"the grader process wrote a reply of more than {MAX_REPLY_BYTES} bytes"
            )

    def write(self) -> None:
        """Hand the worker as much as its pipe takes."""
        assert self.process.stdin is not None
        try:
            num_written = os.write(self.process.stdin.fileno(), self.outgoing[:READ_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError:  # it is dead, which the end of its replies says next
            num_written = len(self.outgoing)
        del self.outgoing[:num_written]

    def take_verdicts(self) -> Iterator[tuple[int, RewardResult | GraderError]]:
        """The verdicts that have come, with their answers' ids.

        A reply out of turn, and one that reports lost memory, becomes `failure`; the latter's answer stays the first
        in flight.
        """
        while self.replies:
            reply = self.replies.popleft()
            self.last_progress_s = time.monotonic()
            if not self.ready:
                self.ready = reply == {"ready": True}
                if not self.ready:
                    self.failure = GraderError("crash", str(reply.get("load_error", reply)))
                    return
                continue
            if not self.in_flight or reply.get("id") != self.in_flight[0].id:
                self.failure = GraderError("crash", f"the grader process answered out of turn: {str(reply)[:200]}")
                return
            if reply.get("kind") == "memory":  # its heap may stay full
                self.failure = GraderError("memory", reply["message"])
                return
            self.num_verdicts += 1
            job = self.in_flight.popleft()
            if "kind" in reply:
                yield job.id, GraderError(reply["kind"], reply["message"])
            else:
                yield job.id, RewardResult(reply["score"], reply["accuracy"], reply["answer"])


def start_worker(command: Sequence[str], settings: Mapping[str, Any]) -> Worker:
    """Start the process and queue its settings as its first line."""
    # One thread each: a grader shares the machine with the trainer.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with sheltered_children():  # what asks the run to end reaches the run alone, which then closes its pool
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads},
            bufsize=0,
            start_new_session=True,
        )
    worker = Worker(process)
    worker.outgoing += json.dumps(settings).encode() + b"\n"
    worker.write()  # it gets ready even if nobody asks it for anything yet
    return worker


def transfer(workers: Sequence[Worker], timeout_s: float) -> None:
    """Read and write once wherever a pipe is ready, waiting for the first at most `timeout_s`."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            assert worker.process.stdin is not None
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker.read)
            if worker.outgoing:
                selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker.write)
        for key, _ in selector.select(timeout_s):
            key.data()


def end_worker(worker: Worker) -> None:
    """Kill the worker and what it started, and wait for it.

    That is its process group, which has its id until it is waited for here, and its descendants that left the group.
    Ending it twice is fine.
    """
    process = worker.process
    if process.returncode is not None:  # it was waited for: its id may be another process's by now
        return
    descendants = _descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(process.pid, signal.SIGKILL)
    for pid in descendants:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _descendants(pid: int) -> list[int]:
    """The processes that `pid` started and those that they started, as far as Linux still tells."""
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                parents += [int(child) for child in children.read_text().split()]
        found.append(parent)
    return found[1:]


def _how_it_ended(pid: int) -> GraderError:
    """The end of the process as an error, without reaping it: its id must stay its own until end_worker."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while time.monotonic() < deadline:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if status is None:
            time.sleep(0.005)
        elif status.si_code != os.CLD_EXITED:
            # SIGALRM is the worker's own clock, which strikes only when its parent was too late to.
            kind = signal.Signals(status.si_status)
            return GraderError(
                "timeout" if kind is signal.SIGALRM else "crash", f"the grader process was ended by {kind.name}"
            )
        elif status.si_status == OUT_OF_MEMORY_EXIT_CODE:
            return GraderError("memory", "the grader process had no memory left to report with")
        else:
            return GraderError("crash", f"the grader process ended with exit code {status.si_status}")
    return GraderError("crash", "the grader process closed its output")
