"""What goes wrong while a run is under way: it says so, ends soon, and leaves no process and no shared memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from left_behind import nothing_left_behind
from small_run import START_WITHIN_S, command_line, num_steps

from megatron_fipo.interruption import REQUEUE

END_WITHIN_S = 25.0


def engine_pid(command: Any) -> int:
    """The engine's server process."""
    return next(pid for pid, line in command.pids().items() if "megatron_fipo.rollout.server" in line)


def kill_engine(command: Any, directory: Path) -> None:
    os.kill(engine_pid(command), signal.SIGKILL)


def kill_rank_1(command: Any, directory: Path) -> None:
    os.kill(command.rank_pid(1), signal.SIGKILL)


def interrupt_all(command: Any, directory: Path) -> None:
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does


def terminate_rank_0(command: Any, directory: Path) -> None:
    os.kill(command.rank_pid(0), signal.SIGTERM)


def let_reward_raise(command: Any, directory: Path) -> None:
    (directory / "raise").touch()


FAILURES: dict[str, tuple[Callable[[Any, Path], None], tuple[int, ...], list[str]]] = {
    # what is done to a run, the statuses it may end with, what stderr holds
    "a rank is killed": (kill_rank_1, (128 + 9,), ["error: rank 1 was ended by SIGKILL"]),
    "only rank 0 is terminated": (terminate_rank_0, (128 + 15,), ["interrupted by SIGTERM"]),
    "Ctrl-C": (interrupt_all, (128 + 2,), ["interrupted by SIGINT"]),
    "the reward raises": (let_reward_raise, (1, 2), ["error: ", "no verdict, on purpose"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_says_so_and_leaves_nothing(
    failure: str, tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    act, statuses, wanted = FAILURES[failure]
    with nothing_left_behind("run"):
        command = launch(command_line(tiny_chat_model, tmp_path, pipeline_model_parallel_size=1, lr=1e-6))
        command.wait_for("a finished step", lambda: num_steps(tmp_path) >= 1, START_WITHIN_S)
        act(command, tmp_path)
        began = time.monotonic()
        found = command.wait(END_WITHIN_S)
        print(f"{failure}: ended after {time.monotonic() - began:.1f} s\n{command.stderr}")
    assert found in statuses, command.stderr
    assert "Traceback" not in command.stderr
    for text in wanted:
        assert text in command.stderr, command.stderr


def test_a_killed_engine_is_started_again_and_the_run_goes_on_until_it_is_terminated(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    arguments = command_line(tiny_chat_model, tmp_path, lr=1e-6, rollout_num_engines=1)
    with nothing_left_behind("killed engine"):
        command = launch(arguments)
        command.wait_for("a finished step", lambda: num_steps(tmp_path) >= 1, START_WITHIN_S)
        kill_engine(command, tmp_path)
        died_at = num_steps(tmp_path)
        command.wait_for("steps with a new engine", lambda: num_steps(tmp_path) >= died_at + 4, START_WITHIN_S)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(END_WITHIN_S) == 128 + signal.SIGTERM, command.stderr
    assert "interrupted by SIGTERM" in command.stderr, command.stderr
    assert "engine engine-0 ended with signal 9" in command.stderr, command.stderr
    assert "engine engine-0 is started again (1 of 5)" in command.stderr, command.stderr
    assert "engine engine-0 serves again, with weight version" in command.stderr, command.stderr
    assert "Traceback" not in command.stderr


def test_an_engine_that_may_not_be_started_again_ends_the_run(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    settings = {"lr": 1e-6, "rollout_num_engines": 1, "rollout_max_restarts": 0}
    with nothing_left_behind("lost engine"):
        command = launch(command_line(tiny_chat_model, tmp_path, **settings))
        command.wait_for("a finished step", lambda: num_steps(tmp_path) >= 1, START_WITHIN_S)
        kill_engine(command, tmp_path)
        assert command.wait(END_WITHIN_S) == 1, command.stderr
    for text in ("error: no engine is left", "engine engine-0 ended with signal 9", "last lines of", "engine-0.log"):
        assert text in command.stderr, command.stderr
    assert "Traceback" not in command.stderr


def test_problems_that_tell_nothing_cannot_fill_a_batch(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    command = launch(command_line(tiny_chat_model, tmp_path, reward="constant", ranks=1, max_generation_batches=2))
    assert command.wait(START_WITHIN_S) == 2
    lines = command.stderr.splitlines()
    assert lines[-1].startswith("error: "), command.stderr
    assert "--max-generation-batches" in lines[-1]
    assert "Traceback" not in command.stderr


def test_a_run_that_saves_is_asked_to_end_and_requeued(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    """Three times, by another signal each, the last two while it goes on from what the one before left."""
    arguments = command_line(tiny_chat_model, tmp_path, lr=1e-6, save=tmp_path / "saved")
    num_made = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with nothing_left_behind(number.name):
            command = launch([*arguments, "--auto-resume"])
            command.wait_for("another step", lambda made=num_made: num_steps(tmp_path) > made, START_WITHIN_S)
            command.process.send_signal(number)
            assert command.wait(END_WITHIN_S) == REQUEUE, command.stderr
        assert ("going on from the checkpoint" in command.stderr) == (num_made > 0), command.stderr
        num_made = num_steps(tmp_path)
        assert f"interrupted by {number.name}: the state after step {num_made} is in" in command.stderr
        assert "Traceback" not in command.stderr
        assert (tmp_path / "saved" / "latest").read_text().strip() == f"step_{num_made:07d}"
