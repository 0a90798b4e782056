"""Engines whose processes die, stop or are started behind the client's back: real processes, really started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from engines.bench import BUCKET_BYTES, HEALTH_S, LONG_REQUESTS, NUM_ENGINES, Bench, is_listening, patience, update
from engines.test_answers import SLACK_S, is_answered_by_one, same_completions
from fault_table import FaultTable
from left_behind import SHARED_MEMORY, unused_segments

from megatron_fipo.rollout.engine import NO_VERSION, EngineError, NoEngineLeft
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.process_group import group_members
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.weights.bucket import make_buckets

ENDS_WITHIN_S = 15.0  # SGLang looks after its processes once a second


@dataclass(frozen=True)
class Strike:
    """A signal to one of an engine's processes: "server", "scheduler" (of one rank: "scheduler_TP1"), "detokenizer"."""

    signal: signal.Signals
    process: str = "server"

    @property
    def name(self) -> str:
        return f"{self.signal.name} of its {self.process}"

    @property
    def kind(self) -> str:
        return "engine: hangs" if self.signal == signal.SIGSTOP else "engine: death"

    def hit(self, *engines: SGLangEngine) -> None:
        for engine in engines:
            self._hit(engine)

    def _hit(self, engine: SGLangEngine) -> None:
        leader = engine.process_id
        members = group_members(leader)
        if self.process == "server":
            victims = [member.pid for member in members if member.pid == leader]
        else:
            victims = [member.pid for member in members if f"sglang::{self.process}" in " ".join(member.cmdline())]
        assert victims, f"no {self.process} among {members}"
        for pid in victims:
            os.kill(pid, self.signal)

    def let_it_show(self, engine: SGLangEngine) -> None:
        """Return once the engine has ended, when it answered before the strike told: it is to end with any process of
        its own, needed or not. One that was stopped shows at the next question."""
        deadline = time.monotonic() + ENDS_WITHIN_S
        while self.signal != signal.SIGSTOP and time.monotonic() < deadline:
            try:
                engine.check_alive()
            except EngineError:
                return
            time.sleep(0.1)


@dataclass
class Place:
    """Where an engine was: what must be gone after its end."""

    group: int
    port: int
    scratch_dir: Path

    @classmethod
    def of(cls, engine: SGLangEngine) -> Place:
        assert engine.process is not None
        return cls(engine.process_id, int(engine.address.url.rpartition(":")[2]), Path(engine.process.scratch_dir))

    def leftovers(self, segments: set[str]) -> list[str]:
        """What is still there of it, and what lies in shared memory that did not before and nobody uses."""
        found = [f"process {member.pid}" for member in group_members(self.group) if _lives(member)]
        found += [f"port {self.port}"] * is_listening(self.port)
        found += [str(self.scratch_dir)] * self.scratch_dir.exists()
        deadline = time.monotonic() + 5.0
        while (left := unused_segments(segments)) and time.monotonic() < deadline:
            time.sleep(0.1)  # torch's own are removed by a process of its own
        return found + [f"{SHARED_MEMORY}/{name}" for name in left]


