"""Signals in every stage: the run saves, ends with the status that asks for a requeue, and goes on bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultTable
from runs import Ended, Runs, differences, last_checkpoint, steps_done

REQUEUE = 75
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
ENDS_WITHIN_S = 30.0  # of its grace time's 120
STAGE = "megatron_fipo.metrics.run_logger:RunLogger.stage"
READ = "megatron_fipo.trainer.recording:read_rollouts"
# stage -> where the signal comes, and the statuses it may end with: a run that is over has nothing to go on with
STAGES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "start, before Megatron": ({"at": "megatron_fipo.checks:check_run", "when": "before"}, (REQUEUE,)),
    "start, the model": ({"at": "megatron_fipo.assembly:build_trainer_side", "when": "after"}, (REQUEUE,)),
    "generation": ({"at": READ, "when": "before", "call": 3, "pause_s": 60.0}, (REQUEUE,)),
    "log-probs": ({"at": "megatron_fipo.actor.pipeline:forward_logprobs", "when": "before", "call": 5}, (REQUEUE,)),
    "update": ({"at": "megatron_fipo.actor.actor:Actor.update", "when": "after", "call": 5}, (REQUEUE,)),
    "optimizer": ({"at": "torch.optim:AdamW.step", "when": "after", "call": 6}, (REQUEUE,)),
    "sync": ({"at": STAGE, "when": "before", "path": "sync", "call": 3}, (REQUEUE,)),
    "record": ({"at": "megatron_fipo.metrics.records:append_record", "when": "before", "call": 4}, (REQUEUE,)),
    "save, writing": ({"at": "os:fsync", "when": "before", "call": 9}, (REQUEUE,)),
    "save, commit": ({"at": "megatron_fipo.actor.checkpoint_files:commit", "when": "before", "call": 2}, (REQUEUE,)),
    "last save": ({"at": "megatron_fipo.actor.checkpoint_files:commit", "when": "before", "call": 3}, (0, REQUEUE)),
    "export": ({"at": "megatron_fipo.weights.hf_files:write_hf_checkpoint", "when": "before"}, (0, REQUEUE)),
}
FIXED_HALF = {  # what runs without --all-faults, with a synchronous save
    ("start, before Megatron", "SIGTERM"),
    ("start, the model", "SIGUSR1"),
    *(("generation", name) for name in SIGNALS),
    ("log-probs", "SIGINT"),
    *(("update", name) for name in SIGNALS),
    ("optimizer", "SIGTERM"),
    ("sync", "SIGUSR1"),
    ("record", "SIGTERM"),
    *(("save, writing", name) for name in SIGNALS),
    ("save, commit", "SIGUSR1"),
    ("last save", "SIGTERM"),
    ("export", "SIGINT"),
}
CASES = [
    pytest.param(
        stage,
        name,
        is_async,
        id=f"{stage}-{name}-{'async' if is_async else 'sync'}",
        marks=() if (stage, name) in FIXED_HALF and not is_async else pytest.mark.full_only,
    )
    for is_async in (False, True)
    for stage in STAGES
    for name in SIGNALS
]


def outcome_of(
    runs: Runs, directory: Path, undisturbed: Path, ended: Ended, statuses: tuple[int, ...], **flags: Any
) -> tuple[str, bool]:
    """What came of a signalled run and of the one that goes on from there, and whether that is what is wanted."""
    if not ended.faults:
        return f"the signal was never sent: {ended.stderr[-500:]}", False
    at, done = _saved_step(directory), steps_done(directory)
    text = f"ended with {ended.statuses} after {ended.seconds:.1f} s, {at} of {done} steps saved"
    if not set(ended.statuses) <= set(statuses) or "Traceback" in ended.stderr:
        first = ended.stderr.find("Traceback")
        return f"{text}: {ended.stderr[first : first + 3000] if first >= 0 else ended.stderr[-500:]}", False
    if at != done:
        return f"{text}: steps were lost", False
    if ended.seconds > ENDS_WITHIN_S:
        return f"{text}: too late", False
    resumed = runs.run(directory, **{"auto_resume": True, **flags})
    if set(resumed.statuses) != {0}:
        return f"{text}, resumed with {resumed.statuses}: {resumed.stderr[-500:]}", False
    found = "; ".join(differences(directory, undisturbed))
    return f"{text}, resumed {found or 'bitwise'}", not found


def _saved_step(directory: Path) -> int:
    if not (directory / "checkpoints" / "latest").exists():
        return 0
    return int(last_checkpoint(directory).name.split("_")[1].split(".")[0])


@pytest.mark.parametrize(("stage", "name", "is_async"), CASES)
def test_a_signal_saves_and_asks_for_a_requeue(
    stage: str, name: str, is_async: bool, runs: Runs, undisturbed: Path, tmp_path: Path, faults: FaultTable
) -> None:
    fault, statuses = STAGES[stage]
    if is_async and stage == "save, commit":
        statuses = (0, REQUEUE)  # that commit is the last save's first act, and there is nothing to do after it
    flags: dict[str, Any] = {"auto_resume": True, "async_save": is_async}
    if stage == "export":
        flags["export_hf"] = "exported"
    ended = runs.run(tmp_path, [{"do": name, **fault}], **flags)
    outcome, ok = outcome_of(runs, tmp_path, undisturbed, ended, statuses, **flags)
    faults.record("signal", f"{name} in {stage}", outcome, ok)
    assert ok, outcome


@pytest.mark.parametrize(
    ("name", "fault", "flags", "status"),
    [
        ("a second signal in an update", {"do": ["SIGTERM", "SIGTERM"], "call": 6}, {}, REQUEUE),
        ("a second, other signal", {"do": ["SIGUSR1", "SIGINT"], "call": 6}, {}, REQUEUE),
        ("a second signal before anything is saved", {"do": ["SIGTERM", "SIGINT"], "call": 2}, {}, 128 + 15),
        ("the grace time runs out", {"do": "SIGUSR1", "call": 6}, {"exit_grace_s": 1.5}, REQUEUE),
    ],
)
def test_a_second_signal_or_the_end_of_the_grace_time_ends_at_once(
    name: str,
    fault: dict[str, Any],
    flags: dict[str, Any],
    status: int,
    runs: Runs,
    undisturbed: Path,
    tmp_path: Path,
    faults: FaultTable,
) -> None:
    slow = {"at": "megatron_fipo.actor.actor:Actor.update", "when": "after", "pause_s": 60.0}
    began = time.monotonic()
    ended = runs.run(tmp_path, [{**slow, **fault}], auto_resume=True, **flags)
    seconds = time.monotonic() - began
    resumed = runs.run(tmp_path, auto_resume=True)
    found = "; ".join(differences(tmp_path, undisturbed)) if resumed.statuses == [0] else resumed.stderr[-500:]
    ok = bool(ended.faults) and ended.statuses == [status] and seconds < ENDS_WITHIN_S and not found
    faults.record("second signal, grace time", name, f"{ended.statuses}, resumed {found or 'bitwise'}", ok)
    assert ended.statuses == [status], ended.stderr
    assert "at once" in ended.stderr or "within 1.5 s" in ended.stderr
    assert seconds < ENDS_WITHIN_S
    assert found == ""
