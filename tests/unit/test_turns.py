"""The hybrid engine: whose turn it is, what happens in which order in each, and what becomes of failures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from fake_pool import NAMES, WEIGHTS, FakeActor, FakeOffloader, FakePool, sums

from megatron_fipo.hybrid import node_engines, turns
from megatron_fipo.hybrid.node_engines import first_difference
from megatron_fipo.hybrid.states import TURNS, State, next_state
from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.rollout.engine import EngineError, NoEngineLeft
from megatron_fipo.types import GenerateRequest, SamplingSettings

REQUEST = GenerateRequest("p/0", np.arange(3), SamplingSettings(max_response_len=4), seed=1)
SERVED = [("begin",), ("push", NAMES), ("resume", "kv_cache")]  # then ("end", VERSION)


class Stage:
    """A hybrid engine over fakes, and the diary that all of them write to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        monkeypatch.setattr(node_engines, "expected_checksums", sums)
        monkeypatch.setattr(turns, "Offloader", lambda *_: FakeOffloader(self.diary))
        self.diary: list[Any] = []
        self.said: list[str] = []
        self.pool, self.actor = FakePool(self.diary), FakeActor(self.diary)
        options = {"bucket_bytes": 1 << 20, "say": self.said.append, **options}
        self.engine = HybridEngine(self.actor, self.pool, **options)  # type: ignore[arg-type]

    def taken(self) -> list[Any]:
        """The diary since the last call."""
        taken = list(self.diary)
        self.diary.clear()
        return taken


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


ALLOWED = {
    ("training", "syncing"),
    ("training", "failed"),
    ("syncing", "generating"),
    ("syncing", "failed"),
    ("generating", "generating"),
    ("generating", "training"),
    ("generating", "syncing"),
    ("generating", "failed"),
}


@pytest.mark.parametrize("state", TURNS)
@pytest.mark.parametrize("wanted", TURNS)
def test_every_turn_is_allowed_or_refused_by_name(state: State, wanted: State) -> None:
    if (state, wanted) in ALLOWED:
        assert next_state(state, wanted) == wanted
        return
    with pytest.raises(AssertionError, match=f"^{state} -> {wanted} is no turn of the hybrid engine"):
        next_state(state, wanted)


def test_a_step_takes_its_turns_and_completions_carry_the_version(stage: Stage) -> None:
    engine = stage.engine
    assert (engine.state, engine.weight_version) == ("training", -1)
    assert engine.sync_weights(0) is None
    assert (engine.state, engine.weight_version) == ("generating", 0)
    assert [c.weight_version for c in engine.generate([REQUEST])] == [0]
    assert [c.weight_version for c in engine.generate([REQUEST, REQUEST])] == [0, 0]
    assert stage.taken() == [("resume", "weights"), *SERVED, ("end", 0), ("checksums",), *[("generate", 0)] * 2]
    engine.start_training()
    assert engine.state == "training"
    assert stage.taken() == [("release", "kv_cache", "weights")]
    assert engine.sync_weights(1) is None
    assert [c.weight_version for c in engine.generate([REQUEST])] == [1]
    assert stage.taken() == [("resume", "weights"), *SERVED, ("end", 1), ("generate", 1)]
    assert stage.said == []


def test_weights_arrive_whole_in_order_and_in_buckets_of_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, bucket_bytes=64)
    stage.engine.sync_weights(7)
    assert [entry[1] for entry in stage.diary if entry[0] == "push"] == [[name] for name in NAMES]
    assert list(stage.pool.held) == NAMES
    assert all(torch.equal(stage.pool.held[name], tensor) for name, tensor in WEIGHTS)
    assert stage.actor.num_exhausted == 1


def test_the_actor_makes_room_for_weights_and_then_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, offload_trainer=True)
    engine = stage.engine
    engine.sync_weights(0)
    wanted = [
        ("leave", "gradients", "optimizer"),
        ("release", "kv_cache", "weights"),
        ("resume", "weights"),
        ("begin",),
        ("push", NAMES),
        ("leave", "parameters"),
        ("resume", "kv_cache"),
        ("end", 0),
    ]
    assert stage.taken() == [*wanted, ("checksums",)]
    assert engine.memory()["memory/offloaded"] == 3.0
    engine.start_training()
    assert stage.taken() == [("release", "kv_cache", "weights"), ("enter", "parameters", "gradients", "optimizer")]
    engine.sync_weights(1)
    assert stage.taken() == [*wanted[:-1], ("end", 1)]
    engine.resync()  # from generating: the parameters come back for it
    assert stage.taken() == [wanted[1], ("enter", "parameters"), *wanted[2:-1], ("end", 1)]


