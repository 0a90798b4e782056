"""Coroutines run to their end by a program that signals end by an exception: in its main thread, or beside it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, but without its messages about a KeyboardInterrupt.

    The loop hands that exception to the caller wherever it was raised, and every task that it ended keeps it too, those
    of libraries among them: asyncio would print "Task exception was never retrieved" and a traceback for each.
    """

    async def kept() -> T:
        asyncio.get_running_loop().set_exception_handler(_show_unless_interrupted)
        return await coroutine

    return asyncio.run(kept())


class Background:
    """Coroutines that run in a thread while the caller goes on. There is a thread from the first `start` to `close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: deque[Future[Any]] = deque()

    def start(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Begin with it."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, daemon=True)
            thread.start()
            self._loop, self._thread = loop, thread
        self._running.append(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def wait(self, *, most_left: int = 0) -> None:
        """Return when no more than `most_left` run, ended in the order they were started, or raise what one raised."""
        while len(self._running) > most_left:
            self._running[0].result()
            self._running.popleft()

    def close(self) -> None:
        """End what still runs, its clean-up included, and the thread."""
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None  # first: a signal may break this off, and it may be called again
        self._running.clear()
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_end_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


def _show_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Hide a KeyboardInterrupt, and what libraries made of one: aiohttp turns one inside its parser into its own."""
    error: BaseException | None = context.get("exception")
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    if error is None:
        loop.default_exception_handler(context)
