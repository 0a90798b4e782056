"""Ranks that lose one which a signal ended know that, and of one that failed they are told nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import run_ranks

from megatron_fipo.actor.last_word import passed_on
from megatron_fipo.interruption import Signals


def end_one_rank(*, by_signal: bool) -> dict[str, Any]:
    """Rank 1 ends inside, and the others lose it there; what each says was the signal, and what it raises."""
    signals, rank = Signals(), dist.get_rank()
    raised = ""
    try:
        with passed_on(signals):
            if rank != 1:
                dist.barrier()  # until rank 1 is through
                raise RuntimeError("Connection closed by peer")
            if not by_signal:
                raise AssertionError("a bug")
            signals.received.append(signal.SIGUSR1)
            raise KeyboardInterrupt
    except BaseException as error:
        raised = type(error).__name__
    if rank == 1:
        dist.barrier()
    return {"raised": raised, "signal": int(signals.first)}


@pytest.mark.parametrize("by_signal", [True, False])
def test_the_signal_that_ended_a_rank_is_known_to_those_that_lost_it(by_signal: bool, tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 3, end_one_rank, {"by_signal": by_signal})
    assert [rank["raised"] for rank in found] == [
        "RuntimeError",
        "KeyboardInterrupt" if by_signal else "AssertionError",
        "RuntimeError",
    ]
    assert [rank["signal"] for rank in found] == [signal.SIGUSR1 if by_signal else 0] * 3
