"""asyncio.run for a program that signals end by an exception."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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


def _show_unless_interrupted(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)
