"""The pool of grader processes: every reward runs in one, so that an answer that hangs, crashes or fills the memory
gets a GraderError for its verdict and the pool goes on. What that means is the caller's to say: a run stops on it.
Nothing but JSON text passes between the processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from megatron_fipo.rewards.processes import Job, Worker, end_worker, start_worker, transfer
from megatron_fipo.types import GraderError, RewardResult

START_TIMEOUT_S = 120.0
MAX_IN_FLIGHT = 16  # answers handed to one worker at a time
MAX_IN_FLIGHT_CHARACTERS = 1 << 18


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
    imports. A process that hangs, dies or overruns its memory is killed by its id, with the processes it started, and
    replaced. `num_workers` None: one per processor this process may use, at most 8.

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
        self._workers: list[Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(self._start())
            while not all(worker.ready for worker in self._workers):
                self._wait()
                for worker in self._workers:
                    assert not list(worker.take_verdicts())
                    self._failure(worker)
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
            end_worker(self._workers.pop())

    def grade(
        self,
        responses: Sequence[str],
        ground_truths: Sequence[str],
        extras: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RewardResult | GraderError]:
        """The verdict on every response, in their order; extras[i] are keyword arguments of the i-th call.

        Raises ValueError when the numbers differ or an extra is not made of JSON types, and when the reward can no
        longer be loaded into a process that replaces another.
        """
        if extras is None:
            extras = [{}] * len(responses)
        if not len(responses) == len(ground_truths) == len(extras):
            raise ValueError(
                f"to grade are {len(responses)} responses with {len(ground_truths)} ground truths and {len(extras)} "
                "extras, but their numbers must be equal"
            )
        assert self._workers, "the pool is closed"
        jobs = deque(
            Job(self._next_id + i, response, ground_truth, _json(extra, i))
            for i, (response, ground_truth, extra) in enumerate(zip(responses, ground_truths, extras))
        )
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
                    failure = self._failure(worker)
                    if failure is not None:
                        self._workers[i] = self._replace(worker, failure, jobs, verdicts)
        except BaseException:
            self.close()  # whoever catches this must not read the rest of these answers as the next ones
            raise
        return [verdicts[first_id + i] for i in range(len(responses))]

    def _start(self) -> Worker:
        return start_worker(
            [sys.executable, "-m", "megatron_fipo.rewards.worker"],
            {
                "reward": self.name,
                "sys_path": sys.path,
                "memory_bytes": self.memory_bytes,
                "timeout_s": self.timeout_s,
            },
        )

    def _hand_out(self, worker: Worker, jobs: deque[Job]) -> None:
        """Fill the worker's share up when half of it is done."""
        if not worker.ready or len(worker.in_flight) > MAX_IN_FLIGHT // 2:
            return
        num_characters = sum(job.num_characters for job in worker.in_flight)
        # The last answers are spread: nobody waits for one worker's long share.
        share = max(1, min(MAX_IN_FLIGHT, len(jobs) // len(self._workers)))
        while jobs and len(worker.in_flight) < share:
            num_characters += jobs[0].num_characters
            if worker.in_flight and num_characters > MAX_IN_FLIGHT_CHARACTERS:
                break
            worker.give(jobs.popleft())

    def _wait(self) -> None:
        """Until something can be read or written, or the first worker runs out of time."""
        busy = [worker for worker in self._workers if worker.in_flight or not worker.ready]
        assert busy, "verdicts are missing and no worker has work"
        deadline = min(worker.last_progress_s + self._limit_s(worker) for worker in busy)
        transfer(busy, max(0.0, deadline - time.monotonic()))

    def _limit_s(self, worker: Worker) -> float:
        return self.timeout_s if worker.ready else START_TIMEOUT_S

    def _failure(self, worker: Worker) -> GraderError | None:
        """What keeps the worker from going on; a ValueError when it cannot even start."""
        failure = worker.failure
        overdue = time.monotonic() - worker.last_progress_s >= self._limit_s(worker)
        if failure is None and overdue and not worker.ready:
            failure = GraderError("timeout", f"its grader process was not ready after {START_TIMEOUT_S:g} s")
        if failure is not None and not worker.ready:
            raise ValueError(
                f"the reward {self.name!r} (--custom-rm-path or --rm-type) cannot be loaded: {failure.message}"
            )
        if failure is None and overdue and worker.in_flight:
            failure = GraderError("timeout", f"no verdict after {self.timeout_s:g} s")
        return failure

    def _replace(
        self,
        worker: Worker,
        failure: GraderError,
        jobs: deque[Job],
        verdicts: dict[int, RewardResult | GraderError],
    ) -> Worker:
        """End the worker and start another. The answer it was at gets the failure, the others wait for the next worker.

        Memory that ran out may have been lost to earlier answers: the verdict is that of a fresh process.
        """
        end_worker(worker)
        self.num_replaced += 1
        replacement = self._start()
        if worker.in_flight:
            job = worker.in_flight.popleft()
            if failure.kind == "memory" and worker.num_verdicts > 0:
                replacement.give(job)
            else:
                verdicts[job.id] = failure
        jobs.extendleft(reversed(worker.in_flight))
        return replacement

    def _replace_the_dead(self) -> None:
        """Replace workers that something outside ended while they were idle, before an answer is blamed for it."""
        transfer(self._workers, 0.0)
        for i, worker in enumerate(self._workers):
            assert not list(worker.take_verdicts())
            failure = self._failure(worker)
            if failure is not None:
                self._workers[i] = self._replace(worker, failure, deque(), {})


def _json(extra: Mapping[str, Any], index: int) -> str:
    try:
        return json.dumps(dict(extra))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the extra of answer {index} is not made of JSON types: {error}") from error
