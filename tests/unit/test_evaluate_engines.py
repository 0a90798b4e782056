"""Engines that fail while a checkpoint is evaluated are started again with the weights on disk."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from types import ModuleType

import pytest
from fake_engines import FakeEngine, assert_answered, make_pool, requests_for
from processes import REPO_ROOT

from megatron_fipo.rollout.engine import NoEngineLeft

REQUESTS = requests_for(4)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", REPO_ROOT / "tools" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_tool"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_only_engine_dies_and_what_it_had_is_answered_after_it_was_started_again(tool: ModuleType) -> None:
    engine = FakeEngine("a", faults=[("generate", "died"), ("generate", "died again")])
    pool, said = make_pool(engine)
    pool.revive = partial(tool.start_again, pool)
    assert_answered(pool.generate(REQUESTS), REQUESTS)
    assert engine.calls.count("restart") == 2
    assert "push" not in engine.calls, "it has loaded its weights itself"
    assert said[-1] == "engine a serves again, with weight version 0"
    assert_answered(pool.generate(REQUESTS), REQUESTS)


def test_one_of_two_engines_is_back_for_the_next_block(tool: ModuleType) -> None:
    lost, other = FakeEngine("a", faults=[("generate", "died")]), FakeEngine("b")
    pool, _ = make_pool(lost, other)
    assert_answered(pool.generate(REQUESTS), REQUESTS)
    assert list(pool.failed) == ["a"]
    tool.start_again(pool)
    assert pool.failed == {}
    assert_answered(pool.generate(REQUESTS), REQUESTS)
    assert len(lost.shares[-1]) == len(other.shares[-1]) == len(REQUESTS) // 2


def test_an_engine_that_does_not_start_again_ends_the_evaluation_after_the_restarts_that_it_has(
    tool: ModuleType,
) -> None:
    engine = FakeEngine("a", faults=[("generate", "died"), ("ready", "fails"), ("ready", "fails")])
    pool, _ = make_pool(engine, max_restarts=2)
    pool.revive = partial(tool.start_again, pool)
    with pytest.raises(NoEngineLeft, match=r"engine a fails \(started again 2 times\)"):
        pool.generate(REQUESTS)


def test_an_engine_that_is_lost_for_good_is_done_without(tool: ModuleType) -> None:
    lost, other = FakeEngine("a", faults=[("generate", "died"), ("restart", "fails")]), FakeEngine("b")
    pool, _ = make_pool(lost, other, max_restarts=1)
    for _ in range(3):
        assert_answered(pool.generate(REQUESTS), REQUESTS)
        tool.start_again(pool)
    assert list(pool.failed) == ["a"]
    assert lost.calls.count("restart") == 1
