"""One run driven to its end through random kills and signals at random moments ends as the undisturbed one did."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from fault_table import FaultTable
from runs import Runs, Started, differences, steps_done

SEED_VARIABLE = "SOAK_SEED"  # repeats a soak's choices; their moments repeat as well as the machine does
REQUEUE = 75
NUMBERS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("num_faults", "num_ranks", "is_async"),
    [
        pytest.param(8, 1, True, id="short"),
        pytest.param(20, 1, False, id="sync", marks=pytest.mark.full_only),
        pytest.param(20, 1, True, id="async", marks=pytest.mark.full_only),
        pytest.param(20, 2, True, id="two-ranks", marks=pytest.mark.full_only),
    ],
)
def test_a_run_gets_to_its_end_through_random_kills(
    num_faults: int, num_ranks: int, is_async: bool, runs: Runs, tmp_path: Path, faults: FaultTable
) -> None:
    seed = int(os.environ.get(SEED_VARIABLE, random.SystemRandom().randrange(2**31)))
    rng = random.Random(seed)
    num_steps = 3 * num_faults
    runs = runs.on_ranks(
        num_ranks, async_save=is_async, keep_last_checkpoints=2, save_interval=1, train_iters=num_steps
    )
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    ended = runs.run(undisturbed)
    assert set(ended.statuses) == {0}, ended.stderr
    told = [f"{SEED_VARIABLE}={seed}"]
    for _ in range(num_faults):
        number, rank = rng.choice(NUMBERS), rng.randrange(num_ranks)
        started = runs.start(disturbed, auto_resume=True)
        let_it_run(started, disturbed, num_more=rng.randrange(3), moment=rng.random())
        assert all(process.poll() is None for process in started.ranks), f"{told}\n{started.wait()}"
        started.signal(number, [rank])
        ended = started.wait()
        name = signal.Signals(number).name
        told.append(f"{name} to rank {rank}: {ended.statuses}, {steps_done(disturbed)} of {num_steps} steps")
        # a rank whose neighbour ended, of a kill or of a signal in the start, fails, or is ended while it waits
        alone = {-signal.SIGKILL, -signal.SIGTERM, 1} if num_ranks > 1 else set()
        wanted = {-signal.SIGKILL, REQUEUE, 1} if number == signal.SIGKILL else {REQUEUE, *alone}
        ok = set(ended.statuses) <= wanted and ended.statuses[rank] in (-number, REQUEUE)
        faults.record("soak", name, told[-1], ok)
        assert ok, f"{told}\n{ended.stderr}"
    ended = runs.run(disturbed, auto_resume=True)
    print("\n".join(told), file=sys.stderr)
    assert set(ended.statuses) == {0}, f"{told}\n{ended.stderr}"
    assert differences(disturbed, undisturbed) == [], told


def let_it_run(started: Started, directory: Path, *, num_more: int, moment: float) -> None:
    """Wait for so many more steps, or the end of the run's start; then for a share of the time that this took."""
    began = time.monotonic()
    log = directory / "out" / "config.json"  # written at every start, before the first step
    before = steps_done(directory)
    written = log.stat().st_mtime_ns if log.exists() else 0
    while started.ranks[0].poll(0.005) is None:
        if num_more and steps_done(directory) >= before + num_more:
            break
        if not num_more and log.exists() and log.stat().st_mtime_ns != written:
            break
    per_step_s = (time.monotonic() - began) / (num_more + 2)
    started.ranks[0].poll(moment * per_step_s)
