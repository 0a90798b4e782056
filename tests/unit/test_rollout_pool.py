"""The pool keeps groups together, spreads them evenly, restores the order, trusts no stale engine, and loses nothing
when engines fail."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.rollout.engine import NO_VERSION, EngineError, MemoryTag, NoEngineLeft
from megatron_fipo.rollout.pool import EnginePool, spread_requests
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings
from megatron_fipo.weights.bucket import WeightBucket, make_buckets


def request(prompt: list[int], sample: int, length: int = 8) -> GenerateRequest:
    ids = np.asarray(prompt, dtype=np.int64)
    return GenerateRequest(f"{prompt[0]}/{sample}", ids, SamplingSettings(length), sample)


def requests_for(num_prompts: int, num_samples: int = 3) -> list[GenerateRequest]:
    return [request([prompt], sample) for prompt in range(num_prompts) for sample in range(num_samples)]


class FakeEngine:
    """Answers with its prompt's first token and the request's seed; keeps a diary. `faults` is consulted at every call:
    the first entry for the call's name that has not been used says what goes wrong."""

    def __init__(self, name: str, version: int = 0, faults: Sequence[tuple[str, Any]] = ()) -> None:
        self.name = name
        self.weight_version = version
        self.faults = list(faults)
        self.shares: list[list[str]] = []
        self.calls: list[str] = []
        self.alive = True
        self.hangs = False
        self.cancelled = 0

    async def _call(self, name: str) -> Any:
        self.calls.append(name)
        assert self.alive, f"{self.name} was asked to {name} after it had been ended"
        await asyncio.sleep(0)
        for index, (when, what) in enumerate(self.faults):
            if when == name:
                del self.faults[index]
                if what == "hang":
                    self.hangs = True
                    try:
                        await asyncio.sleep(3600)
                    finally:
                        self.cancelled += 1
                if callable(what):
                    return what
                raise EngineError(f"engine {self.name} {what}\nlast lines of {self.name}.log:\n    boom")
        return None

    async def await_ready(self) -> None:
        await self._call("ready")

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.shares.append([item.uid for item in requests])
        spoil = await self._call("generate")
        assert self.weight_version != NO_VERSION
        completions = [
            Completion(
                item.uid,
                np.asarray([item.prompt_ids[0], item.seed]),
                np.zeros(2, np.float32),
                "stop",
                self.weight_version,
            )
            for item in requests
        ]
        return spoil(completions) if spoil is not None else completions

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        spoil = await self._call("score")
        scores = [ids.astype(np.float32) for ids in token_ids]
        return spoil(scores) if spoil is not None else scores

    async def abegin_weight_update(self) -> None:
        self.weight_version = NO_VERSION
        await self._call("begin")

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        await self._call("push")

    async def aend_weight_update(self, version: int) -> None:
        await self._call("end")
        self.weight_version = version

    async def aweight_checksums(self) -> list[dict[str, str]]:
        await self._call("checksums")
        return [{"weight": self.name}]

    async def arelease_memory(self, tags: Sequence[MemoryTag]) -> None:
        await self._call("release " + "+".join(tags))

    async def aresume_memory(self, tags: Sequence[MemoryTag]) -> None:
        await self._call("resume " + "+".join(tags))

    async def acheck_health(self, timeout_s: float) -> None:
        if self.hangs:
            await asyncio.sleep(timeout_s)
            raise EngineError(f"engine {self.name} gave no sign of life within {timeout_s} s")

    def check_alive(self) -> None:
        if ("alive", "ended") in self.faults:
            raise EngineError(f"engine {self.name} ended with signal 9")

    def restart(self) -> None:
        self.calls.append("restart")
        if ("restart", "fails") in self.faults:
            raise EngineError(f"engine {self.name} cannot be started")
        self.alive, self.hangs, self.weight_version = True, False, NO_VERSION

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.alive = False


BUCKET = next(make_buckets([("a", torch.ones(3))], 1 << 10))


def make_pool(*engines: FakeEngine, **settings: Any) -> tuple[EnginePool, list[str]]:
    said: list[str] = []
    settings = {"max_retries": 3, "max_restarts": 2, "health_check_interval_s": 0.05, "say": said.append, **settings}
    return EnginePool(engines, **settings), said


def update(pool: EnginePool, version: int) -> None:
    pool.begin_weight_update()
    pool.push_bucket(BUCKET)
    pool.end_weight_update(version)


