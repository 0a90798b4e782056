"""Engines of a pool that fail in updates, are started again, and serve no sooner than they have the weights."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import pytest
from fake_engines import BUCKET, FakeEngine, address_of, assert_answered, make_pool, requests_for, update

from megatron_fipo.rollout.engine import EngineError, NoEngineLeft
from megatron_fipo.rollout.event_loop import Background
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.weights.bucket import WeightBucket


def test_an_engine_started_again_serves_after_the_next_update_and_not_before() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("generate", "broke")])]
    pool, said = make_pool(*engines)
    requests = requests_for(4)
    assert_answered(pool.generate(requests), requests)
    assert pool.restart_failed() == ["e1"]
    assert pool.failed == {}
    assert_answered(pool.generate(requests), requests)
    assert len(engines[1].shares) == 1
    update(pool, 1)
    assert engines[1].calls == ["generate", "shutdown", "restart", "ready", "begin", "push", "end"]
    assert_answered(pool.generate(requests), requests, version=1)
    assert len(engines[1].shares) == 2
    assert said[1:] == ["engine e1 is started again (1 of 2)", "engine e1 serves again, with weight version 1"]
    assert pool.restart_failed() == []


def test_restarts_are_counted_until_the_engine_answers() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("generate", "broke")])]
    pool, _ = make_pool(*engines, max_restarts=2)
    requests = requests_for(4)
    pool.generate(requests)
    for version in (1, 2, 3):
        assert pool.restart_failed() == ["e1"]
        update(pool, version)
        assert_answered(pool.generate(requests), requests, version)  # it answers, and the count begins anew
        engines[1].faults = [("generate", "broke")]
        assert_answered(pool.generate(requests), requests, version)
    for version in (4, 5):
        engines[1].faults = [("generate", "broke")]
        assert pool.restart_failed() == ["e1"]
        update(pool, version)
        assert_answered(pool.generate(requests), requests, version)
    assert pool.restart_failed() == []
    update(pool, 6)
    assert_answered(pool.generate(requests), requests, 6)
    assert list(pool.failed) == ["e1"]


@pytest.mark.parametrize("moment", ["begin", "push", "end"])
@pytest.mark.parametrize("how", ["ended", "hang"])
def test_an_engine_that_fails_in_an_update_is_set_aside(moment: str, how: str) -> None:
    engines = [FakeEngine("e0", faults=[(moment, how)]), FakeEngine("e1")]
    pool, said = make_pool(*engines)
    update(pool, 1)
    assert list(pool.failed) == ["e0"]
    assert "shutdown" in engines[0].calls
    requests = requests_for(3)
    assert_answered(pool.generate(requests), requests, 1)
    assert engines[0].shares == []
    assert pool.restart_failed() == ["e0"]
    update(pool, 2)
    assert_answered(pool.generate(requests), requests, 2)
    assert len(engines[0].shares) == 1
    assert len(said) == 3


@pytest.mark.parametrize("moment", ["push", "end"])
def test_an_update_that_every_engine_fails_may_be_begun_anew(moment: str) -> None:
    engines = [FakeEngine(name, faults=[(moment, "ended")]) for name in ("e0", "e1")]
    pool, _ = make_pool(*engines)
    with pytest.raises(
        EngineError, match="every engine failed in a weight update\n    engine e0 ended\n    engine e1"
    ) as caught:
        update(pool, 1)
    assert not isinstance(caught.value, NoEngineLeft)
    assert pool.weight_version == 0
    assert pool.restart_failed() == ["e0", "e1"]
    update(pool, 1)
    requests = requests_for(3)
    assert_answered(pool.generate(requests), requests, 1)


def test_engines_that_all_fail_to_open_an_update_are_started_again_until_given_up() -> None:
    pool, _ = make_pool(FakeEngine("e0", faults=[("begin", "ended"), ("ready", "fell over")]))
    update(pool, 1)
    assert_answered(pool.generate(requests_for(2)), requests_for(2), 1)
    engine = FakeEngine("e0", faults=[("begin", "ended"), ("ready", "fell over"), ("ready", "fell again")])
    pool, _ = make_pool(engine)
    with pytest.raises(NoEngineLeft, match=r"engine e0 fell again \(started again 2 times\)"):
        update(pool, 1)


def test_when_none_is_left_in_the_middle_of_a_batch_they_are_revived_and_the_answers_kept() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("generate", "hang")])]
    pool, said = make_pool(*engines)
    update(pool, 7)
    engines[0].faults = [("generate", lambda completions: completions), ("generate", "broke")]
    revived = []

    def revive() -> None:
        revived.append(pool.restart_failed())
        update(pool, 7)

    pool.revive = revive
    requests = requests_for(5)
    assert_answered(pool.generate(requests), requests, 7)
    assert revived == [["e0", "e1"]]
    answered_first = engines[0].shares[0]
    later = [uid for engine in engines for share in engine.shares[1:] for uid in share]
    assert not set(answered_first) & set(later)  # what had been answered was not asked again
    assert [sorted(share) for share in engines[0].shares[1:2]] == [sorted(engines[1].shares[0])]
    assert any("no engine is left" in line for line in said)


def test_reviving_ends_with_the_restarts() -> None:
    engine = FakeEngine("e0", faults=[("generate", "broke")] * 9)
    pool, _ = make_pool(engine, max_restarts=2, max_retries=9)

    def revive() -> None:
        pool.restart_failed()
        update(pool, 0)

    pool.revive = revive
    with pytest.raises(NoEngineLeft, match=r"engine e0 broke \(started again 2 times\)"):
        pool.generate(requests_for(1))
    assert engine.calls.count("restart") == 2


def test_a_revival_that_every_engine_fails_is_tried_again() -> None:
    engine = FakeEngine("e0", faults=[("generate", "broke"), ("push", "broke too")])
    pool, said = make_pool(engine)

    def revive() -> None:
        pool.restart_failed()
        update(pool, 0)

    pool.revive = revive
    assert_answered(pool.generate(requests_for(2)), requests_for(2))
    assert any("every engine failed in a weight update" in line for line in said)


def test_reviving_with_other_weights_is_refused() -> None:
    pool, _ = make_pool(FakeEngine("e0", faults=[("generate", "broke")]))

    def revive() -> None:
        pool.restart_failed()
        update(pool, 1)

    pool.revive = revive
    with pytest.raises(AssertionError, match="revived with weight version 1, not 0"):
        pool.generate(requests_for(1))


def test_engines_that_do_not_start_are_set_aside_and_none_at_all_is_an_error() -> None:
    pool, said = make_pool(FakeEngine("e0", faults=[("ready", "ended with exit status 1")]), FakeEngine("e1"))
    pool.wait_ready()
    assert list(pool.failed) == ["e0"]
    assert len(said) == 1
    requests = requests_for(3)
    assert_answered(pool.generate(requests), requests)
    with pytest.raises(
        NoEngineLeft, match="no engine is left after starting up\n    engine e0 ended with exit status 1"
    ):
        make_pool(FakeEngine("e0", faults=[("ready", "ended with exit status 1")]))[0].wait_ready()


def test_a_dead_engine_is_found_by_looking() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("alive", "ended")])]
    pool, _ = make_pool(*engines)
    pool.check_alive()
    assert list(pool.failed) == ["e1"]


def test_an_engine_that_cannot_be_started_again_is_tried_as_often_as_allowed() -> None:
    engine = FakeEngine("e1", faults=[("generate", "broke"), ("restart", "fails")])
    pool, said = make_pool(FakeEngine("e0"), engine)
    pool.generate(requests_for(3))
    assert [pool.restart_failed() for _ in range(3)] == [[], [], []]
    assert engine.calls.count("restart") == 2
    assert pool.failed == {"e1": "engine e1 could not be started again: engine e1 cannot be started"}
    assert said[1:] == [
        f"warning: engine e1 could not be started again: engine e1 cannot be started (attempt {n} of 2)" for n in (1, 2)
    ]


def test_memory_is_resumed_only_where_it_was_released() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("generate", "broke")])]
    pool, _ = make_pool(*engines)
    pool.generate(requests_for(3))
    pool.release_memory(["weights", "kv_cache"])
    pool.restart_failed()
    pool.resume_memory(["weights"])
    update(pool, 1)
    pool.resume_memory(["kv_cache"])
    pool.release_memory(["kv_cache"])
    pool.release_memory(["weights", "kv_cache"])
    memory = [[call for call in engine.calls if call.startswith("re") and " " in call] for engine in engines]
    assert memory == [
        ["release weights+kv_cache", "resume weights", "resume kv_cache", "release kv_cache", "release weights"],
        ["release kv_cache", "release weights"],
    ]


def test_engines_that_all_fail_to_resume_memory_end_the_update() -> None:
    engine = FakeEngine("e0", faults=[("resume kv_cache", "ended")])
    pool, _ = make_pool(engine)
    pool.release_memory(["kv_cache"])
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    with pytest.raises(EngineError, match="every engine failed in a weight update\n    engine e0 ended"):
        pool.resume_memory(["kv_cache"])
    assert pool.restart_failed() == ["e0"], "the update is over"
    update(pool, 1)
    assert_answered(pool.generate(requests_for(2)), requests_for(2), 1)


def test_buckets_are_packed_while_two_are_on_their_way() -> None:
    """`push_bucket` returns while the engine loads, but the third call waits for the first."""
    loading, loaded = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        async def apush_bucket(self, bucket: WeightBucket) -> None:
            loading.set()
            await asyncio.to_thread(loaded.wait)
            await super().apush_bucket(bucket)

    engine = Slow("e0")
    pool, _ = make_pool(engine, health_check_interval_s=60)
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    assert loading.wait(10)
    pool.push_bucket(BUCKET)
    assert engine.calls == ["begin"]
    threading.Timer(0.1, loaded.set).start()
    pool.push_bucket(BUCKET)
    assert engine.calls[:2] == ["begin", "push"]
    pool.end_weight_update(1)
    assert engine.calls == ["begin", "push", "push", "push", "end"]


def test_broadcasts_of_buckets_come_one_after_the_other() -> None:
    loading = []

    class Broadcast(FakeEngine):
        async def apush_bucket(self, bucket: WeightBucket) -> None:
            loading.append(1)
            assert sum(loading) == 1
            await asyncio.sleep(0.02)
            loading.append(-1)
            await super().apush_bucket(bucket)

    engine = Broadcast("e0")
    engine.address = dataclasses.replace(engine.address, update_backend="gloo")
    pool, _ = make_pool(engine, health_check_interval_s=60)
    pool.begin_weight_update()
    for _ in range(4):
        pool.push_bucket(BUCKET)
    pool.end_weight_update(1)
    assert engine.calls == ["begin", *["push"] * 4, "end"]


def test_an_engine_that_fails_two_buckets_at_once_is_set_aside_once() -> None:
    engines = [FakeEngine("e0", faults=[("push", "broke"), ("push", "broke")]), FakeEngine("e1")]
    pool, said = make_pool(*engines)
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    pool.push_bucket(BUCKET)
    pool.end_weight_update(1)
    assert engines[0].calls.count("shutdown") == 1
    assert said == ["warning: engine e0 broke; it is set aside"]


@pytest.mark.parametrize("ending", ["await_pushed", "push_bucket", "end_weight_update"])
def test_what_became_of_buckets_is_told_by_what_follows_them(ending: str) -> None:
    pool, _ = make_pool(FakeEngine("e0", faults=[("push", "ended")]))
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    while pool.num_alive:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="every engine failed in a weight update\n    engine e0 ended"):
        getattr(pool, ending)(*{"push_bucket": [BUCKET], "end_weight_update": [1]}.get(ending, []))
    assert pool.restart_failed() == ["e0"], "the update is over"


def test_an_update_does_not_end_before_the_engines_that_failed_have() -> None:
    """They are started again next."""
    ended = threading.Event()

    class SlowToEnd(FakeEngine):
        def shutdown(self) -> None:
            time.sleep(0.3)
            super().shutdown()
            ended.set()

    pool, _ = make_pool(SlowToEnd("e0", faults=[("push", "broke")]))
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    while pool.num_alive:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="every engine failed in a weight update"):
        pool.push_bucket(BUCKET)
    assert ended.is_set()
    assert pool.restart_failed() == ["e0"]


def test_a_background_may_be_closed_at_any_time_and_used_again() -> None:
    before = threading.active_count()
    background = Background()
    background.close()
    for _ in range(2):
        background.start(asyncio.sleep(0))
        background.wait()
        background.start(asyncio.sleep(3600))
        background.close()
        background.close()
    assert threading.active_count() == before


def test_leaving_the_pool_breaks_off_a_push() -> None:
    engine = FakeEngine("e0", faults=[("push", "hang")])
    pool, said = make_pool(engine, health_check_interval_s=60)
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    while not engine.hangs:
        time.sleep(0.001)
    with pytest.raises(KeyboardInterrupt), pool:
        raise KeyboardInterrupt
    assert (engine.calls, engine.cancelled) == (["begin", "push", "shutdown"], 1)
    assert said == [], "an engine that was not waited for has not failed"


def test_an_engine_that_fails_to_start_again_is_final_only_after_its_last_restart() -> None:
    pool, _ = make_pool(FakeEngine("e0", faults=[("generate", "ended"), ("ready", "fell"), ("ready", "fell again")]))
    with pytest.raises(EngineError):
        pool.generate(requests_for(1))
    assert pool.restart_failed() == ["e0"]
    pool.await_restarted()
    assert (pool.num_alive, pool.restart_failed()) == (0, ["e0"])
    with pytest.raises(NoEngineLeft, match=r"engine e0 fell again \(started again 2 times\)"):
        pool.await_restarted()


def test_checksums_come_by_engine() -> None:
    pool, _ = make_pool(FakeEngine("e0"), FakeEngine("e1"), FakeEngine("e2", faults=[("checksums", "broke")]))
    assert pool.weight_checksums() == {"e0": [{"weight": "e0"}], "e1": [{"weight": "e1"}]}


def test_leaving_the_pool_shuts_all_engines_down() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    with pytest.raises(RuntimeError, match="stop here"), EnginePool(engines):
        raise RuntimeError("stop here")
    assert [engine.calls for engine in engines] == [["shutdown"], ["shutdown"]]


def test_an_engine_that_does_not_end_leaves_no_other_running(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine("e0"), FakeEngine("stuck", faults=[("generate", "broke")]), FakeEngine("e2")]

    def outlive() -> None:
        raise TimeoutError("outlived SIGKILL")

    monkeypatch.setattr(engines[1], "shutdown", outlive)
    pool, said = make_pool(*engines)
    requests = requests_for(3)
    assert_answered(pool.generate(requests), requests)
    assert said[1] == "warning: engine stuck could not be ended: outlived SIGKILL"
    assert pool.restart_failed() == []  # it still has its devices
    with pytest.raises(TimeoutError, match="outlived SIGKILL"):
        pool.shutdown()
    assert [engine.alive for engine in engines] == [False, True, False]


def test_restarts_are_forgotten_when_an_engine_came_through_to_the_next_update() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    pool, _ = make_pool(*engines, max_restarts=1)
    for version in (1, 3, 5):
        pool.mark_failed("e1", "engine e1 is lost")
        assert pool.restart_failed() == ["e1"]
        update(pool, version)
        update(pool, version + 1)  # nobody was asked anything in between
    assert pool.num_restarts_in_all == 3
    pool.mark_failed("e1", "engine e1 is lost")
    for version in (7, 8):
        engines[1].faults = [("push", "broke")]
        pool.restart_failed()
        update(pool, version)
    assert pool.num_restarts_in_all == 4


def test_an_engine_that_holds_other_weights_is_set_aside() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    pool, said = make_pool(*engines)
    pool.mark_failed("e1", "engine e1 holds other weights")
    pool.mark_failed("e1", "again")
    assert pool.failed == {"e1": "engine e1 holds other weights"}
    assert engines[1].calls == ["shutdown"]
    assert len(said) == 1
    with pytest.raises(ValueError, match="'e2' is no engine of this pool, which has e0, e1"):
        pool.mark_failed("e2", "lost")


def test_updates_made_by_other_pools_are_adopted() -> None:
    engines = [FakeEngine("e0"), *(FakeEngine(f"e{n}", is_own=False) for n in (1, 2, 3))]
    pool, said = make_pool(*engines)
    requests = requests_for(8)
    addresses = {engine.name: engine.address for engine in engines}
    engines[0].weight_version = 1  # by the pool of its own node
    pool.adopt_update(1, {"e3": "engine e3 ended with signal 9"}, addresses)
    assert_answered(pool.generate(requests), requests, version=1)
    engines[1].faults = [("generate", "broke")]
    assert_answered(pool.generate(requests), requests, version=1)
    assert pool.failed.keys() == {"e1", "e3"}
    addresses |= {name: address_of(name, 2) for name in ("e1", "e3")}
    engines[0].weight_version = 2
    pool.adopt_update(2, {}, addresses)
    assert pool.failed == {}
    assert [engine.calls.count("reconnect") for engine in engines] == [0, 1, 0, 1]
    assert_answered(pool.generate(requests), requests, version=2)
    assert all(engine.shares for engine in engines)
    assert [line for line in said if "serves again" in line] == [
        f"engine {name} serves again, with weight version 2" for name in ("e1", "e3")
    ]


def test_engines_revived_by_other_pools_go_on() -> None:
    engine = FakeEngine("e0", faults=[("generate", "broke")], is_own=False)
    pool, _ = make_pool(engine)
    pool.revive = lambda: pool.adopt_update(0, {}, {"e0": address_of("e0", 2)})
    assert_answered(pool.generate(requests_for(2)), requests_for(2))
    engine.faults = [("generate", "broke")]
    pool.revive = lambda: None
    with pytest.raises(NoEngineLeft, match="no engine is left after trying to revive them\n    engine e0 broke"):
        pool.generate(requests_for(2))