def test_an_engine_that_is_started_again_has_the_device_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, offload_trainer=True)
    stage.engine.sync_weights(0)
    stage.engine.start_training()
    stage.pool.failed = {"two": "died"}
    stage.taken()
    stage.engine.sync_weights(1)
    assert stage.taken() == [
        ("leave", "gradients", "optimizer"),
        ("restart", "two"),
        ("leave", "parameters"),
        ("await restarted",),
        ("release", "kv_cache", "weights"),
        ("enter", "parameters"),
        ("resume", "weights"),
        ("begin",),
        ("push", NAMES),
        ("leave", "parameters"),
        ("resume", "kv_cache"),
        ("end", 1),
        ("checksums",),  # it has never been compared
    ]


def test_engines_that_do_not_start_again_are_tried_once_more_before_the_actor_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(monkeypatch, offload_trainer=True)
    stage.pool.failed = {"one": "died", "two": "died"}
    stage.pool.names_not_starting = [["one", "two"]]
    assert stage.engine.sync_weights(0) is None
    assert stage.taken()[1:7] == [
        ("restart", "one", "two"),
        ("leave", "parameters"),
        ("await restarted",),
        ("restart", "one", "two"),
        ("await restarted",),
        ("release", "kv_cache", "weights"),
    ]


def test_engines_beside_the_trainer_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, placement="disaggregated")
    stage.engine.sync_weights(0)
    stage.engine.start_training()
    stage.engine.sync_weights(1)
    stage.engine.generate([REQUEST])
    update = [("begin",), ("push", NAMES)]
    assert stage.taken() == [*update, ("end", 0), ("checksums",), *update, ("end", 1), ("generate", 1)]
    with pytest.raises(AssertionError, match="engines beside the trainer need no room"):
        Stage(monkeypatch, placement="disaggregated", offload_trainer=True)


def test_generating_and_training_out_of_turn_are_refused(stage: Stage) -> None:
    engine = stage.engine
    for refused, match in (
        (lambda: engine.generate([REQUEST]), "training -> generating is no turn of the hybrid engine"),
        (engine.start_training, "training -> training"),
        (engine.resync, "no weights were ever sent"),
    ):
        with pytest.raises(AssertionError, match=match):
            refused()
    engine.sync_weights(0)
    engine.start_training()
    with pytest.raises(AssertionError, match="training -> generating"):
        engine.generate([REQUEST])
    assert not any(entry[0] == "generate" for entry in stage.diary)


@pytest.mark.parametrize("call", ["restart", "resume", "begin", "push", "end", "checksums"])
def test_engines_that_all_fail_once_in_a_sync_are_started_again_and_get_everything(stage: Stage, call: str) -> None:
    stage.pool.failed = {"two": "died before"} if call == "restart" else {}
    stage.pool.failing[call] = EngineError("gone")
    assert stage.engine.sync_weights(4) is None
    assert (stage.engine.state, stage.engine.weight_version, stage.pool.weight_version) == ("generating", 4, 4)
    assert stage.actor.num_exhausted == 2
    last = stage.taken()[-len(SERVED) - 2 :]
    assert last == [*SERVED, ("end", 4), ("checksums",)]
    assert stage.said == ["warning: no engine took weight version 4; those that may be are started again"]


@pytest.mark.parametrize("call", ["restart", "resume", "begin", "push", "end", "checksums"])
def test_a_sync_that_leaves_no_engine_is_returned_and_final(stage: Stage, call: str) -> None:
    assert stage.engine.sync_weights(0) is None
    stage.engine.start_training()
    stage.taken()
    stage.pool.failed = {"two": "died before"}
    stage.pool.failing[call], stage.pool.forever = NoEngineLeft("both are gone for good"), True
    failure = stage.engine.sync_weights(1)
    assert isinstance(failure, NoEngineLeft)
    assert "both are gone for good" in str(failure)
    assert stage.actor.num_exhausted == 2, "the other ranks send their parts all the same"
    assert (stage.engine.state, stage.engine.weight_version) == ("failed", 0)
    calls = [entry[0] for entry in stage.taken()]
    assert calls.count(call) == 1
    assert calls[-1] == call, "nothing is asked of engines that have failed"
    assert_failed_for_good(stage, "both are gone for good")


