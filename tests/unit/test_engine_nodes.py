"""How many engines each node of a job starts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch.distributed as dist
from fake_engines import FakeEngine, make_pool

from megatron_fipo.engine_nodes import Nodes, await_engines, engines_of_nodes
from megatron_fipo.run_config import EngineSettings


@pytest.mark.parametrize(
    ("num_ranks", "settings", "wanted"),
    [
        ([4], {}, [4]),
        ([4], {"tp_size": 4}, [1]),
        ([1], {"tp_size": 2}, [1]),  # on the CPU an engine may have more processes than there are ranks
        ([8, 8], {"tp_size": 4}, [2, 2]),
        ([8, 4], {"tp_size": 4}, [2, 1]),
        ([8, 8], {"tp_size": 2, "num_engines": 3}, [2, 1]),
        ([8, 8], {"num_engines": 1}, [1, 0]),
        ([2, 2], {"num_engines": 6, "placement": "disaggregated"}, [3, 3]),
    ],
)
def test_engines_are_spread_over_the_nodes(num_ranks: list[int], settings: dict[str, Any], wanted: list[int]) -> None:
    assert engines_of_nodes(EngineSettings(**settings), num_ranks) == wanted


@pytest.mark.parametrize(
    ("num_ranks", "settings", "words"),
    [
        ([8, 8], {"tp_size": 3}, "--rollout-num-gpus-per-engine is 3"),
        ([2, 2], {"tp_size": 4}, "--rollout-num-gpus-per-engine is 4"),
        ([2, 2], {"tp_size": 2, "num_engines": 3}, "--rollout-num-engines is 3"),
        ([4], {"placement": "disaggregated"}, "--rollout-num-engines is None"),
    ],
)
def test_engines_that_do_not_fit_are_refused(num_ranks: list[int], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engines_of_nodes(EngineSettings(**settings), num_ranks)


def test_only_nodes_with_engines_receive_weights() -> None:
    assert Nodes((0, 4, 8), (4, 4, 4), (1, 0, 1)).receivers == (0, 8)


@pytest.mark.parametrize(("then_release", "calls"), [(False, ["ready"]), (True, ["ready", "release kv_cache+weights"])])
def test_engines_that_have_started_can_make_room_for_the_actor(then_release: bool, calls: list[str]) -> None:
    engine = FakeEngine("engine-0")
    pool, said = make_pool(engine)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with ExitStack() as stack:
            nodes, control = Nodes((0,), (1,), (1,)), dist.group.WORLD
            found = await_engines(pool, nodes, EngineSettings(), control, stack, said.append, then_release=then_release)
    finally:
        dist.destroy_process_group()
    assert found.everywhere is found.here is pool
    assert engine.calls == calls
    pool.resume_memory(["weights"])
    assert ("resume weights" in engine.calls) is then_release, "the first sync gives back what was released, only that"
