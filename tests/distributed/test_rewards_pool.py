"""The grader pool: what one bad answer costs, what a reward can break, and that no process stays."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from misbehaving import CUSTOM

from megatron_fipo.rewards import GraderPool, grade
from megatron_fipo.types import GraderError, RewardResult

MIB = 1 << 20
RIGHT = RewardResult(1.0, 1.0, "ok")


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with a reward where it can be imported; gives `module:function`."""

    def write(source: str, name: str = "my_reward") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        return f"{name}:misbehave"

    return write


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraderPool]:
    """One pool for all tests that end no more than single workers."""
    directory = tmp_path_factory.mktemp("reward")
    (directory / "misbehaving_reward.py").write_text(CUSTOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        name = "misbehaving_reward:misbehave"
        with GraderPool(name, timeout_s=1.0, memory_bytes=256 * MIB, num_workers=2) as pool:
            yield pool


def grade_all(pool: GraderPool, *responses: str) -> list[RewardResult | GraderError]:
    return pool.grade(responses, ["x"] * len(responses))


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        ("power", "timeout", "no verdict after 1 s"),
        ("huge", "memory", "MemoryError"),
        ("exit", "crash", "ended with exit code 3"),
        ("sys.exit", "exception", "SystemExit: bye"),
        ("raise", "exception", "KeyError: 'no such key'"),
        ("unprintable", "exception", "Odd"),
        ("wrong type", "exception", "returned float, wanted RewardResult"),
        ("nan", "exception", "score nan"),
        ("accuracy 2", "exception", "accuracy 2.0"),
    ],
)
def test_a_bad_answer_costs_its_own_verdict_only(pool: GraderPool, response: str, kind: str, message: str) -> None:
    num_replaced = pool.num_replaced
    verdicts = grade_all(pool, *["good"] * 30, response, *["good"] * 30)
    found = verdicts.pop(30)
    assert isinstance(found, GraderError)
    assert found.kind == kind
    assert message in found.message
    assert verdicts == [RIGHT] * 60
    # Memory that ran out may have been lost to earlier answers: a fresh process tries again, and is replaced as well.
    assert pool.num_replaced - num_replaced == {"exception": 0, "timeout": 1, "crash": 1, "memory": 2}[kind]
    assert grade_all(pool, "good") == [RIGHT]


@pytest.mark.parametrize("response", ["regex", "sum"])
def test_the_time_limit_holds_in_c_code(pool: GraderPool, response: str) -> None:
    start = time.monotonic()
    hung, good = grade_all(pool, response, "good")
    assert hung == GraderError("timeout", "no verdict after 1 s")
    assert good == RIGHT
    assert time.monotonic() - start < 5.0


def test_recursion_without_end_is_an_error_of_its_answer(pool: GraderPool) -> None:
    num_replaced = pool.num_replaced
    (verdict,) = grade_all(pool, "recursion")
    assert isinstance(verdict, GraderError)
    assert (verdict.kind, "RecursionError" in verdict.message) == ("exception", True)
    assert pool.num_replaced == num_replaced


def test_an_answer_does_not_pay_for_the_memory_that_earlier_ones_kept(custom: Callable[[str], str]) -> None:
    with GraderPool(custom(CUSTOM), timeout_s=10.0, memory_bytes=100 * MIB, num_workers=1) as pool:
        assert grade_all(pool, *["leak"] * 6) == [RIGHT] * 6  # a process holds two
        assert pool.num_replaced == 2


@pytest.fixture(scope="module")
def async_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraderPool]:
    directory = tmp_path_factory.mktemp("async_reward")
    (directory / "async_reward.py").write_text(CUSTOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        with GraderPool("async_reward:misbehave_later", timeout_s=1.0, memory_bytes=512 * MIB, num_workers=2) as pool:
            yield pool


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        ("forever", "timeout", "no verdict after 1 s"),
        ("power", "timeout", "no verdict after 1 s"),
        ("stubborn", "timeout", "no verdict after 1 s"),
        ("huge", "memory", "MemoryError"),
        ("exit", "crash", "ended with exit code 3"),
        ("sys.exit", "exception", "SystemExit: bye"),
        ("raise", "exception", "KeyError: 'no such key'"),
        ("wrong type", "exception", "returned float, wanted RewardResult"),
    ],
)
def test_an_async_reward_is_awaited_under_the_same_limits(
    async_pool: GraderPool, response: str, kind: str, message: str
) -> None:
    first, found, last = grade_all(async_pool, "good", response, "good")
    assert first == last == RIGHT
    assert isinstance(found, GraderError)
    assert found.kind == kind
    assert message in found.message