@pytest.mark.parametrize("call", ["release", "restart", "resume", "begin", "push", "end", "checksums"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("a signal"), MemoryError("no memory")])
def test_any_other_error_in_a_turn_is_raised_and_final(
    monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    stage = Stage(monkeypatch)
    stage.engine.sync_weights(0)
    stage.pool.failed = {"two": "died before"}
    stage.pool.failing[call] = error

    def turn() -> None:
        stage.engine.start_training()
        stage.engine.sync_weights(1)

    with pytest.raises(type(error), match=str(error)):
        turn()
    assert_failed_for_good(stage, str(error))


def assert_failed_for_good(stage: Stage, reason: str) -> None:
    stage.pool.failing.clear()
    before = len(stage.diary)

    def work() -> None:
        with stage.engine.actor_at_work():
            raise AssertionError("let in")

    for refused in (
        lambda: stage.engine.sync_weights(1),
        lambda: stage.engine.generate([REQUEST]),
        stage.engine.start_training,
        stage.engine.resync,
        work,
    ):
        with pytest.raises(AssertionError, match=f"failed.*{reason}"):
            refused()
    assert stage.engine.state == "failed"
    assert len(stage.diary) == before


def test_an_engine_that_fails_before_training_is_missed_only_at_the_next_sync(stage: Stage) -> None:
    stage.engine.sync_weights(0)
    stage.pool.failing["release"] = EngineError("died of age\nits log")
    stage.engine.start_training()
    assert stage.engine.state == "training"
    assert stage.said == ["warning: died of age"]
    assert stage.engine.sync_weights(1) is None
    assert ("restart", "one", "two") in stage.diary


def test_an_engine_that_holds_other_weights_is_set_aside_by_name(stage: Stage) -> None:
    stage.pool.holding_else = {"two"}
    assert stage.engine.sync_weights(0) is None
    reason = "engine two holds other weights than it was sent: its rank 0 has checksum other for b.weight, not 6.0"
    assert stage.pool.failed == {"two": reason}
    stage.pool.holding_else = set()
    stage.engine.start_training()
    assert stage.engine.sync_weights(1) is None
    assert stage.pool.failed == {}
    assert [entry[0] for entry in stage.diary].count("checksums") == 2, "the one that was started again is compared"
    stage.engine.start_training()
    stage.engine.sync_weights(2)
    assert [entry[0] for entry in stage.diary].count("checksums") == 2


def test_when_every_engine_holds_other_weights_they_are_started_again_until_they_may_not(stage: Stage) -> None:
    stage.pool.holding_else = {"one", "two"}
    begin = stage.pool.begin_weight_update

    def begin_or_give_up() -> None:
        if stage.pool.num_restarts_in_all > 4:
            stage.pool.failing["begin"] = NoEngineLeft("no engine may be started again")
        begin()

    stage.pool.begin_weight_update = begin_or_give_up  # type: ignore[method-assign]
    failure = stage.engine.sync_weights(0)
    assert isinstance(failure, NoEngineLeft)
    assert stage.actor.num_exhausted == 4
    assert stage.engine.state == "failed"


@pytest.mark.parametrize(
    ("interval", "checked"), [(-1, []), (0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])]
)
def test_weights_are_compared_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, interval: int, checked: list[int]
) -> None:
    stage = Stage(monkeypatch, check_weights_interval=interval)
    found = []
    for version in range(5):
        stage.taken()
        stage.engine.sync_weights(version)
        found += [version] if ("checksums",) in stage.taken() else []
        stage.engine.start_training()
    assert found == checked
    stage.pool.failed = {"two": "died"}
    stage.engine.sync_weights(5)
    assert (("checksums",) in stage.taken()) == (interval >= 0), "an engine that was started again is compared"


def test_experts_that_an_engines_ranks_share_out_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, tp_size=2, ep_size=2)
    experts = {"model.layers.0.mlp.experts.w2_weight": "all of them"}
    monkeypatch.setattr(node_engines, "expected_checksums", lambda *a, **b: [sums(*a, **b)[0] | experts])
    stage.pool.holding_else = {"two"}
    assert stage.engine.sync_weights(0) is None
    assert set(stage.pool.failed) == {"two"}, "all else is compared"


def test_what_differs_is_named_by_rank_and_parameter() -> None:
    expected: list[Mapping[str, str]] = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert first_difference(expected, [{"b": "2", "a": "1"}, {"a": "3", "b": "4"}]) is None
    assert first_difference(expected, [expected[0], {"a": "3", "b": "5"}]) == "its rank 1 has checksum 5 for b, not 4"
    assert first_difference(expected, [{"a": "1"}, expected[1]]) == "its rank 0 has nothing for b, not 2"
    assert first_difference(expected, [{**expected[0], "c": "7"}, expected[1]]) == (
        "its rank 0 has checksum 7 for c, not nothing"
    )
    assert first_difference(expected, [{**expected[0], "c": "7"}, expected[1]], expected_alone=True) is None
    assert first_difference(expected, [{"a": "1"}, expected[1]], expected_alone=True) is not None
    assert first_difference(expected, [{"a": "1"}]) == "it answered for 1 tensor-parallel ranks, not 2"


