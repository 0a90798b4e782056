"""A signal that lands in the middle of a call to the engines ends the program without asyncio's complaints."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from megatron_fipo.rollout.event_loop import run
from megatron_fipo.rollout.failover import together


def test_an_interrupted_call_leaves_no_message_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def interrupted() -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt  # as the handler of a signal does, wherever the program happens to be

    async def calls() -> None:
        await together(interrupted(), asyncio.sleep(5.0))

    async def one_call() -> None:
        await together(interrupted())

    async def itself() -> None:
        raise KeyboardInterrupt

    async def a_library_of_its_own() -> None:
        stray = asyncio.create_task(interrupted())
        await asyncio.sleep(5.0)
        await stray

    for each in (calls, one_call, itself, a_library_of_its_own):
        with caplog.at_level(logging.ERROR, logger="asyncio"):
            with pytest.raises(KeyboardInterrupt):
                run(each())
            gc.collect()
        assert caplog.text == "", each.__name__


def test_other_errors_of_tasks_that_nobody_awaits_are_still_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("on purpose")

    async def leave_behind() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(0.01)
        del task

    with caplog.at_level(logging.ERROR, logger="asyncio"):
        run(leave_behind())
        gc.collect()
    assert "on purpose" in caplog.text
