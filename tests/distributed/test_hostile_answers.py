"""Hostile answers under every kind of reward: what each costs is its own verdict, and no more."""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import reasoning_gym
from hostile import hostile_answers

from megatron_fipo.rewards import GraderPool
from megatron_fipo.types import GraderError, RewardResult

MIB = 1 << 20
PATIENT_S = 20.0  # where nothing hangs: this machine may be busy with other things
IMPATIENT_S = 2.0
MEMORY_BYTES = 256 * MIB
NUM_WORKERS = 2
RESTART_S = 60.0  # of a grader process, likewise

USER_REWARDS = """
import json
from megatron_fipo.types import RewardResult

def strict(response, ground_truth, **extra):
    number = float(json.loads(response))  # raises for whatever is no number
    return RewardResult(float(number == 42.0), float(number == 42.0), response)

async def strict_later(response, ground_truth, **extra):
    return strict(response, ground_truth, **extra)
"""

# Most of what is nested or long takes these verifiers longer than the test has: some stand for all of it.
HANGING_IN_MATH_VERIFY = (
    "power tower in latex",
    "factorial",
    "10 MB of digits",
    "5000 nested parentheses",
    "big polynomial",
    "1 MB of words",
)
QUICK_IN_MATH_VERIFY = (
    "power tower",
    "factorial of a power",
    "huge exponent",
    "division by zero",
    "nan",
    "5000 digits",
    "full-width digits",
    "mathematical digits",
    "5000 nested boxes",
    "5000 nested answers",
    "endless macro",
    "doubling macros",
    "reads a file",
    "unclosed environment",
    "only commands",
    "empty boxes",
    "open boxes",
)
TEXTS_AND_PROGRAMS = ("empty", "query")  # from the first to the last of them: all texts and programs
SPACED = frozenset({"separators"})  # 42 and white space
SLOW_TEXTS = {"deep JSON", "shell", "endless lambda"}


def names_between(names: list[str], first: str, last: str) -> list[str]:
    return names[names.index(first) : names.index(last) + 1]


@dataclass(frozen=True)
class Case:
    reward: str
    right: str
    ground_truth: str
    mark: Callable[[str], str] = str
    extra: dict[str, object] = field(default_factory=dict)
    timeout_s: float = PATIENT_S
    names: Callable[[list[str]], list[str]] = list
    right_names: frozenset[str] = frozenset()  # hostile to look at, but right all the same


def gym_case(task: str, timeout_s: float = PATIENT_S, names: Callable[[list[str]], list[str]] = list) -> Case:
    parameters = {"seed": 3, "size": 2}
    answer = str(reasoning_gym.create_dataset(task, **parameters)[0]["answer"])
    extra: dict[str, object] = {"task": task, "parameters": parameters, "index": 0}
    return Case(
        "reasoning_gym", f"<answer>{answer}</answer>", answer, "<answer>{}</answer>".format, extra, timeout_s, names
    )


def only_programs(names: list[str]) -> list[str]:
    return names_between(names, "system call", "query")


def for_math_verify(names: list[str]) -> list[str]:
    light = [name for name in names_between(names, *TEXTS_AND_PROGRAMS) if name not in SLOW_TEXTS]
    return [*HANGING_IN_MATH_VERIFY, *QUICK_IN_MATH_VERIFY, *light]


CASES = {
    "dapo_math": lambda: Case("dapo_math", "Answer: 42", "42", "Answer: {}".format, right_names=SPACED),
    "math_verify": lambda: Case(
        "math_verify",
        "It is \\boxed{42}.",
        "42",
        lambda answer: f"It is \\boxed{{{answer}}}.",
        timeout_s=IMPATIENT_S,
        names=for_math_verify,
        right_names=SPACED | {"5000 nested boxes"},
    ),
    "exact": lambda: Case("exact", "42", "42", right_names=SPACED),
    "small_arithmetic": lambda: Case("small_arithmetic", "42", "42", right_names=SPACED),
    "chain_sum": lambda: gym_case("chain_sum"),  # its verifier compares text
    "n_queens": lambda: gym_case("n_queens", IMPATIENT_S, only_programs),  # evaluates the answer
    "countdown": lambda: gym_case("countdown", IMPATIENT_S, only_programs),  # has sympy evaluate it
    "user": lambda: Case("user_rewards:strict", "42", "42"),
    "user, async": lambda: Case("user_rewards:strict_later", "42", "42"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_answer_costs_its_own_verdict_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "user_rewards.py").write_text(USER_REWARDS)
    (tmp_path / "work").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.chdir(tmp_path / "work")  # where a program would leave its files
    answers = hostile_answers(str(tmp_path / "work" / "made_by_an_answer"))
    names = case.names(list(answers))
    responses = [text for answer in names for text in (case.mark(answers[answer]), case.right)]

    with GraderPool(case.reward, timeout_s=case.timeout_s, memory_bytes=MEMORY_BYTES, num_workers=NUM_WORKERS) as pool:
        baseline = max(resident_bytes(pid) for pid in pool.pids)
        start = time.monotonic()
        with PeakMemory(pool) as peak:
            verdicts = pool.grade(responses, [case.ground_truth] * len(responses), [case.extra] * len(responses))
        elapsed = time.monotonic() - start
        right_again = pool.grade([case.right], [case.ground_truth], [case.extra])
        assert len(pool.pids) == NUM_WORKERS
        assert all(os.path.exists(f"/proc/{pid}") for pid in pool.pids)

    errors = [verdict for verdict in verdicts[::2] if isinstance(verdict, GraderError)]
    kinds = collections.Counter(error.kind for error in errors)
    print(f"\n{name}: {len(names)} hostile answers in {elapsed:.1f} s, {dict(kinds) or 'no errors'}")
    print(f"{pool.num_replaced} processes replaced, peak {peak.bytes / MIB:.0f} MiB ({baseline / MIB:.0f} at start)")
    unlike_right = [verdict for verdict in verdicts[1::2] + right_again if not is_right(verdict)]
    assert not unlike_right, unlike_right[:3]
    assert {answer for answer, verdict in zip(names, verdicts[::2]) if is_right(verdict)} == case.right_names
    assert elapsed < len(names) * 0.2 + (case.timeout_s + RESTART_S) * (pool.num_replaced / NUM_WORKERS + 1)
    assert peak.bytes <= baseline + MEMORY_BYTES
    assert os.listdir(tmp_path / "work") == []
    if name == "math_verify":
        hung = dict(zip(names, verdicts[::2]))
        assert all(isinstance(hung[answer], GraderError) for answer in HANGING_IN_MATH_VERIFY)


def test_the_suite_is_large_enough() -> None:
    names = list(hostile_answers("x"))
    assert sum(len(case().names(names)) for case in CASES.values()) >= 1_000
    assert len(names) >= 170


def is_right(verdict: RewardResult | GraderError) -> bool:
    return isinstance(verdict, RewardResult) and verdict.accuracy == 1.0


class PeakMemory:
    """The largest resident memory that a process of the pool ever had: the kernel's own high-water marks."""

    def __init__(self, pool: GraderPool) -> None:
        self.bytes = 0
        self._pool = pool
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            for pid in self._pool.pids:
                self.bytes = max(self.bytes, resident_bytes(pid, "VmHWM"))


def resident_bytes(pid: int, mark: str = "VmRSS") -> int:
    """0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith(f"{mark}:")]
    return int(lines[0][1]) * 1024 if lines else 0
