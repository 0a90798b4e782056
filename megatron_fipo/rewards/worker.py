"""The grader process (`python -m megatron_fipo.rewards.worker`): JSON lines in on stdin, one JSON line out per answer.

It ends when stdin does, that is when its parent closes it or dies. What a reward prints is discarded.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable
from typing import Any, BinaryIO

from megatron_fipo.rewards.confinement import confine
from megatron_fipo.rewards.processes import OUT_OF_MEMORY_EXIT_CODE
from megatron_fipo.rewards.registry import REWARDS, WARM_UPS, Reward, load_reward
from megatron_fipo.sheltered import spare_only_this_process
from megatron_fipo.types import RewardResult

MAX_ANSWER_CHARACTERS = 1_000
MAX_MESSAGE_CHARACTERS = 2_000
ORPHAN_GRACE_S = 2.0  # a hung grader ends itself this long after its parent should have ended it


def main() -> None:
    """Load the reward that the first line names, say so, then grade line by line until stdin ends.

    In: {"reward", "sys_path", "memory_bytes", "timeout_s"}, then `ID [response, ground truth, {keyword: value}]`.
    Out: {"ready": true} or {"load_error"}, then {"id", "score", "accuracy", "answer"} or {"id", "kind", "message"}.
    """
    spare_only_this_process()
    requests, replies = _take_over_standard_streams()
    first = json.loads(requests.readline())
    sys.path[:] = first["sys_path"]
    try:
        reward = load_reward(first["reward"])
        if first["reward"] in WARM_UPS:
            WARM_UPS[first["reward"]]()
    except BaseException as error:  # the user's module may raise anything, SystemExit too: the parent reports it
        _send(replies, {"load_error": _message(error)})
        return
    _limit_memory(first["memory_bytes"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if first["reward"] in REWARDS:  # the user's own may need files and processes
        confine()
    _send(replies, {"ready": True})
    try:
        for line in requests:
            # The kernel ends this process when the parent that should watch the time is gone: no Python has to run.
            signal.setitimer(signal.ITIMER_REAL, first["timeout_s"] + ORPHAN_GRACE_S)
            reply = _grade(reward, line)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(replies, reply)
    except MemoryError:  # even to read an answer or to report that there is none left
        os._exit(OUT_OF_MEMORY_EXIT_CODE)


def _take_over_standard_streams() -> tuple[BinaryIO, int]:
    """The request stream and the descriptor of replies, out of reach of a reward that reads stdin or prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    return requests, replies


def _limit_memory(memory_bytes: int) -> None:
    """Allow `memory_bytes` of address space above what this process has mapped by now."""
    with open("/proc/self/statm") as statm:
        baseline = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (baseline + memory_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _grade(reward: Reward, line: bytes) -> dict[str, Any]:
    id_text = line[:32].partition(b" ")[0]
    reply: dict[str, Any] = {"id": int(id_text)}
    try:
        response, ground_truth, extra = json.loads(line[len(id_text) :])
        result = reward(response, ground_truth, **extra)
        if hasattr(result, "__await__"):
            result = _wait_for(result)
        problem = _problem_of(result)
        if problem is not None:
            return reply | {"kind": "exception", "message": problem[:MAX_MESSAGE_CHARACTERS]}
        answer = None if result.answer is None else result.answer[:MAX_ANSWER_CHARACTERS]
        return reply | {"score": float(result.score), "accuracy": float(result.accuracy), "answer": answer}
    except MemoryError as error:
        return reply | {"kind": "memory", "message": _message(error)}
    except BaseException as error:  # a reward may raise anything, SystemExit too; all of it is the parent's to see
        return reply | {"kind": "exception", "message": _message(error)}


def _wait_for(result: Awaitable[Any]) -> Any:
    """What an async reward returns, in an event loop of its own: tasks that it leaves behind end with it."""
    import asyncio

    async def wait() -> Any:
        return await result

    return asyncio.run(wait())


def _problem_of(result: Any) -> str | None:
    """What is wrong with a reward's return value, or None."""
    if not isinstance(result, RewardResult):
        return f"the reward returned {type(result).__name__}, wanted RewardResult"
    if not math.isfinite(result.score):
        return f"the reward returned the score {result.score!r}, wanted a finite number"
    if not 0.0 <= result.accuracy <= 1.0:
        return f"the reward returned the accuracy {result.accuracy!r}, wanted a number in [0, 1]"
    if not (result.answer is None or isinstance(result.answer, str)):
        return f"the reward returned an answer of type {type(result.answer).__name__}, wanted str or None"
    return None


def _message(error: BaseException) -> str:
    lines = traceback.format_exception_only(type(error), error)
    return "".join(lines).strip()[:MAX_MESSAGE_CHARACTERS]


def _send(replies: int, reply: dict[str, Any]) -> None:
    data = memoryview(json.dumps(reply).encode() + b"\n")
    while data:
        data = data[os.write(replies, data) :]


if __name__ == "__main__":
    main()