class Stage:
    """A pool of the bench's own engines, without proxies, and what is needed to look after it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.said: list[str] = []
        self.pool = EnginePool(bench.engines, health_check_interval_s=patience(HEALTH_S), say=self.said.append)
        self.segments = set(os.listdir(SHARED_MEMORY))
        self.places = [Place.of(engine) for engine in bench.engines]
        update(self.pool, bench.next_version(), bench.weights)

    def revive(self) -> None:
        self.pool.restart_failed()
        update(self.pool, self.pool.weight_version, self.bench.weights)
        self.bench.follow()

    def is_answered(self) -> bool:
        """As undisturbed engines answer: to the last bit, which the shares of two engines allow."""
        return same_completions(self.pool.generate(LONG_REQUESTS), self.bench.long_completions, self.bench.version)

    def is_answered_by_any(self) -> bool:
        completions = self.pool.generate(LONG_REQUESTS)
        return [item.uid for item in completions] == [item.uid for item in LONG_REQUESTS] and {
            item.weight_version for item in completions
        } == {self.bench.version}

    def leftovers(self, index: int) -> list[str]:
        return self.places[index].leftovers(self.segments)


@contextmanager
def striking(strike: Strike, engines: Sequence[SGLangEngine], after_s: float) -> Iterator[None]:
    timer = threading.Timer(after_s, strike.hit, engines)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture
def stage(bench: Bench) -> Iterator[Stage]:
    stage = Stage(bench)
    yield stage
    if stage.pool.failed:
        stage.revive()
    bench.follow()


def record(faults: FaultTable, kind: str, name: str, wanted: str, checks: dict[str, bool]) -> list[str]:
    problems = [f"{name}: {problem}" for problem, is_fine in checks.items() if not is_fine]
    faults.record(kind, name, "; ".join(problems) or wanted, not problems)
    return problems


def strike_while_generating(stage: Stage, faults: FaultTable, strike: Strike, index: int, moment: float) -> list[str]:
    """One engine is struck at `moment` of a batch; the other answers all, to the last bit."""
    started = time.monotonic()
    engine = stage.bench.engines[index]
    with striking(strike, [engine], moment * stage.bench.long_s):
        answered = stage.is_answered()
    if not stage.pool.failed:
        strike.let_it_show(engine)
        answered = answered and stage.is_answered()
    checks = {
        "the answers differ": answered,
        f"set aside: {stage.pool.failed}": list(stage.pool.failed) == [stage.bench.engines[index].name],
        f"it took {time.monotonic() - started:.1f} s": time.monotonic() - started < patience(4 * HEALTH_S + SLACK_S),
        f"left: {stage.leftovers(index)}": not stage.leftovers(index),
    }
    name = f"{strike.name} at {moment:.2f} of a batch, engine {index} of {NUM_ENGINES}"
    return record(faults, strike.kind, name, "answered by the other, bit for bit", checks)


def strike_the_last_while_generating(
    stage: Stage, faults: FaultTable, strike: Strike, index: int, moment: float
) -> list[str]:
    """The only engine left is struck: both are started again with the weights they had, and the batch goes on."""
    restarts = stage.pool.num_restarts_in_all
    stage.pool.revive = stage.revive
    engine = stage.bench.engines[index]
    with striking(strike, [engine], moment * stage.bench.long_s):
        answered = stage.is_answered_by_any()
    if stage.pool.num_restarts_in_all == restarts:
        strike.let_it_show(engine)
        answered = answered and stage.is_answered_by_any()
    checks = {
        "the answers are wrong": answered,
        f"restarts: {stage.said}": stage.pool.num_restarts_in_all == restarts + NUM_ENGINES,
        "not all serve again": not stage.pool.failed and stage.pool.num_alive == NUM_ENGINES,
        "the answers after it differ": stage.is_answered(),
        f"left: {stage.leftovers(index)}": not stage.leftovers(index),
    }
    name = f"{strike.name} at {moment:.2f} of a batch, the last engine"
    return record(faults, strike.kind, name, "both started again, answered", checks)


def strike_all_while_generating(stage: Stage, faults: FaultTable, strike: Strike, moment: float) -> list[str]:
    """Both are struck at once: both are started again, and the batch goes on."""
    restarts = stage.pool.num_restarts_in_all
    stage.pool.revive = stage.revive
    with striking(strike, stage.bench.engines, moment * stage.bench.long_s):
        answered = stage.is_answered_by_any()
    checks = {
        "the answers are wrong": answered,
        f"restarts: {stage.said}": stage.pool.num_restarts_in_all == restarts + NUM_ENGINES,
        "not all serve again": not stage.pool.failed and stage.pool.num_alive == NUM_ENGINES,
        "the answers after it differ": stage.is_answered(),
        f"left: {stage.leftovers(0)}": not stage.leftovers(0) and not stage.leftovers(1),
    }
    name = f"{strike.name} at {moment:.2f} of a batch, all engines at once"
    problems: list[str] = []
    for index in range(NUM_ENGINES):
        problems += record(faults, strike.kind, f"{name}, {index}", "both started again, answered", checks)
    return problems


def strike_while_updating(stage: Stage, faults: FaultTable, strike: Strike, index: int, after: int) -> list[str]:
    """One engine is struck after so many buckets; the other is updated and serves."""
    pool, bench = stage.pool, stage.bench
    pool.begin_weight_update()
    push_and_strike(pool, bench.weights, strike, [bench.engines[index]], after)
    pool.end_weight_update(bench.next_version())
    checks = {
        f"set aside: {pool.failed}": list(pool.failed) == [bench.engines[index].name],
        "it serves all the same": bench.engines[index].weight_version == NO_VERSION,
        "the other's answers are wrong": stage.is_answered_by_any(),
        f"left: {stage.leftovers(index)}": not stage.leftovers(index),
    }
    name = f"{strike.name} after {buckets(after)}, engine {index} of {NUM_ENGINES}"
    return record(faults, strike.kind.replace("death", "death in an update"), name, "set aside, other updated", checks)


def strike_all_while_updating(stage: Stage, faults: FaultTable, strike: Strike, after: int) -> list[str]:
    """Both are struck in an update: an error, and the update may be repeated with both started again."""
    pool, bench = stage.pool, stage.bench
    before, version, message = pool.weight_version, bench.next_version(), ""
    pool.begin_weight_update()
    try:
        push_and_strike(pool, bench.weights, strike, bench.engines, after)
        pool.end_weight_update(version)
    except EngineError as error:
        message = str(error)
    checks = {
        f"no fitting error: {message!r}": all(f"    engine {engine.name} " in message for engine in bench.engines),
        "the version moved": pool.weight_version == before,
        f"left: {stage.leftovers(0)}": not stage.leftovers(0) and not stage.leftovers(1),
    }
    pool.restart_failed()
    update(pool, version, bench.weights)
    bench.follow()
    checks["the answers after another update differ"] = stage.is_answered()
    kind = strike.kind.replace("death", "death in an update")
    name = f"{strike.name} after {buckets(after)}, all engines"
    problems: list[str] = []
    for index in range(NUM_ENGINES):
        problems += record(faults, kind, f"{name}, {index}", "an error, each named; then repeated", checks)
    return problems


def push_and_strike(
    pool: EnginePool,
    weights: Sequence[tuple[str, torch.Tensor]],
    strike: Strike,
    engines: Sequence[SGLangEngine],
    after: int,
) -> None:
    """Push all buckets; strike before number `after` (from 0), at the latest behind the last one."""
    count = 0
    for bucket in make_buckets(weights, BUCKET_BYTES):
        if count == after:
            strike.hit(*engines)
        pool.push_bucket(bucket)
        count += 1
    if after >= count:
        strike.hit(*engines)


KILL_SERVER = Strike(signal.SIGKILL)
KILL_SCHEDULER = Strike(signal.SIGKILL, "scheduler")
KILL_DETOKENIZER = Strike(signal.SIGKILL, "detokenizer")
STOP_SERVER = Strike(signal.SIGSTOP)
STOP_SCHEDULER = Strike(signal.SIGSTOP, "scheduler")
QUIT_SERVER = Strike(signal.SIGQUIT)

# One engine is struck in the first way, then the last one in the second: both are started again once.
ROUNDS = [(KILL_SERVER, 0.3, STOP_SCHEDULER, 0.5)]
MORE_ROUNDS = [
    (KILL_SCHEDULER, 0.1, QUIT_SERVER, 0.7),
    (STOP_SERVER, 0.5, KILL_DETOKENIZER, 0.4),
    (KILL_DETOKENIZER, 0.4, STOP_SERVER, 0.2),
    (STOP_SCHEDULER, 0.8, KILL_SCHEDULER, 0.9),
    (QUIT_SERVER, 0.2, KILL_SERVER, 0.0),
]


BEHIND_THE_LAST = 1 << 10  # bucket


def buckets(after: int) -> str:
    return "all buckets" if after == BEHIND_THE_LAST else f"{after} buckets"


def name_of(round_: tuple[Strike, float, Strike, float]) -> str:
    return f"{round_[0].name} then {round_[2].name}"


@pytest.mark.parametrize(
    "round_",
    [*ROUNDS, *(pytest.param(each, marks=pytest.mark.full_only) for each in MORE_ROUNDS)],
    ids=name_of,
)
def test_a_death_in_a_batch_loses_nothing(
    stage: Stage, faults: FaultTable, round_: tuple[Strike, float, Strike, float]
) -> None:
    first, moment, second, moment_of_last = round_
    index = ROUNDS.index(round_) if round_ in ROUNDS else (1 + MORE_ROUNDS.index(round_)) % NUM_ENGINES
    problems = strike_while_generating(stage, faults, first, index, moment)
    problems += strike_the_last_while_generating(stage, faults, second, 1 - index, moment_of_last)
    assert not problems, "\n".join(problems)


@pytest.mark.full_only
@pytest.mark.parametrize(("strike", "moment"), [(KILL_SERVER, 0.4), (STOP_SCHEDULER, 0.2)], ids=str)
def test_when_all_are_struck_at_once_nothing_is_lost(
    stage: Stage, faults: FaultTable, strike: Strike, moment: float
) -> None:
    problems = strike_all_while_generating(stage, faults, strike, moment)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("one", "everyone", "after"),
    [
        (KILL_SCHEDULER, None, 2),
        pytest.param(KILL_SERVER, KILL_SERVER, 0, marks=pytest.mark.full_only),
        pytest.param(STOP_SCHEDULER, KILL_SCHEDULER, 1, marks=pytest.mark.full_only),
        pytest.param(STOP_SERVER, STOP_SCHEDULER, 3, marks=pytest.mark.full_only),
        pytest.param(STOP_SCHEDULER, KILL_SERVER, BEHIND_THE_LAST, marks=pytest.mark.full_only),
    ],
    ids=str,
)
def test_a_death_in_an_update_leaves_no_mixture(
    stage: Stage, faults: FaultTable, one: Strike, everyone: Strike | None, after: int
) -> None:
    problems = strike_while_updating(stage, faults, one, after % NUM_ENGINES, after)
    stage.pool.restart_failed()
    update(stage.pool, stage.bench.next_version(), stage.bench.weights)
    stage.bench.follow()
    assert stage.is_answered()
    if everyone is not None:
        stage.segments, stage.places = set(os.listdir(SHARED_MEMORY)), [Place.of(e) for e in stage.bench.engines]
        problems += strike_all_while_updating(stage, faults, everyone, after)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("others_too", [False, pytest.param(True, marks=pytest.mark.full_only)])
def test_an_engine_started_again_behind_our_back_serves_nothing(
    bench: Bench, faults: FaultTable, others_too: bool
) -> None:
    """On the same address, with the same key, but with the weights of its checkpoint."""
    pool, said = bench.fresh_pool(max_restarts=0)
    indices = range(NUM_ENGINES) if others_too else (0,)
    for index in indices:
        bench.restart_unnoticed(index)
    message = ""
    try:
        completions = pool.generate(LONG_REQUESTS)
        ok = not others_too and same_completions(completions, bench.long_completions, bench.version)
    except NoEngineLeft as error:
        message = str(error)
        ok = others_too and all(f"    engine e{index} " in message for index in indices)
    ok = ok and sorted(pool.failed) == [f"e{index}" for index in indices]
    ok = ok and all("weight version" in reason for reason in pool.failed.values())
    for index in indices:
        name = f"{'all engines' if others_too else 'one engine'}, {index}"
        faults.record("engine: stale restart", name, message or "; ".join(said), ok)
    pool.shutdown()
    assert ok, (message, said)


@pytest.mark.full_only
def test_an_engine_started_again_behind_our_back_in_an_update_serves_no_mixture(
    bench: Bench, faults: FaultTable
) -> None:
    """It has the weights of its checkpoint in place of the first bucket's."""
    pool, said = bench.fresh_pool(max_restarts=0)
    pool.begin_weight_update()
    for number, bucket in enumerate(make_buckets(bench.weights, BUCKET_BYTES)):
        if number == 1:
            bench.restart_unnoticed(0)
        pool.push_bucket(bucket)
    pool.end_weight_update(bench.next_version())
    ok = list(pool.failed) == ["e0"] and pool.engines[0].weight_version == NO_VERSION
    ok = ok and is_answered_by_one(bench, pool, "generate")
    pool.shutdown()
    bench.repair()
    faults.record("engine: stale restart", "one engine, in an update", "; ".join(said), ok)
    assert ok, said


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