def assert_answered(completions: Sequence[Completion], requests: Sequence[GenerateRequest], version: int = 0) -> None:
    """Every request once, in order, by its own prompt and seed, of the version."""
    assert [item.uid for item in completions] == [item.uid for item in requests]
    assert [item.token_ids.tolist() for item in completions] == [[r.prompt_ids[0], r.seed] for r in requests]
    assert {item.weight_version for item in completions} == {version}


def test_groups_stay_whole_and_the_load_is_even() -> None:
    requests = [request([prompt] * 10, sample) for sample in range(4) for prompt in range(8)]
    shares = spread_requests(requests, 3)
    assert sorted(index for share in shares for index in share) == list(range(32))
    prompts = [{requests[index].uid.split("/")[0] for index in share} for share in shares]
    assert sum(len(group) for group in prompts) == 8
    assert sorted(len(share) for share in shares) == [8, 12, 12]
    assert shares == spread_requests(requests, 3)


def test_a_long_group_counts_for_several_short_ones() -> None:
    requests = [request([1, 2], 0, length=100), *(request([prompt], 0, length=30) for prompt in (3, 4, 5))]
    assert spread_requests(requests, 2) == [[0], [1, 2, 3]]


def test_completions_keep_the_order_of_the_requests_and_a_repetition_spreads_alike() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1"), FakeEngine("e2")]
    requests = [request([prompt], sample) for sample in range(2) for prompt in (5, 6, 7, 8, 9)]
    pool, said = make_pool(*engines)
    for _ in range(3):
        assert_answered(pool.generate(requests), requests)
    assert all(len(engine.shares) == 3 for engine in engines)
    assert all(share == engine.shares[0] for engine in engines for share in engine.shares)
    assert [engine.shares[0] for engine in engines] == [
        [requests[index].uid for index in share] for share in spread_requests(requests, 3)
    ]
    assert pool.generate([]) == []
    assert said == []


def test_engines_without_a_share_are_left_alone() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1"), FakeEngine("e2")]
    pool, _ = make_pool(*engines)
    requests = [request([5], 0), request([5], 1)]
    assert_answered(pool.generate(requests), requests)
    assert [len(engine.shares) for engine in engines] == [1, 0, 0]


def test_scores_keep_the_order_of_the_sequences() -> None:
    pool, _ = make_pool(FakeEngine("e0"), FakeEngine("e1"))
    assert [score.tolist() for score in pool.score([np.asarray([n]) for n in range(5)])] == [[0], [1], [2], [3], [4]]
    assert pool.score([]) == []


def stale(completions: list[Completion]) -> list[Completion]:
    return [Completion(c.uid, c.token_ids, c.logprobs, "stop", 3) for c in completions]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("ended with signal 9", "engine e1 ended with signal 9"),
        ("hang", r"engine e1 gave no sign of life within 0.05 s"),
        (stale, r"engine e1 answered request \S+ with weight version 3; the run is at 0"),
        (lambda completions: completions[:-1], "engine e1 answered 5 requests"),
        (lambda completions: [*completions, completions[0]], "engine e1 answered 7 requests"),
        (lambda completions: [completions[1], *completions[1:]], "engine e1 answered 6 requests"),
        (lambda completions: completions[::-1], "engine e1 answered 6 requests"),
        (lambda completions: [], "engine e1 answered 0 requests"),
    ],
    ids=["dead", "hung", "stale", "one too few", "one too many", "doubled", "swapped", "none"],
)
def test_what_a_failed_engine_had_is_asked_of_the_others(spoil: Any, message: str) -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1", faults=[("generate", spoil)]), FakeEngine("e2")]
    pool, said = make_pool(*engines)
    requests = requests_for(6)
    started = time.monotonic()
    assert_answered(pool.generate(requests), requests)
    assert time.monotonic() - started < 2.0
    assert list(pool.failed) == ["e1"]
    assert engines[1].calls == ["generate", "shutdown"]
    asked_again = [uid for engine in (engines[0], engines[2]) for share in engine.shares[1:] for uid in share]
    assert sorted(asked_again) == sorted(engines[1].shares[0])
    assert [len(engine.shares) for engine in engines] == [2, 1, 2]  # the lost groups are shared, not heaped on one
    assert len(said) == 1
    assert re.search(message, said[0])
    assert "it is set aside; 6 of its requests are asked again" in said[0]
    before = [len(engine.shares) for engine in engines]
    assert_answered(pool.generate(requests), requests)  # and it is asked no more
    assert [len(engine.shares) - b for engine, b in zip(engines, before, strict=True)] == [1, 0, 1]


