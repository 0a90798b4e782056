"""Coroutines run to their end by a program that signals end by an exception: in its main thread, or beside it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

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


class Background(Generic[T]):
    """A coroutine that runs in a thread of its own, while the caller goes on."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._outcome: Future[T] = Future()
        self._running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
        self._thread = threading.Thread(target=self._run, args=(coroutine,), daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Wait for its end; returns, or raises, what it did. Broken off by a signal, the wait may be taken up again."""
        return self._outcome.result()

    def cancel(self) -> None:
        """End it, and return when its clean-up is through. What it did is lost."""
        loop, task = self._running.result()
        if not self._outcome.done():
            with contextlib.suppress(RuntimeError):  # the loop was closed a moment ago
                loop.call_soon_threadsafe(task.cancel)
        self._thread.join()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> None:
        async def kept() -> T:
            task = asyncio.current_task()
            assert task is not None
            self._running.set_result((asyncio.get_running_loop(), task))
            return await coroutine

        try:
            self._outcome.set_result(asyncio.run(kept()))
        except BaseException as error:  # the waiting side's to handle
            self._outcome.set_exception(error)


def _show_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)
