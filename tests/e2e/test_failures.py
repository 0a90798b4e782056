"""What goes wrong while a run is under way: it says so, ends soon, and leaves no process and no shared memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

END_WITHIN_S = 25.0
REQUEUE = 75
START_WITHIN_S = 240.0
PROBLEMS = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(40)]
# by the process that runs it: the graders' memory is their own, so a file says what to do
REWARD = """
import pathlib
from megatron_fipo.types import RewardResult

def grade(response, ground_truth, **extra):
    if pathlib.Path(__file__).with_name("raise").exists():
        raise RuntimeError("no verdict, on purpose")
    score = float(len(response) % 2)
    return RewardResult(score, score, response)

def constant(response, ground_truth, **extra):
    return RewardResult(0.0, 0.0, response)
"""


def command_line(model: Path, directory: Path, *, reward: str = "grade", ranks: int = 2, **more: Any) -> list[str]:
    (directory / "own_reward.py").write_text(REWARD)
    (directory / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    flags = {
        "hf-checkpoint": model,
        "prompt-data": directory / "problems.jsonl",
        "custom-rm-path": f"own_reward:{reward}",
        "rollout-batch-size": 4,
        "n-samples-per-prompt": 4,
        "num-updates-per-rollout": 2,
        "rollout-max-prompt-len": 32,
        "rollout-max-response-len": 32,
        "max-tokens-per-micro-batch": 128,
        "overlong-buffer-len": 4,
        "train-iters": 10000,
        "output-dir": directory / "out",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [
        *("-m", "megatron_fipo.launch", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "megatron_fipo.train", *words),
    ]


def num_steps(directory: Path) -> int:
    path = directory / "out" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def engine_pid(command: Any) -> int:
    """The engine's server process."""
    return next(pid for pid, line in command.pids().items() if "megatron_fipo.rollout.server" in line)


@contextlib.contextmanager
def no_shared_memory_left() -> Iterator[None]:
    """Nothing new lies in /dev/shm afterwards that no process has mapped (other programs run meanwhile)."""
    before = set(os.listdir("/dev/shm"))
    yield
    deadline = time.monotonic() + 5.0
    while left := set(os.listdir("/dev/shm")) - before - _mapped():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _mapped() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            names |= {
                line.partition("/dev/shm/")[2].split(" ")[0] for line in path.read_text().splitlines() if "/shm" in line
            }
    return names


def kill_engine(command: Any, directory: Path) -> None:
    os.kill(engine_pid(command), signal.SIGKILL)


def kill_rank_1(command: Any, directory: Path) -> None:
    os.kill(command.rank_pid(1), signal.SIGKILL)


def interrupt_all(command: Any, directory: Path) -> None:
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does


def terminate_launcher(command: Any, directory: Path) -> None:
    command.process.send_signal(signal.SIGTERM)


def let_reward_raise(command: Any, directory: Path) -> None:
    (directory / "raise").touch()


FAILURES: dict[str, tuple[Callable[[Any, Path], None], tuple[int, ...], list[str]]] = {
    # what is done to a run, the statuses it may end with, what stderr holds
    "the engine is killed": (
        kill_engine,
        (1,),
        ["error: engine engine-0 ended with signal 9", "last lines of", "engine-0.log"],
    ),
    "a rank is killed": (kill_rank_1, (128 + 9,), ["error: rank 1 was ended by SIGKILL"]),
    "Ctrl-C": (interrupt_all, (128 + 2,), ["interrupted by SIGINT"]),
    "the launcher is terminated": (terminate_launcher, (128 + 15,), ["interrupted by SIGTERM"]),
    "the reward raises": (let_reward_raise, (1, 2), ["error: ", "no verdict, on purpose"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_says_so_and_leaves_nothing(
    failure: str, tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    act, statuses, wanted = FAILURES[failure]
    with no_shared_memory_left():
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


def test_problems_that_tell_nothing_cannot_fill_a_batch(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    command = launch(command_line(tiny_chat_model, tmp_path, reward="constant", ranks=1, max_generation_batches=2))
    assert command.wait(START_WITHIN_S) == 2
    lines = command.stderr.splitlines()
    assert lines[-1].startswith("error: "), command.stderr
    assert "--max-generation-batches" in lines[-1]
    assert "Traceback" not in command.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_saves_is_asked_to_end_and_requeued(
    number: signal.Signals, tiny_chat_model: Path, tmp_path: Path, launch: Callable[[list[str]], Any]
) -> None:
    arguments = command_line(tiny_chat_model, tmp_path, lr=1e-6, save=tmp_path / "saved")
    with no_shared_memory_left():
        command = launch([*arguments, "--auto-resume"])
        command.wait_for("a finished step", lambda: num_steps(tmp_path) >= 1, START_WITHIN_S)
        command.process.send_signal(number)
        assert command.wait(END_WITHIN_S) == REQUEUE, command.stderr
    num_made = num_steps(tmp_path)
    assert f"interrupted by {number.name}: the state after step {num_made} is in" in command.stderr
    assert "Traceback" not in command.stderr
    assert (tmp_path / "saved" / "latest").read_text().strip() == f"step_{num_made:07d}"
    if number is not signal.SIGTERM:
        return
    command = launch([*arguments, "--auto-resume", "--train-iters", str(num_made + 1)])
    assert command.wait(START_WITHIN_S) == 0, command.stderr
    assert "going on from the checkpoint" in command.stderr
    assert num_steps(tmp_path) == num_made + 1
