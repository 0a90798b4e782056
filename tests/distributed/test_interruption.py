"""What a signal does to a process: it raises where nothing is lost, is noted elsewhere, and is obeyed in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from megatron_fipo import train
from megatron_fipo.interruption import REQUEUE, Signals, end_with_parent

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def ask_and_wait(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_raises_where_it_may(number: signal.Signals) -> None:
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        signals.ending()
        assert signals.received == [number]


def test_a_signal_that_comes_while_it_is_entered_raises_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    set_handler = signal.signal

    def set_and_send(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        if number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
        return before

    monkeypatch.setattr(signal, "signal", set_and_send)
    with Signals() as signals:
        monkeypatch.undo()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
        signals.ending()
    assert signals.first == signal.SIGTERM


def test_a_deferred_signal_is_noted_and_raises_in_the_next_place_that_may_be_interrupted() -> None:
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == [signal.SIGTERM]
        reached = False
        with pytest.raises(KeyboardInterrupt), signals.interruptible():
            reached = True
        assert not reached
        time.sleep(1.2)  # longer than it is raised again after
        signals.ending()


def test_what_may_be_interrupted_is_and_what_follows_is_not() -> None:
    with Signals() as signals:
        signals.defer()
        with pytest.raises(KeyboardInterrupt), signals.interruptible():
            ask_and_wait(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == [signal.SIGUSR1] * 2


def test_inside_an_interruptible_stage_a_part_can_be_kept_whole() -> None:
    steps = []

    def stage(signals: Signals) -> None:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("whole")
        steps.append("not reached")

    with Signals() as signals:
        signals.defer()
        with pytest.raises(KeyboardInterrupt), signals.interruptible():
            stage(signals)
    assert steps == ["whole"]


def test_handlers_and_wakeup_fd_are_put_back() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in ASKING] == before
    assert signal.set_wakeup_fd(-1) == -1


PROGRAM = """
import hashlib, signal, sys, time
from megatron_fipo.interruption import Signals

with Signals() as signals:
    signals.set_grace({grace}, lambda number: (75, f"because of {{number}}"))
    {before}
    print("ready", flush=True)
    {stuck}
"""
IN_C_CODE = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 400_000_000)"  # no Python code runs meanwhile


def start(**parts: object) -> subprocess.Popen[str]:
    program = PROGRAM.format(**{"before": "signals.defer()", "stuck": IN_C_CODE, "grace": 60, **parts})
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, stderr


def test_a_forked_child_that_lives_on_does_not_hold_up_the_end() -> None:
    with Signals():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        began = time.monotonic()
    seconds = time.monotonic() - began
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seconds < 10


def test_the_end_of_the_grace_time_ends_a_process_that_is_stuck() -> None:
    process = start(grace=0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    status, stderr = end_of(process)
    assert status == REQUEUE
    assert stderr == "the run did not end within 0.3 s (--exit-grace-s): because of 15\n"
    assert time.monotonic() - began < 5


def test_a_start_that_cannot_heed_a_signal_is_ended_soon() -> None:
    """As one that waits in C++ for a rank that is gone; where something is to be lost, only the grace time ends it."""
    # a signal may arrive before the C code is entered: a handler that does nothing stands for one that does not run
    deaf = "signal.signal(signal.SIGTERM, lambda *_: None)"
    process = start(before=f"import megatron_fipo.interruption as limits; limits.HEEDED_WITHIN_S = 0.3; {deaf}")
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == (REQUEUE, "the start did not heed a signal within 0.3 s: because of 15\n")


def test_a_second_signal_ends_a_process_at_once() -> None:
    process = start()
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    assert process.poll() is None, "the first signal alone ended it"
    process.send_signal(signal.SIGTERM)
    status, stderr = end_of(process)
    assert (status, stderr) == (REQUEUE, "a second signal (SIGTERM) ended the run at once: because of 10\n")


def test_one_request_that_arrives_twice_is_one() -> None:
    process = start()
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.kill()
    end_of(process)


def test_the_clean_up_is_not_ended_by_a_second_signal_but_by_the_grace_time() -> None:
    process = start(grace=2.5, before="signals.defer(); signals.ending()", stuck="time.sleep(60)")
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
    assert process.poll() is None
    status, stderr = end_of(process)
    assert status == REQUEUE
    assert "within 2.5 s" in stderr
    assert 2.4 < time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("defers", "error", "status"),
    [
        (True, RuntimeError("Connection closed by peer [127.0.0.1]:4711"), REQUEUE),
        (True, DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), REQUEUE),  # the store
        (False, RuntimeError("out of memory"), REQUEUE),  # raised by what the signal broke off
        (False, ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'"), REQUEUE),
        (True, RuntimeError("out of memory"), None),
        (True, ValueError("--save is wrong"), 2),
        (True, OSError(28, "No space left on device", "checkpoints"), 1),
    ],
)
def test_an_error_after_a_signal_was_noted_is_not_taken_for_its_doing(
    monkeypatch: pytest.MonkeyPatch, defers: bool, error: Exception, status: int | None
) -> None:
    settings = SimpleNamespace(run=SimpleNamespace(save="checkpoints", exit_grace_s=60.0))
    monkeypatch.setattr("megatron_fipo.arguments.parse_arguments", lambda *arguments: settings)

    def run(settings: object, signals: Signals, is_rank_zero: bool) -> int:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        if not defers:
            signals._is_deferring = False
        raise error

    monkeypatch.setattr(train, "_checked_run", run)
    if status is not None:
        assert train.main([]) == status
        return
    with pytest.raises(RuntimeError, match=str(error)):
        train.main([])


def test_a_signal_to_another_rank_counts_as_received_and_raises_nothing() -> None:
    with Signals() as signals:
        signals.hear_of(0)
        assert signals.first == 0
        signals.hear_of(signal.SIGUSR1)
        signals.hear_of(signal.SIGTERM)
        assert signals.first == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt), signals.interruptible():
            time.sleep(30)


ORPHAN = """
import os, subprocess, sys, time
from megatron_fipo.interruption import Signals, end_with_parent

with Signals() as signals:
    end_with_parent()
    try:
        print(os.getpid(), flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        print(f"ended by {signals.received}", flush=True)
"""


def test_a_process_that_must_not_outlive_its_parent_is_asked_to_end_when_that_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ORPHAN!r}])"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    assert parent.stdout.readline().strip().isdecimal()
    parent.kill()
    assert parent.stdout.read() == f"ended by [{int(signal.SIGTERM)}]\n"  # to the end of all that hold the pipe
    parent.wait()


@pytest.mark.parametrize(
    ("parent", "launcher", "is_asked"),
    [
        (1, None, False),  # torchrun may be the first process of a container
        (1, 1, False),
        (1, os.getpid(), True),  # whose launcher was another, is an orphan now
        (os.getppid(), os.getpid(), False),  # a wrapper stands between
        (os.getppid(), 2**22 + 1, True),  # and has not noticed that the launcher is gone
    ],
)
def test_a_process_is_an_orphan_when_its_launcher_is_gone_and_not_for_having_the_first_process_as_parent(
    monkeypatch: pytest.MonkeyPatch, parent: int, launcher: int | None, is_asked: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append(number))
    end_with_parent(launcher=launcher)
    assert asked == [signal.SIGTERM] * is_asked
