"""The pool keeps groups together, spreads them evenly, restores the order and trusts no stale engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.pool import EnginePool, spread_requests
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings
from megatron_fipo.weights.bucket import WeightBucket


def request(prompt: list[int], sample: int, length: int = 8) -> GenerateRequest:
    ids = np.asarray(prompt, dtype=np.int64)
    return GenerateRequest(f"{prompt[0]}/{sample}", ids, SamplingSettings(length), sample)


class FakeEngine:
    """Answers with its prompt's first token; records what it was asked."""

    def __init__(self, name: str, version: int = 0, fails: bool = False) -> None:
        self.name = name
        self.weight_version = version
        self.fails = fails
        self.asked: list[str] = []
        self.stopped = 0

    async def await_ready(self) -> None:
        return

    async def agenerate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.asked += [item.uid for item in requests]
        if self.fails:
            raise EngineError(f"engine {self.name} ended")
        await asyncio.sleep(3600 if any(item.uid == "13/0" for item in requests) else 0)
        return [
            Completion(item.uid, item.prompt_ids[:1], np.zeros(1, np.float32), "stop", self.weight_version)
            for item in requests
        ]

    async def ascore(self, token_ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [ids.astype(np.float32) for ids in token_ids]

    async def abegin_weight_update(self) -> None:
        self.asked.append("begin")

    async def apush_bucket(self, bucket: WeightBucket) -> None:
        self.asked.append("push")

    async def aend_weight_update(self, version: int) -> None:
        self.weight_version = version

    def check_alive(self) -> None:
        return

    def shutdown(self) -> None:
        self.stopped += 1


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


def test_completions_keep_the_order_of_the_requests() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    requests = [request([prompt], sample) for sample in range(2) for prompt in (5, 6, 7)]
    completions = EnginePool(engines).generate(requests)
    assert [item.uid for item in completions] == [item.uid for item in requests]
    assert len(engines[0].asked) == 4
    assert EnginePool(engines).generate([]) == []


def test_scores_keep_the_order_of_the_sequences() -> None:
    scores = EnginePool([FakeEngine("e0"), FakeEngine("e1")]).score([np.asarray([n]) for n in range(5)])
    assert [score.tolist() for score in scores] == [[0], [1], [2], [3], [4]]


def test_an_engine_behind_the_others_is_an_error() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    pool = EnginePool(engines)
    pool.begin_weight_update()
    pool.end_weight_update(4)
    engines[1].weight_version = 3
    with pytest.raises(EngineError, match=r"engine e1 answered request 6/0 with weight version 3; the run is at 4"):
        pool.generate([request([5], 0), request([6], 0)])


def test_one_engines_failure_is_not_held_up_by_the_others() -> None:
    pool = EnginePool([FakeEngine("slow"), FakeEngine("broken", fails=True)])
    with pytest.raises(EngineError, match="engine broken ended"):
        pool.generate([request([13], 0, length=9), request([6], 0)])


def test_leaving_the_pool_shuts_all_engines_down() -> None:
    engines = [FakeEngine("e0"), FakeEngine("e1")]
    with pytest.raises(RuntimeError, match="stop here"), EnginePool(engines):
        raise RuntimeError("stop here")
    assert [engine.stopped for engine in engines] == [1, 1]


def test_an_engine_that_does_not_end_leaves_no_other_running(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine("e0"), FakeEngine("stuck"), FakeEngine("e2")]

    def outlive() -> None:
        raise TimeoutError("outlived SIGKILL")

    monkeypatch.setattr(engines[1], "shutdown", outlive)
    with pytest.raises(TimeoutError, match="outlived SIGKILL"):
        EnginePool(engines).shutdown()
    assert [engine.stopped for engine in engines] == [1, 0, 1]
