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
from fake_engines import FakeEngine, assert_answered, make_pool, request, requests_for, update

from megatron_fipo.rollout.engine import EngineError, NoEngineLeft
from megatron_fipo.rollout.spread import spread_requests
from megatron_fipo.types import Completion, GenerateRequest


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
