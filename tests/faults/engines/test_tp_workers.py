"""An engine of two tensor-parallel ranks of which one dies or stops: the whole engine is ended, started again with the
weights it had, and what it was asked is answered."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from engines.bench import HEALTH_S, LONG_REQUESTS, patience, update
from engines.test_deaths import BEHIND_THE_LAST, Place, Strike, buckets, push_and_strike, record, striking
from fault_table import FaultTable
from left_behind import SHARED_MEMORY, nothing_left_behind
from tiny_engines import start, tiny_llama, weights_of

from megatron_fipo.rollout.engine import EngineError
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.types import Completion

pytestmark = pytest.mark.full_only  # an engine of two ranks is slow to start on two cores

KILL_RANK = Strike(signal.SIGKILL, "scheduler_TP1")
STOP_RANK = Strike(signal.SIGSTOP, "scheduler_TP1")


class TwoRanks:
    """A pool of one engine of two ranks, which is started again whenever it fails."""

    def __init__(self, engine: SGLangEngine, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.engine = engine
        self.weights = weights
        self.said: list[str] = []
        self.pool = EnginePool([engine], health_check_interval_s=patience(HEALTH_S), say=self.said.append)
        self.pool.revive = self.revive
        self.pool.wait_ready()
        update(self.pool, 1, weights)
        self.wanted = self.pool.generate(LONG_REQUESTS)

    def revive(self) -> None:
        self.pool.restart_failed()
        update(self.pool, self.pool.weight_version, self.weights)

    def answers(self) -> list[Completion]:
        return self.pool.generate(LONG_REQUESTS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, keeper_of_shared_memory: None) -> Iterator[TwoRanks]:
    directory = tmp_path_factory.mktemp("two-ranks")
    with nothing_left_behind("two ranks"):
        model = tiny_llama(0)
        engine = start(model, directory, tp_size=2)
        try:
            yield TwoRanks(engine, weights_of(model))
        finally:
            engine.shutdown()


def same_tokens(found: list[Completion], wanted: list[Completion], version: int) -> bool:
    """Every sample once, of these weights, the same as undisturbed."""
    return len(found) == len(wanted) and all(
        a.uid == b.uid and a.weight_version == version and a.token_ids.tolist() == b.token_ids.tolist()
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("strike", [KILL_RANK, STOP_RANK], ids=lambda strike: strike.name)
def test_a_rank_that_fails_in_a_batch_ends_the_engine_and_loses_nothing(
    two_ranks: TwoRanks, faults: FaultTable, strike: Strike
) -> None:
    pool = two_ranks.pool
    restarts, segments, place = pool.num_restarts_in_all, set(os.listdir(SHARED_MEMORY)), Place.of(two_ranks.engine)
    with striking(strike, [two_ranks.engine], 0.2):
        found = two_ranks.answers()
    answered = same_tokens(found, two_ranks.wanted, pool.weight_version)
    if pool.num_restarts_in_all == restarts:
        strike.let_it_show(two_ranks.engine)
        answered = answered and same_tokens(two_ranks.answers(), two_ranks.wanted, pool.weight_version)
    checks = {
        "the answers are wrong": answered,
        f"restarts: {two_ranks.said}": pool.num_restarts_in_all == restarts + 1,
        f"left: {place.leftovers(segments)}": not place.leftovers(segments),
    }
    problems = record(faults, strike.kind, f"{strike.name} in a batch", "started again, answered", checks)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("after", [1, BEHIND_THE_LAST])
def test_a_rank_that_dies_in_an_update_leaves_no_mixture(two_ranks: TwoRanks, faults: FaultTable, after: int) -> None:
    pool = two_ranks.pool
    before, message = pool.weight_version, ""
    pool.begin_weight_update()
    try:
        push_and_strike(pool, two_ranks.weights, KILL_RANK, [two_ranks.engine], after)
        pool.end_weight_update(before + 1)
    except EngineError as error:
        message = str(error)
    checks = {
        f"no fitting error: {message!r}": f"    engine {two_ranks.engine.name} " in message,
        "the version moved": pool.weight_version == before,
    }
    pool.restart_failed()
    update(pool, before + 1, two_ranks.weights)
    checks["the answers are wrong"] = same_tokens(two_ranks.answers(), two_ranks.wanted, before + 1)
    name = f"{KILL_RANK.name} after {buckets(after)}"
    problems = record(faults, "engine: death in an update", name, "an error; repeated after a restart", checks)
    assert not problems, "\n".join(problems)
