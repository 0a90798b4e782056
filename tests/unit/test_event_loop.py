"""What an event loop says of failures that nobody asked for."""

from __future__ import annotations

import asyncio
import gc

import pytest

from megatron_fipo.rollout.event_loop import run


async def leaves_a_failed_task(error: BaseException) -> None:
    async def fails() -> None:
        raise error

    task = asyncio.create_task(fails())
    await asyncio.sleep(0.01)
    assert task.done()


def caused_by_interrupt() -> Exception:
    error = ConnectionError("the parser failed")
    error.__cause__ = ValueError("while it was read")
    error.__cause__.__context__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    ("error", "is_shown"), [(ConnectionError("lost"), True), (caused_by_interrupt(), False)], ids=["own", "of a signal"]
)
def test_a_failure_that_nobody_asked_for_is_shown_unless_a_signal_made_it(
    error: Exception, is_shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run(leaves_a_failed_task(error))
    gc.collect()
    assert ("Task exception was never retrieved" in caplog.text) == is_shown