def test_an_async_reward_may_wait_for_several_things_at_once(async_pool: GraderPool) -> None:
    assert grade_all(async_pool, "gather", "good") == [RewardResult(10.0, 1.0, None), RIGHT]


def test_tasks_that_an_async_reward_leaves_end_with_its_answer(custom: Callable[[str], str]) -> None:
    name = custom(CUSTOM).replace("misbehave", "misbehave_later")
    with GraderPool(name, timeout_s=5.0, memory_bytes=256 * MIB, num_workers=1) as pool:
        assert grade_all(pool, "background", "tasks") == [RIGHT, RewardResult(1.0, 1.0, "[True]")]


def test_an_async_callable_object_is_awaited_too(custom: Callable[[str], str]) -> None:
    name = custom(CUSTOM).replace("misbehave", "judge")
    assert grade(name, ["a"], ["b"], timeout_s=5.0, memory_bytes=256 * MIB, num_workers=1) == [
        RewardResult(0.25, 0.0, "a")
    ]


def test_many_hanging_answers_are_each_a_timeout_and_the_pool_goes_on(pool: GraderPool) -> None:
    verdicts = grade_all(pool, "loop", "good", "loop", "good", "exit", "good")
    assert [v.kind if isinstance(v, GraderError) else "right" for v in verdicts] == [
        "timeout",
        "right",
        "timeout",
        "right",
        "crash",
        "right",
    ]
    assert len(pool.pids) == 2


def test_time_is_counted_per_answer_not_per_batch(pool: GraderPool) -> None:
    assert grade_all(pool, *["sleep"] * 60) == [RIGHT] * 60  # 1.5 s per worker at a limit of 1 s


def test_what_a_reward_prints_or_reads_does_not_reach_the_protocol(pool: GraderPool) -> None:
    num_replaced = pool.num_replaced
    assert grade_all(pool, "print", "stdin", "good") == [RIGHT] * 3
    assert pool.num_replaced == num_replaced


