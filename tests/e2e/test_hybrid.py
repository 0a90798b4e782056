"""A real actor and a real engine take turns: what the engine serves is what the actor is, also after it was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hybrid_on_rank import take_turns
from processes import run_ranks


@pytest.fixture(scope="module")
def colocated(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return turns_of("colocated", tiny_chat_model, tmp_path_factory.mktemp("colocated"))


def turns_of(placement: str, model_dir: Path, directory: Path) -> dict[str, Any]:
    arguments = {"model_dir": str(model_dir), "log_dir": str(directory), "placement": placement}
    return run_ranks(directory, 1, take_turns, arguments, timeout_s=400.0)[0]


def test_completions_carry_the_version_of_the_last_sync(colocated: dict[str, Any]) -> None:
    assert colocated["versions"] == [[version] * 4 for version in range(4)]


def test_every_sync_leaves_the_engine_with_the_actors_weights(colocated: dict[str, Any]) -> None:
    assert colocated["holds"] == [True] * 4


def test_the_engines_logprobs_are_the_actors(colocated: dict[str, Any]) -> None:
    assert len(colocated["differences"]) == 4
    assert max(colocated["differences"]) < 2e-5


def test_answers_are_the_same_before_and_after_the_actor_worked_in_between(colocated: dict[str, Any]) -> None:
    assert colocated["repeats"]


def test_an_engine_killed_in_training_comes_back_with_the_current_weights(colocated: dict[str, Any]) -> None:
    assert colocated["restarts"] == 1
    assert colocated["versions"][-1] == [3] * 4
    assert colocated["holds"][-1]


def test_both_sides_memory_is_told_at_every_turn(colocated: dict[str, Any]) -> None:
    assert [turn for turn, _ in colocated["turns"]] == ["generating", "training"] * 4
    engines = [size for _, size in colocated["turns"]]
    assert all(0.05 < size < 16 for size in engines)
    memory = colocated["memory"]
    assert 0.1 < memory["memory/training/trainer"] < 16
    assert 0 < memory["memory/offloaded"] < 0.01, "a model this small takes kilobytes"


def test_engines_beside_the_trainer_take_the_same_turns(
    tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = turns_of("disaggregated", tiny_chat_model, tmp_path_factory.mktemp("disaggregated"))
    assert found["versions"] == [[version] * 4 for version in range(4)]
    assert found["holds"] == [True] * 4
    assert max(found["differences"]) < 2e-5
    assert found["restarts"] == 1
    assert found["memory"]["memory/offloaded"] == 0
