"""Work for several engines of which some may fail: what a failed engine had is asked again of the others.

Every call to an engine runs beside a watch on its health, so that one that hangs is noticed long before its time is up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from megatron_fipo.rollout.engine import Engine, EngineError

T = TypeVar("T")

Ask = Callable[[Engine, Sequence[int]], Coroutine[Any, Any, Sequence[T]]]
"""(engine, items) -> their answers in the same order, already found valid; EngineError otherwise."""
Spread = Callable[[Sequence[int], int], list[list[int]]]
"""(items, number of engines) -> the items each of them gets; a function of its arguments alone."""
SetAside = Callable[[Engine, EngineError, int], Awaitable[None]]
"""(engine, its failure, how many items it leaves unanswered): end the engine's process; it gets no more work."""

_MISSED_CHECKS = 2  # in a row: one alone may be a machine that is busy


async def answer_all(
    engines: Sequence[Engine],
    num_asked: dict[int, int],
    *,
    ask: Ask[T],
    spread: Spread,
    set_aside: SetAside,
    max_retries: int,
    health_check_interval_s: float,
) -> dict[int, T]:
    """The answers to the items that are the keys of `num_asked`, whose values (how often each was asked) are kept up.

    An engine has one share at a time. While none fails, engine i gets share i of `spread` and nothing else, so that a
    repeated run forms the same batches. The share of one that fails is spread anew over those left, each taking its
    part when it has answered its own. Items without an answer are those for which no engine was left. Raises
    EngineError when an item was asked 1 + `max_retries` times in vain.
    """
    answers: dict[int, T] = {}
    idle = list(engines)
    shares = deque(spread(sorted(num_asked), len(engines)))
    asked: dict[asyncio.Task[Sequence[T]], tuple[Engine, list[int]]] = {}
    try:
        while True:
            while idle and shares:
                engine, share = idle.pop(0), shares.popleft()
                if not share:
                    idle.append(engine)  # fewer groups than engines: those without one come last
                    continue
                for item in share:
                    num_asked[item] += 1
                asked[asyncio.create_task(watched(engine, ask(engine, share), health_check_interval_s))] = engine, share
            if not asked:
                return answers
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in asked if task in done]:
                engine, share = asked.pop(task)
                try:
                    answers.update(zip(share, task.result(), strict=True))
                except EngineError as failure:
                    await set_aside(engine, failure, len(share))
                    worn_out = [item for item in share if num_asked[item] > max_retries]
                    if worn_out:
                        raise EngineError(
                            f"{len(worn_out)} requests failed every engine they were asked of, {1 + max_retries} in "
                            f"turn (--rollout-max-retries {max_retries}). The last: {failure}"
                        ) from failure
                    shares.extend(part for part in spread(share, max(1, len(idle) + len(asked))) if part)
                else:
                    idle.append(engine)
    finally:
        await _end(asked)


async def watched(engine: Engine, call: Coroutine[Any, Any, T], health_check_interval_s: float) -> T:
    """`call`'s result. EngineError as soon as the engine misses two health checks in a row meanwhile."""
    task = asyncio.create_task(call)
    watch = asyncio.create_task(_watch(engine, health_check_interval_s))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else watch.result()
    finally:
        await _end((task, watch))


async def together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """Run the calls together; on the first failure cancel the others and raise it."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _watch(engine: Engine, interval_s: float) -> Any:
    """Ends only by raising what the last of the missed checks raised."""
    missed = 0
    last = time.monotonic()
    while True:
        await asyncio.sleep(max(0.0, last + interval_s - time.monotonic()))
        last = time.monotonic()
        try:
            await engine.acheck_health(interval_s)
        except EngineError:
            missed += 1
            if missed == _MISSED_CHECKS:
                raise
        else:
            missed = 0


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what still runs and wait for its clean-up: a connection is closed when this returns."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
