"""The hybrid engine: whose turn it is, and that weights arrive whole, in order, under their version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.hybrid.turns import HybridEngine
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.types import Completion, GenerateRequest, SamplingSettings

WEIGHTS = [("a.weight", torch.arange(4.0)), ("b.weight", torch.ones(2, 3)), ("c.bias", torch.full((5,), -1.0))]


class FakePool:
    """Keeps a diary. `receiver` is what it holds after the last complete update."""

    def __init__(self) -> None:
        self.diary: list[Any] = []
        self.receiver: dict[str, torch.Tensor] = {}
        self.weight_version = 0

    def begin_weight_update(self) -> None:
        self.diary.append("begin")

    def push_bucket(self, bucket: Any) -> None:
        self.diary.append([entry.name for entry in bucket.entries])
        for entry in bucket.entries:
            flat = bucket.flat[entry.start : entry.end].view(entry.dtype)
            self.receiver[entry.name] = flat.view(entry.shape)

    def end_weight_update(self, version: int) -> None:
        self.diary.append(("end", version))
        self.weight_version = version

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.diary.append(("generate", self.weight_version))
        ids = np.zeros(1, dtype=np.int64)
        return [Completion(r.uid, ids, np.zeros(1, np.float32), "stop", self.weight_version) for r in requests]


class FakeActor:
    def __init__(self, rank: int = 0, *, exports: bool = True) -> None:
        self.layout = ParallelLayout(tp=2, rank=rank)
        self.exports = exports
        self.num_exhausted = 0

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.exports:
            yield from WEIGHTS
        self.num_exhausted += 1


def make_engine(bucket_bytes: int = 1 << 20) -> tuple[HybridEngine, FakePool, FakeActor]:
    pool, actor = FakePool(), FakeActor()
    return HybridEngine(actor, pool, bucket_bytes=bucket_bytes), pool, actor  # type: ignore[arg-type]


REQUEST = GenerateRequest("p/0", np.arange(3), SamplingSettings(max_response_len=4), seed=1)


def test_a_step_takes_its_turns_and_completions_carry_the_version() -> None:
    engine, pool, _ = make_engine()
    assert (engine.state, engine.weight_version) == ("training", -1)
    engine.sync_weights(0)
    assert (engine.state, engine.weight_version) == ("generating", 0)
    assert [c.weight_version for c in engine.generate([REQUEST])] == [0]
    assert [c.weight_version for c in engine.generate([REQUEST, REQUEST])] == [0, 0]
    engine.start_training()
    assert engine.state == "training"
    engine.sync_weights(1)
    assert [c.weight_version for c in engine.generate([REQUEST])] == [1]
    names = [name for name, _ in WEIGHTS]
    update = ["begin", names]
    assert pool.diary == [
        *update,
        ("end", 0),
        ("generate", 0),
        ("generate", 0),
        *update,
        ("end", 1),
        ("generate", 1),
    ]


def test_weights_arrive_whole_in_order_and_in_buckets_of_the_size_asked_for() -> None:
    engine, pool, actor = make_engine(bucket_bytes=64)
    engine.sync_weights(7)
    assert pool.diary == ["begin", ["a.weight"], ["b.weight"], ["c.bias"], ("end", 7)]
    assert list(pool.receiver) == [name for name, _ in WEIGHTS]
    assert all(torch.equal(pool.receiver[name], tensor) for name, tensor in WEIGHTS)
    assert actor.num_exhausted == 1


def test_generating_out_of_turn_is_refused() -> None:
    engine, pool, _ = make_engine()
    with pytest.raises(AssertionError, match="training -> generating is no turn of the hybrid engine"):
        engine.generate([REQUEST])
    engine.sync_weights(0)
    engine.start_training()
    with pytest.raises(AssertionError, match="training -> generating"):
        engine.generate([REQUEST])
    assert not any(entry[0] == "generate" for entry in pool.diary)


def test_training_twice_in_a_row_without_a_sync_is_refused() -> None:
    engine, _, _ = make_engine()
    with pytest.raises(AssertionError, match="training -> training"):
        engine.start_training()


def test_no_request_is_served_after_a_sync_that_failed() -> None:
    engine, pool, _ = make_engine()
    engine.sync_weights(0)
    engine.start_training()

    def fail(bucket: Any) -> None:
        raise RuntimeError("the engine is gone")

    pool.push_bucket = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the engine is gone"):
        engine.sync_weights(1)
    assert engine.weight_version == 0
    for refused in (lambda: engine.sync_weights(1), engine.start_training):
        with pytest.raises(AssertionError, match="syncing -> "):
            refused()


def test_the_other_ranks_take_part_in_the_export_and_never_generate() -> None:
    actor = FakeActor(rank=1, exports=False)
    engine = HybridEngine(actor, None, bucket_bytes=64)  # type: ignore[arg-type]
    engine.sync_weights(0)
    assert (engine.state, engine.weight_version, actor.num_exhausted) == ("generating", 0, 1)
    with pytest.raises(AssertionError, match="only rank 0 generates"):
        engine.generate([REQUEST])
    engine.start_training()
    with pytest.raises(AssertionError, match="only rank 0 receives whole tensors"):
        HybridEngine(FakeActor(rank=1), None, bucket_bytes=64).sync_weights(0)  # type: ignore[arg-type]


def test_engines_are_driven_by_rank_zero_and_no_other() -> None:
    for rank, pool in ((0, None), (1, SimpleNamespace())):
        with pytest.raises(AssertionError, match="rank 0, and it alone, drives the engines"):
            HybridEngine(FakeActor(rank=rank), pool, bucket_bytes=64)  # type: ignore[arg-type]