def test_a_failed_call_leaves_no_reply_for_the_next(
    custom: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with GraderPool(custom(CUSTOM), timeout_s=5.0, memory_bytes=256 * MIB, num_workers=1) as pool:
        pids = pool.pids
        monkeypatch.setattr(pool, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grade_all(pool, "good")
        assert not any(is_running(pid) for pid in pids)
        with pytest.raises(AssertionError, match="closed"):
            grade_all(pool, "good")


def test_answers_and_messages_come_back_cut_to_size(pool: GraderPool) -> None:
    answer, message = grade_all(pool, "long answer", "long message")
    assert isinstance(answer, RewardResult)
    assert answer.answer == "a" * 1_000
    assert isinstance(message, GraderError)
    assert len(message.message) == 2_000


def test_any_text_arrives_unharmed(pool: GraderPool) -> None:
    texts = [
        "a" * MIB,
        "9" * (10 * MIB),
        "\U0010ffff\u202e\x1b[2J" * 1000,
        "\x00\n\r",
        "\ud800 alone",
        "\U0001f600\u2028",
        '{"id": 0}\n{"id": 1}',
        "",
    ]
    verdicts = pool.grade(["echo"] * len(texts), texts)
    assert verdicts == [RewardResult(float(len(text)), 1.0, text[:10]) for text in texts]


def test_workers_stay_light(pool: GraderPool) -> None:
    assert grade_all(pool, "modules") == [RewardResult(1.0, 1.0, "")]


def test_results_keep_their_order_over_many_uneven_answers() -> None:
    responses = [str(i) if i % 3 else "x" * (i * 40) for i in range(1500)]
    with GraderPool("exact", timeout_s=5.0, memory_bytes=256 * MIB, num_workers=2) as pool:
        verdicts = pool.grade(responses, [str(i) for i in range(1500)])
        assert [isinstance(v, RewardResult) and v.accuracy for v in verdicts] == [float(i % 3 > 0) for i in range(1500)]
        pids = pool.pids
        assert pool.grade([], []) == []
        assert pool.grade(["7"], ["7"]) == [RewardResult(1.0, 1.0, "7")]
        assert pool.pids == pids


def test_extras_reach_the_reward() -> None:
    extras = [{"finish_reason": "stop"}, {"finish_reason": "length"}]
    verdicts = grade("small_arithmetic", ["9", "9"], ["9", "9"], timeout_s=5, memory_bytes=256 * MIB, extras=extras)
    assert [v.accuracy for v in verdicts if isinstance(v, RewardResult)] == [1.0, 0.0]


def test_hostile_ground_truths_and_extras_reach_the_reward_unharmed(pool: GraderPool) -> None:
    extras = [
        {"\ud800": "\udfff\x00\n"},
        {"n": float("nan"), "i": float("inf")},
        {"deep": [[[{"a": [1]}]]]},
        {"a" * 100: 1},
    ]
    truths = ["\ud800\x00", "\n\n\r", '"}\\u0000', "\udc80" * 10]
    assert pool.grade(["echo"] * 4, truths, extras) == [RewardResult(float(len(t)), 1.0, t[:10]) for t in truths]
    clash, good = pool.grade(["echo", "good"], ["x", "x"], [{"response": "mine"}, {}])
    assert isinstance(clash, GraderError)
    assert "multiple values for argument 'response'" in clash.message
    assert good == RIGHT


def test_an_answer_that_does_not_fit_the_memory_is_a_memory_error(custom: Callable[[str], str]) -> None:
    texts = ["\u1234" * (20 * MIB), "ok"]
    verdicts = grade(custom(CUSTOM), texts, ["x", "x"], timeout_s=30.0, memory_bytes=64 * MIB, num_workers=1)
    assert isinstance(verdicts[0], GraderError)
    assert verdicts[0].kind == "memory"
    assert verdicts[1] == RIGHT


def test_reasoning_gym_fits_a_small_memory_limit_because_imports_are_not_counted() -> None:
    extra = {"task": "chain_sum", "parameters": {"seed": 1, "size": 10}, "index": 0}
    (verdict,) = grade("reasoning_gym", ["x"], ["x"], timeout_s=5, memory_bytes=64 * MIB, extras=[extra], num_workers=1)
    assert isinstance(verdict, GraderError)
    assert "not reproducible" in verdict.message


def test_memory_is_limited_above_what_a_worker_starts_with(custom: Callable[[str], str]) -> None:
    name = custom(CUSTOM)
    (verdict,) = grade(name, ["grow"], ["x"], timeout_s=60, memory_bytes=64 * MIB, num_workers=1)
    assert isinstance(verdict, GraderError)
    assert (verdict.kind, verdict.message) == ("memory", "MemoryError")


def test_wrong_arguments_are_named(pool: GraderPool) -> None:
    with pytest.raises(ValueError, match="2 responses with 1 ground truths"):
        pool.grade(["a", "b"], ["a"])
    circular: dict[str, object] = {}
    circular["self"] = circular
    for extra in ({"when": object()}, {"bytes": b"x"}, circular, {"number": 10**5000}):
        with pytest.raises(ValueError, match="extra of answer 1 is not made of JSON types"):
            pool.grade(["a", "b"], ["a", "b"], [{}, extra])
    assert grade_all(pool, "good") == [RIGHT]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def misbehave(", "SyntaxError"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("misbehave = 3", "has no function 'misbehave'"),
        ("import os; os._exit(3)", "the grader process ended with exit code 3"),
        ("while True: pass", "its grader process was not ready after 2 s"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_a_clear_error(
    custom: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    if "while" in source:
        monkeypatch.setattr("megatron_fipo.rewards.pool.START_TIMEOUT_S", 2.0)
    before = psutil.Process().children()
    with pytest.raises(
        ValueError, match=r"'my_reward:misbehave' \(--custom-rm-path or --rm-type\) cannot be loaded"
    ) as caught:
        GraderPool(custom(source), timeout_s=1.0, memory_bytes=256 * MIB, num_workers=2)
    assert message in str(caught.value)
    assert psutil.Process().children() == before


@pytest.mark.parametrize("response", ["child", "daemon"])
def test_closing_ends_every_worker_and_what_it_started(
    custom: Callable[[str], str], tmp_path: Path, response: str
) -> None:
    with GraderPool(custom(CUSTOM), timeout_s=2.0, memory_bytes=256 * MIB, num_workers=2) as pool:
        pids = pool.pids
        (verdict,) = pool.grade([response], [str(tmp_path / "pid")])
        assert isinstance(verdict, GraderError)
        assert verdict.kind == "timeout"
        pids += pool.pids
    grandchild = int((tmp_path / "pid").read_text())
    assert not any(is_running(pid) for pid in pids)
    wait_until(lambda: not is_running(grandchild))
    pool.close()


def test_what_asks_a_run_to_end_spares_the_worker_but_not_what_its_reward_starts(custom: Callable[[str], str]) -> None:
    """A reward ends its own children by a signal, as timeout(1) does; Slurm signals the worker as well."""
    source = (
        "import multiprocessing, os, signal, subprocess, time\n"
        "from megatron_fipo.types import RewardResult\n"
        "def misbehave(response, ground_truth):\n"
        "    number = getattr(signal, response)\n"
        "    os.kill(os.getpid(), number)\n"
        "    program = subprocess.Popen(['sleep', '60'])\n"
        "    forked = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    forked.start(), time.sleep(0.2)\n"
        "    for pid in (program.pid, forked.pid):\n"
        "        os.kill(pid, number)\n"
        "    forked.join()\n"
        "    return RewardResult(1.0, 1.0, f'{program.wait()} {forked.exitcode}')\n"
    )
    names = ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"]
    with GraderPool(custom(source), timeout_s=5.0, memory_bytes=256 * MIB, num_workers=1) as pool:
        pids = pool.pids
        verdicts = pool.grade(names, ["x"] * len(names))
        assert pool.pids == pids
    ended = [f"{-getattr(signal, name)} {-getattr(signal, name)}" for name in names]
    assert [verdict.answer if isinstance(verdict, RewardResult) else verdict for verdict in verdicts] == ended


def test_a_worker_killed_from_outside_is_replaced_at_no_answers_cost(pool: GraderPool) -> None:
    num_replaced = pool.num_replaced
    killed = psutil.Process(pool.pids[0])
    killed.send_signal(signal.SIGKILL)
    wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE)
    assert grade_all(pool, "good", "good", "good") == [RIGHT] * 3
    assert pool.num_replaced == num_replaced + 1


def test_idle_and_hung_workers_end_when_their_parent_is_killed(custom: Callable[[str], str]) -> None:
    name = custom(CUSTOM)
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from megatron_fipo.rewards import GraderPool\n"
        f"pool = GraderPool({name!r}, timeout_s=1.0, memory_bytes=1 << 28, num_workers=2)\n"
        "print(*pool.pids, flush=True)\n"
        "pool.timeout_s = 600.0\n"  # the parent does not end it
        "pool.grade(['power'], ['x'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids), timeout_s=10.0)


def test_a_cheap_answer_costs_under_a_millisecond() -> None:
    with GraderPool("small_arithmetic", timeout_s=5.0, memory_bytes=256 * MIB, num_workers=2) as pool:
        start = time.process_time()
        pool.grade(["9"] * 2000, ["9"] * 2000)
        assert (time.process_time() - start) / 2000 < 1e-3


def interrupt() -> None:
    raise KeyboardInterrupt


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
