"""The pool of grader processes: every reward runs in one, so that an answer that hangs, crashes or fills the memory
gets a GraderError for its verdict and the pool goes on. What that means is the caller's to say: a run stops on it.
Nothing but JSON text passes between the processes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megatron_fipo.types import GraderError, RewardResult

START_TIMEOUT_S = 120.0
MAX_REPLY_BYTES = 1 << 16  # the worker cuts its texts far below this
MAX_IN_FLIGHT = 16  # answers handed to one worker at a time
MAX_IN_FLIGHT_BYTES = 1 << 18
READ_BYTES = 1 << 16
EXIT_TIMEOUT_S = 1.0


def grade(
    name: str,
    responses: Sequence[str],
    ground_truths: Sequence[str],
    *,
    timeout_s: float,
    memory_bytes: int,
    extras: Sequence[Mapping[str, Any]] | None = None,
    num_workers: int | None = None,
) -> list[RewardResult | GraderError]:
    """One-shot GraderPool: start it, grade, close it. The result i belongs to response i."""
    with GraderPool(name, timeout_s=timeout_s, memory_bytes=memory_bytes, num_workers=num_workers) as pool:
        return pool.grade(responses, ground_truths, extras)


class GraderPool:
    """Long-lived grader processes for one reward (a name in REWARDS, or module:function).

    `timeout_s` is one answer's time, `memory_bytes` one process's address space above what it has mapped after its
    imports. A process that hangs, dies or overruns its memory is killed by its id, with the group of processes it
    started, and replaced. `num_workers` None: one per processor this process may use, at most 8.

    Raises ValueError when the reward cannot be loaded. Not for use from several threads at once.
    """

    def __init__(self, name: str, *, timeout_s: float, memory_bytes: int, num_workers: int | None = None) -> None:
        if num_workers is None:
            num_workers = min(8, len(os.sched_getaffinity(0)))
        assert timeout_s > 0, timeout_s
        assert memory_bytes > 0, memory_bytes
        assert num_workers > 0, num_workers
        self.name = name
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.num_replaced = 0
        self._next_id = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(self._start())
            for worker in self._workers:
                self._await_ready(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers alive now."""
        return tuple(worker.process.pid for worker in self._workers)

    def close(self) -> None:
        """End every worker and wait for it. Closing twice is fine."""
        while self._workers:
            _end(self._workers.pop())

    def grade(
        self,
        responses: Sequence[str],
        ground_truths: Sequence[str],
        extras: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RewardResult | GraderError]:
        """The verdict on every response, in their order; extras[i] are keyword arguments of the i-th call.

        Raises ValueError when the numbers differ or an extra is not made of JSON types.
        """
        if extras is None:
            extras = [{}] * len(responses)
        if not len(responses) == len(ground_truths) == len(extras):
            raise ValueError(
                f"to grade are {len(responses)} responses with {len(ground_truths)} ground truths and {len(extras)} "
                "extras, but their numbers must be equal"
            )
        assert self._workers, "the pool is closed"
        jobs = deque(self._jobs(responses, ground_truths, extras))
        first_id = self._next_id
        self._next_id += len(jobs)
        verdicts: dict[int, RewardResult | GraderError] = {}
        try:
            self._replace_the_dead()
            while len(verdicts) < len(responses):
                for worker in self._workers:
                    self._hand_out(worker, jobs)
                self._wait()
                for i, worker in enumerate(self._workers):
                    verdicts.update(worker.take_verdicts())
                    failure = worker.failure or worker.overdue(self.timeout_s)
                    if failure is not None:
                        # The answer it was at gets the failure, the others wait for the next worker. Lost memory is
                        # the one failure that a worker lives to report, with its answer's id.
                        if failure.kind != "memory" and worker.in_flight:
                            verdicts[worker.in_flight.popleft().id] = failure
                        jobs.extendleft(reversed(worker.in_flight))
                        self._workers[i] = self._replacement(worker)
                        break  # starting it took time in which nobody read what the others wrote
        except BaseException:
            self.close()  # whoever catches this must not read the rest of these answers as the next ones
            raise
        return [verdicts[first_id + i] for i in range(len(responses))]

    def _jobs(
        self, responses: Sequence[str], ground_truths: Sequence[str], extras: Sequence[Mapping[str, Any]]
    ) -> Iterator[_Job]:
        for i, (response, ground_truth, extra) in enumerate(zip(responses, ground_truths, extras)):
            request = {
                "id": self._next_id + i,
                "response": response,
                "ground_truth": ground_truth,
                "extra": dict(extra),
            }
            try:
                yield _Job(self._next_id + i, json.dumps(request).encode() + b"\n")
            except TypeError as error:
                raise ValueError(f"the extra of answer {i} is not made of JSON types: {error}") from error

    def _start(self) -> _Worker:
        # One thread each: a grader shares the machine with the trainer.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads},
            bufsize=0,
            start_new_session=True,  # Ctrl-C reaches the run alone, which then closes this pool
        )
        worker = _Worker(process)
        settings = {
            "reward": self.name,
            "sys_path": sys.path,
            "memory_bytes": self.memory_bytes,
            "timeout_s": self.timeout_s,
        }
        worker.outgoing += json.dumps(settings).encode() + b"\n"
        return worker

    def _await_ready(self, worker: _Worker) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not worker.replies and worker.failure is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._load_error(f"its grader process was not ready after {START_TIMEOUT_S:g} s")
            _transfer([worker], left)
        if worker.failure is not None:
            raise self._load_error(worker.failure.message)
        reply = worker.replies.popleft()
        if "load_error" in reply:
            raise self._load_error(reply["load_error"])
        assert reply == {"ready": True}, reply

    def _load_error(self, reason: str) -> ValueError:
        return ValueError(f"the reward {self.name!r} (--custom-rm-path or --rm-type) cannot be loaded: {reason}")

    def _hand_out(self, worker: _Worker, jobs: deque[_Job]) -> None:
        """Fill the worker's share up when half of it is done."""
        if len(worker.in_flight) > MAX_IN_FLIGHT // 2:
            return
        if not worker.in_flight:
            worker.last_progress_s = time.monotonic()
        num_bytes = sum(len(job.line) for job in worker.in_flight)
        # The last answers are spread: nobody waits for one worker's long share.
        share = max(1, min(MAX_IN_FLIGHT, len(jobs) // len(self._workers)))
        while jobs and len(worker.in_flight) < share:
            if worker.in_flight and num_bytes + len(jobs[0].line) > MAX_IN_FLIGHT_BYTES:
                break
            job = jobs.popleft()
            num_bytes += len(job.line)
            worker.in_flight.append(job)
            worker.outgoing += job.line

    def _wait(self) -> None:
        """Until something can be read or written, or the first answer runs out of time."""
        busy = [worker for worker in self._workers if worker.in_flight]
        assert busy, "verdicts are missing and no worker has work"
        deadline = min(worker.last_progress_s for worker in busy) + self.timeout_s
        _transfer(busy, max(0.0, deadline - time.monotonic()))

    def _replace_the_dead(self) -> None:
        """Replace workers that something outside ended while they were idle, before an answer is blamed for it."""
        _transfer(self._workers, 0.0)
        for i, worker in enumerate(self._workers):
            if worker.failure is not None:
                self._workers[i] = self._replacement(worker)

    def _replacement(self, worker: _Worker) -> _Worker:
        _end(worker)
        self.num_replaced += 1
        replacement = self._start()
        try:
            self._await_ready(replacement)
        except BaseException:
            _end(replacement)
            raise
        return replacement


@dataclass(frozen=True)
class _Job:
    id: int
    line: bytes


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    outgoing: bytearray = field(default_factory=bytearray)
    incoming: bytearray = field(default_factory=bytearray)
    replies: deque[dict[str, Any]] = field(default_factory=deque)
    in_flight: deque[_Job] = field(default_factory=deque)
    last_progress_s: float = 0.0
    failure: GraderError | None = None

    def __post_init__(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)

    def read(self) -> None:
        """Take what the worker has written; its end, or a line that is no reply, becomes `failure`."""
        assert self.process.stdout is not None
        try:
            data = os.read(self.process.stdout.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            end = _how_it_ended(self.process.pid)
            # SIGALRM is the worker's own clock, which strikes only when this process was too late to.
            self.failure = GraderError("timeout" if "SIGALRM" in end else "crash", f"the grader process {end}")
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

    def overdue(self, timeout_s: float) -> GraderError | None:
        """The failure of a worker that has been at one answer for longer than `timeout_s`."""
        if not self.in_flight or time.monotonic() - self.last_progress_s < timeout_s:
            return None
        return GraderError("timeout", f"no verdict after {timeout_s:g} s")

    def take_verdicts(self) -> Iterator[tuple[int, RewardResult | GraderError]]:
        """The replies that have come. One out of turn, or one that reports lost memory, becomes `failure`."""
        while self.replies:
            reply = self.replies.popleft()
            self.last_progress_s = time.monotonic()
            if not self.in_flight or reply.get("id") != self.in_flight[0].id:
                self.failure = GraderError("crash", f"the grader process answered out of turn: {str(reply)[:200]}")
                return
            job = self.in_flight.popleft()
            if "kind" not in reply:
                yield job.id, RewardResult(reply["score"], reply["accuracy"], reply["answer"])
                continue
            verdict = GraderError(reply["kind"], reply["message"])
            if verdict.kind == "memory":  # its heap may stay full
                self.failure = verdict
            yield job.id, verdict


def _transfer(workers: Sequence[_Worker], timeout_s: float) -> None:
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


def _end(worker: _Worker) -> None:
    """Kill the worker and what it started: its process group, which has its id until it is waited for below."""
    process = worker.process
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _how_it_ended(pid: int) -> str:
    """In words, without reaping the process: its id must stay its own until _end."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while time.monotonic() < deadline:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if status is None:
            time.sleep(0.005)
        elif status.si_code == os.CLD_EXITED:
            return f"ended with exit code {status.si_status}"
        else:
            return f"was ended by {signal.Signals(status.si_status).name}"
    return "closed its output"
