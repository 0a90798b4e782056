"""A save that fails harms nothing, a checkpoint that lacks a piece is refused by its name, a whole one is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_faults_on_ranks import EDITS, run_failing_calls, run_fault_checks
from processes import run_ranks
from tiny_models import save_model

MESSAGES = {
    "random state": "manifest.json lists no rng_1.pt, the random state of a rank",
    "cpu state": "rng_1.pt holds no 'cpu' random state",
    "tracker": "rng_1.pt holds no 'tracker' random state",
    "optimizer": "common.pt holds no settings of the optimizer",
    "param_groups": "common.pt holds a state of the optimizer without, or with another, 'param_groups'",
    "step": "common.pt holds a state of the optimizer without, or with another, 'step'",
    "scheduler": "common.pt holds no state of the scheduler",
    "num_steps": "common.pt holds a scheduler's state without num_steps",
    "lr_decay_style": "common.pt holds a scheduler's state without lr_decay_style",
    "common": "manifest.json lists no common.pt",
    "format": "manifest.json lists no metadata.json",
    "trainer": "run_state.json holds no 'trainer'",
    "layout": "run_state.json holds no 'layout'",
    "tp": "run_state.json holds a layout without tp",
    "model": "run_state.json holds no 'model'",
    "tensor": "holds no tensor optimizer.state.exp_avg.decoder.final_layernorm.weight, which this run needs",
    "piece": ".metadata has 0 of the 40 elements of 'decoder.final_layernorm.weight': pieces are missing",
    "shape": "holds decoder.final_layernorm.weight of shape [20], but this run needs [40]",
    "bytes": "holds no tensor decoder.final_layernorm.weight, which this run needs",
    "object": "is an object that only unpickling could read: that is not done",
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "qwen2", tied=False)
    return directory


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("checkpoints")
    return run_ranks(root, 2, run_fault_checks, {"model_dir": str(model_dir), "root": str(root)}, timeout_s=300)


@pytest.mark.parametrize("piece", EDITS)
def test_a_checkpoint_that_lacks_a_piece_is_refused_by_its_name_on_every_rank(
    on_ranks: list[dict[str, Any]], piece: str
) -> None:
    for found in on_ranks:
        assert MESSAGES[piece] in found["missing"][piece]
        assert "\n" not in found["missing"][piece]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_last_checkpoint(
    on_ranks: list[dict[str, Any]], way: str
) -> None:
    for found in on_ranks:
        outcome = found["full"][way]
        assert "/.writing_step_0000002/" in outcome["error"]
        assert "cannot be written: [Errno 27] File too large" in outcome["error"]
        assert outcome["left"] == [".writing_step_0000002", "latest", "step_0000001"]
        assert outcome["after"] == ["latest", "step_0000001", "step_0000003"]
        assert outcome["threads"] == []
    assert on_ranks[0]["full"][way]["error"] == on_ranks[1]["full"][way]["error"]


def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(on_ranks: list[dict[str, Any]]) -> None:
    names = ["step_0000003", "step_0000002", "step_0000001", "step_0000001"]
    assert [found["fallback"]["found"] for found in on_ranks] == [names, names]
    first, second, third = on_ranks[0]["fallback"]["said"]
    assert on_ranks[1]["fallback"]["said"] == []
    assert "step_0000003/__1_0.distcp has " in first
    assert "step_0000002, which is whole, is used" in first
    assert "step_0000002/__1_0.distcp has " in second
    assert "latest does not exist" in third
    for found in on_ranks:
        error = found["fallback"]["error"]
        assert "no checkpoint in it is whole: " in error
        assert all(f"step_000000{step}/__1_0.distcp has " in error for step in (1, 2, 3))


def test_a_closed_saver_leaves_no_thread_and_nothing_that_troubles_the_next(on_ranks: list[dict[str, Any]]) -> None:
    for found in on_ranks:
        assert found["closed"]["left"] == [".writing_step_0000001"]
        assert found["closed"]["threads"] == []
        assert found["closed"]["after"] == ["latest", "step_0000002"]


def test_a_save_commits_the_one_before_and_the_best_is_kept(on_ranks: list[dict[str, Any]]) -> None:
    seen = ["", "step_0000001", "step_0000002", "step_0000003"]
    kept = ["latest", "step_0000001", "step_0000003", "step_0000004"]
    assert on_ranks[0]["overlapping"] == [*seen, *kept]


@pytest.fixture(scope="module")
def failing_calls(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("failing")
    return run_ranks(root, 1, run_failing_calls, {"model_dir": str(model_dir), "root": str(root)}, timeout_s=300)[0]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_every_call_of_a_save_may_fail(failing_calls: dict[str, Any], way: str) -> None:
    """The error names what could not be written, and `latest` still leads to the checkpoint before; only after it has
    moved it may lead to the new one, and only then may a failure be no error."""
    outcomes = failing_calls[way]
    num_failures = 0
    for name, outcome in outcomes.items():
        if not outcome["reached"]:
            assert outcome["error"] == "no error", name
            continue
        num_failures += 1
        if outcome["error"] == "no error":
            assert outcome["at"] == 1, name  # an old checkpoint that could not be renamed
            assert "rename" in name or name == "mkdir 1"  # which is there already
        else:
            assert "/step_" in outcome["error"] or ".writing_" in outcome["error"] or way in outcome["error"], name
            assert "Input/output error" in outcome["error"], name
            assert outcome["at"] in ((0, 1) if "fsync" in name else (0,)), name
    assert num_failures >= 26