def test_scores_of_a_failed_engine_are_asked_of_the_others() -> None:
    for spoil in ("ended", "hang", lambda scores: scores[1:], lambda scores: [score[:-1] for score in scores]):
        engines = [FakeEngine("e0", faults=[("score", spoil)]), FakeEngine("e1")]
        pool, said = make_pool(*engines)
        sequences = [np.arange(n, 2 * n) for n in range(1, 8)]
        assert [score.tolist() for score in pool.score(sequences)] == [ids.tolist() for ids in sequences]
        assert list(pool.failed) == ["e0"]
        assert len(said) == 1


def test_no_engine_left_names_every_engine_and_its_cause() -> None:
    engines = [FakeEngine("e0", faults=[("generate", "broke")]), FakeEngine("e1", faults=[("generate", "hang")])]
    pool, _ = make_pool(*engines)
    with pytest.raises(NoEngineLeft) as caught:
        pool.generate(requests_for(4))
    lines = str(caught.value).splitlines()
    assert lines[0] == "no engine is left after answering"
    assert lines[1] == "    engine e0 broke"
    assert lines[2].startswith("    engine e1 gave no sign of life")
    assert all("shutdown" in engine.calls for engine in engines)
    with pytest.raises(NoEngineLeft, match="engine e0 broke"):
        pool.score([np.arange(3)])
    assert pool.failed.keys() == {"e0", "e1"}


def test_the_log_of_the_engine_that_failed_last_is_shown() -> None:
    pool, _ = make_pool(FakeEngine("e0", faults=[("generate", "broke")]))
    with pytest.raises(NoEngineLeft, match=r"engine e0 broke\nlast lines of e0.log:\n    boom$"):
        pool.generate(requests_for(1))


def test_a_request_that_fails_every_engine_does_not_end_all_of_them() -> None:
    engines = [FakeEngine(f"e{n}") for n in range(5)]

    class Poisoned(FakeEngine):
        async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
            if any(item.uid == "2/0" for item in requests):
                self.faults = [("generate", "choked")]
            return await super().agenerate(requests)

    engines = [Poisoned(f"e{n}") for n in range(5)]
    pool, _ = make_pool(*engines, max_retries=2)
    with pytest.raises(
        EngineError, match=r"3 in turn \(--rollout-max-retries 2\). The last: engine e\d choked"
    ) as caught:
        pool.generate(requests_for(5))
    assert not isinstance(caught.value, NoEngineLeft)
    assert len(pool.failed) == 3


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


def test_an_engine_behind_the_others_is_not_asked() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    pool, said = make_pool(*engines)
    update(pool, 4)
    engines[1].weight_version = 3
    requests = requests_for(3)
    assert_answered(pool.generate(requests), requests, 4)
    assert engines[1].shares == []
    assert said == ["warning: engine e1 holds weight version 3; the run is at 4; it is set aside"]
    with pytest.raises(AssertionError, match="in the middle of a weight update"):
        pool.begin_weight_update() or pool.generate(requests)


def test_one_missed_health_check_is_forgiven() -> None:
    class Busy(FakeEngine):
        checks = 0

        async def acheck_health(self, timeout_s: float) -> None:
            self.checks += 1
            if self.checks % 2:
                raise EngineError("busy")

        async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
            await asyncio.sleep(0.2)
            return await super().agenerate(requests)

    engine = Busy("e0")
    pool, said = make_pool(engine, health_check_interval_s=0.02)
    assert_answered(pool.generate(requests_for(2)), requests_for(2))
    assert engine.checks >= 4
    assert said == []


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


def test_checksums_come_by_engine() -> None:
    pool, _ = make_pool(FakeEngine("e0"), FakeEngine("e1"), FakeEngine("e2", faults=[("checksums", "broke")]))
    assert pool.weight_checksums() == {"e0": [{"weight": "e0"}], "e1": [{"weight": "e1"}]}


def test_an_interrupted_batch_ends_its_calls() -> None:
    class Interrupted(FakeEngine):
        async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
            await asyncio.sleep(0.05)
            raise KeyboardInterrupt

    engines = [FakeEngine("e0", faults=[("generate", "hang")]), Interrupted("e1")]
    pool, _ = make_pool(*engines, health_check_interval_s=60)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.generate(requests_for(4))
    assert engines[0].cancelled == 1
    assert not any(engine.alive for engine in engines)


def test_another_error_than_an_engines_ends_the_batch() -> None:
    engines = [
        FakeEngine("e0", faults=[("generate", "hang")]),
        FakeEngine("e1", faults=[("generate", lambda _: 1 / 0)]),
    ]
    pool, _ = make_pool(*engines, health_check_interval_s=60)
    with pytest.raises(ZeroDivisionError):
        pool.generate(requests_for(4))
    assert engines[0].cancelled == 1


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
