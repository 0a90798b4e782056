"""SIGKILL at named points: the run that is started again ends as the undisturbed one did, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultTable
from runs import NUM_STEPS, SAVED_STEPS, Runs, committed_steps, differences, last_checkpoint, records, steps_done

STAGE = "megatron_fipo.metrics.run_logger:RunLogger.stage"
FILES = "megatron_fipo.actor.checkpoint_files"
UPSTREAM = "megatron.core.dist_checkpointing.strategies.filesystem_async"
KILL = {"do": "SIGKILL", "rank": 0}
# name -> where it happens, and the step of the checkpoint that is in place afterwards (0: none).
# Steps 2, 4 and 5 are saved; everything but the first happens in step 3 or in the save after step 4.
POINTS: dict[str, tuple[dict[str, Any], int]] = {
    "before the first step": ({"at": "megatron_fipo.trainer.loop:train", "when": "before"}, 0),
    "during generation": ({"at": "megatron_fipo.trainer.recording:read_rollouts", "when": "before", "call": 3}, 2),
    "after generation": ({"at": "megatron_fipo.trainer.recording:read_rollouts", "when": "after", "call": 3}, 2),
    "in the log-prob pass": ({"at": "megatron_fipo.actor.pipeline:forward_logprobs", "when": "after", "call": 5}, 2),
    "between two updates": ({"at": "megatron_fipo.actor.actor:Actor.update", "when": "after", "call": 5}, 2),
    "in the middle of an optimizer step": ({"at": "torch.optim:AdamW.step", "when": "after", "call": 6}, 2),
    "before the sync": ({"at": STAGE, "when": "before", "path": "sync", "call": 3}, 2),
    "in the middle of a record's line": (
        {"at": "megatron_fipo.metrics.records:append_record", "when": "half", "path": "*metrics.jsonl*", "call": 3},
        2,
    ),
    "while a checkpoint is written": ({"at": f"{UPSTREAM}:_write_item", "when": "after", "call": 120}, 2),
    "after the data, before the manifest": ({"at": f"{FILES}:seal", "when": "before", "call": 2}, 2),
    "after the manifest, before the rename": (
        {"at": "os:rename", "when": "before", "path": "*/step_0000004"},
        2,
    ),
    "after the rename, before `latest`": ({"at": "os:rename", "when": "before", "path": "*/latest", "call": 2}, 2),
    "after `latest`": ({"at": "os:rename", "when": "after", "path": "*/latest", "call": 2}, 4),
    "after an old checkpoint lost its name": ({"at": "os:rename", "when": "after", "path": "*/.removing_*"}, 4),
    "while an old checkpoint is removed": ({"at": "os:unlink", "when": "after", "path": "*.distcp"}, 4),
}


def resumes_bitwise(runs: Runs, directory: Path, undisturbed: Path, **flags: Any) -> str:
    """Run to the end in `directory`, from whatever checkpoint is there; "" or how that differs from `undisturbed`."""
    ended = runs.run(directory, **{"auto_resume": True, **flags})
    if set(ended.statuses) != {0}:
        return f"ended with {ended.statuses}: {ended.stderr[-500:]}"
    return "; ".join(differences(directory, undisturbed))


def test_the_undisturbed_run_is_worth_comparing(undisturbed: Path) -> None:
    steps = records(undisturbed, "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(len(step["updates"]) == 2 and step["grad_norm"] > 0 for step in steps)
    assert steps[0]["lr"] < steps[1]["lr"] < steps[-1]["lr"]
    assert len(records(undisturbed, "samples.jsonl")) >= NUM_STEPS
    assert committed_steps(undisturbed) == list(SAVED_STEPS)
    assert {path.suffix for path in last_checkpoint(undisturbed).iterdir()} >= {".distcp", ".pt", ".json"}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_bit_for_bit(
    point: str, is_async: bool, runs: Runs, undisturbed: Path, tmp_path: Path, faults: FaultTable
) -> None:
    fault, wanted_step = POINTS[point]
    flags: dict[str, Any] = {"async_save": is_async, "auto_resume": True}
    if "old checkpoint" in point:
        flags["keep_last_checkpoints"] = 1
    ended = runs.run(tmp_path, [{**KILL, **fault}], **flags)
    assert ended.faults, f"{point} was never reached: {ended.stderr[-2000:]}"
    found = -9 in ended.statuses
    at = int(last_checkpoint(tmp_path).name.split("_")[1]) if (tmp_path / "checkpoints" / "latest").exists() else 0
    done = steps_done(tmp_path)
    outcome = resumes_bitwise(runs, tmp_path, undisturbed, **flags)
    faults.record(
        f"SIGKILL, {'async' if is_async else 'sync'} save",
        point,
        outcome or f"killed at step {done}, resumed bitwise from {at}",
        found and not outcome,
    )
    assert found, ended
    assert at == wanted_step or (is_async and at < wanted_step), (at, wanted_step)
    assert outcome == ""
