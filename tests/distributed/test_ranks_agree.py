"""An error on one rank alone, in a turn or in a snapshot, ends all ranks at once and not after a timeout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moves_on_ranks import TURNS, error_inside, saves_that_fail, turns_that_fail
from processes import run_ranks
from tiny_models import save_model

AT_ONCE_S = 20.0  # on a busy machine; a barrier that nobody comes to would take the minutes of the group's timeout
REACHED = {name: ["training"] if "sync" in name or "come" in name else ["training", "saving"] for name in TURNS} | {
    "gradients leave in a sync": [],
    "parameters leave in a sync": [],
    "everything comes back to train": [],
    "nothing": ["training", "saving", "saved"],
}


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("turns"), 2, turns_that_fail)


@pytest.mark.parametrize("name", TURNS)
def test_a_rank_without_memory_for_its_move_ends_the_turn_on_all(turns: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in turns)
    reason = f"MemoryError: no memory to {TURNS[name][0]}"
    assert second["error"] == reason
    assert first["error"] == f"AnotherRankFailed: rank 1 failed: {reason}"
    for rank in (first, second):
        assert rank["state"] == "failed"
        assert rank["reached"] == REACHED[name]
        assert rank["s"] < AT_ONCE_S


def test_turns_in_which_nothing_fails_are_made_by_all(turns: list[dict[str, Any]]) -> None:
    for rank in turns:
        assert rank["nothing"] | {"s": 0} == {
            "error": None,
            "state": "generating",
            "reached": REACHED["nothing"],
            "s": 0,
        }


def test_a_rank_that_fails_at_its_own_work_waits_for_no_other(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, error_inside)
    assert (first["error"], second["error"]) == ("ConnectionError: rank 1 is gone", "OSError: the disk is full")
    for rank in (first, second):
        assert rank["state"] == "failed"
        assert rank["s"] < AT_ONCE_S


def test_a_rank_without_memory_for_its_snapshot_ends_the_save_on_all(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", tied=False)
    arguments = {"model_dir": str(tmp_path / "model"), "root": str(tmp_path / "checkpoints")}
    first, second = run_ranks(tmp_path, 2, saves_that_fail, arguments)
    reason = "MemoryError: no memory for it"
    for name in ("for moments", "for its share of the optimizer's state", "for a copy"):
        assert second[name]["error"] == reason
        assert first[name]["error"] == f"CheckpointError: {reason}"
        assert max(first[name]["s"], second[name]["s"]) < AT_ONCE_S
    assert first["left"] == ["latest", "step_0000001"], "a later save succeeds, and removes what was left"