def test_engines_that_all_fail_while_generating_are_revived_with_the_version_they_had(stage: Stage) -> None:
    stage.engine.sync_weights(3)
    stage.pool.failed = {"one": "died", "two": "died"}
    stage.taken()
    assert stage.pool.revive is not None
    stage.pool.revive()
    assert stage.taken() == [("restart", "one", "two"), ("resume", "weights"), *SERVED, ("end", 3), ("checksums",)]
    assert stage.engine.state == "generating"
    stage.pool.failed = {"one": "died", "two": "died"}
    stage.pool.failing["restart"] = NoEngineLeft("none may be started again")
    with pytest.raises(NoEngineLeft, match="none may be started again"):
        stage.pool.revive()
    assert_failed_for_good(stage, "none may be started again")


def test_reviving_is_asked_of_all_ranks_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    stage = Stage(monkeypatch, call_everyone=lambda: called.append("everyone"))
    stage.engine.sync_weights(0)
    assert stage.pool.revive is not None
    stage.pool.revive()
    assert called == ["everyone"]
    diary: list[Any] = []
    alone = FakePool(diary)
    HybridEngine(FakeActor(diary, tp=2), alone, bucket_bytes=64)  # type: ignore[arg-type]
    assert alone.revive is None, "one rank must not send weights without the others"


def test_no_engine_left_while_generating_is_final_and_other_errors_are_not(stage: Stage) -> None:
    stage.engine.sync_weights(0)
    for error in (KeyboardInterrupt("a signal"), EngineError("a request fails every engine")):
        stage.pool.failing["generate"] = error
        with pytest.raises(type(error)):
            stage.engine.generate([REQUEST])
        assert stage.engine.state == "generating", "a checkpoint may still be saved"
    stage.pool.failing["generate"] = NoEngineLeft("all of them died")
    with pytest.raises(NoEngineLeft):
        stage.engine.generate([REQUEST])
    assert_failed_for_good(stage, "all of them died")


def test_the_actor_works_between_two_answers_of_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, offload_trainer=True)
    with stage.engine.actor_at_work():
        assert stage.diary == [], "in training it is at work already"
    stage.engine.sync_weights(0)
    stage.taken()

    with stage.engine.actor_at_work():
        stage.diary.append("work")
    turn = [("release", "kv_cache"), ("enter", "parameters", "optimizer"), "work"]
    assert stage.taken() == [*turn, ("leave", "optimizer", "parameters"), ("resume", "kv_cache")]
    assert stage.engine.state == "generating"
    assert [c.weight_version for c in stage.engine.generate([REQUEST])] == [0]
    stage.taken()

    def work() -> None:
        with stage.engine.actor_at_work():
            stage.diary.append("work")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        work()
    assert stage.taken() == turn, "other ranks may never come to wait for the actor's leave"
    assert_failed_for_good(stage, "the disk is full")


def test_an_actor_that_stays_works_at_any_time(stage: Stage) -> None:
    stage.engine.sync_weights(0)
    stage.taken()
    with stage.engine.actor_at_work():
        assert stage.taken() == []


def test_memory_of_both_sides_is_told_at_each_turn(stage: Stage) -> None:
    stage.engine.sync_weights(0)
    names = ["engines", "trainer", "trainer_peak"]
    of_generating = [*(f"memory/generating/{name}" for name in names), "memory/offloaded"]
    assert sorted(stage.engine.memory()) == of_generating
    stage.engine.start_training()
    memory = stage.engine.memory()
    assert sorted(memory) == sorted([*of_generating, *(f"memory/training/{name}" for name in names)])
    assert 0.05 < memory["memory/training/trainer"] <= memory["memory/training/trainer_peak"] < 100
    assert memory["memory/training/engines"] == memory["memory/offloaded"] == 0.0


def test_engines_are_driven_by_rank_zero_and_weights_received_by_receivers() -> None:
    def make(rank: int, pool: bool, **options: Any) -> HybridEngine:
        diary: list[Any] = []
        local = {"local_pool": FakePool(diary)} if options.pop("local", False) else {}
        return HybridEngine(
            FakeActor(diary, rank, tp=2),  # type: ignore[arg-type]
            FakePool(diary) if pool else None,  # type: ignore[arg-type]
            bucket_bytes=64,
            **local,
            **options,
        )

    for rank, pool in ((0, False), (1, True)):
        with pytest.raises(AssertionError, match="rank 0, and it alone, drives the engines"):
            make(rank, pool)
    with pytest.raises(AssertionError, match=r"receivers are \(0, 1\), this is rank 1"):
        make(1, False, receivers=(0, 1))
    with pytest.raises(AssertionError, match=r"receivers are \(0,\), this is rank 1"):
        make(1, False, receivers=(0,), local=True)
    make(0, True, receivers=(0, 1), local=True)
    with pytest.raises(AssertionError, match="only rank 0 generates"):
        make(1, False, receivers=(0, 1), local=True).generate([REQUEST])
