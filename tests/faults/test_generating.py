"""Kills and signals of a run that generates and evaluates with a live engine: samples and their ids repeat, too.

The engine outlives the runs here, as no run's own does: it meets clients that vanish in the middle of a request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import FaultTable
from left_behind import nothing_left_behind
from runs import Runs, last_checkpoint, live_engine, records
from test_kills import STAGE, resumes_bitwise
from test_signals import REQUEUE, outcome_of

from megatron_fipo.weights.bucket import make_buckets

POOL = "megatron_fipo.rollout.pool:EnginePool"
# Version 0 is synced before step 1, and evaluated; step 3 is evaluated, and so is step 5, the last.
POINTS: dict[str, dict[str, Any]] = {
    "during generation": {"at": f"{POOL}.generate", "when": "before", "call": 5, "delay_s": 0.03},
    "after generation": {"at": f"{POOL}.generate", "when": "after", "call": 5},
    "while answers are graded": {
        "at": "megatron_fipo.rewards.pool:GraderPool.grade",
        "when": "before",
        "call": 5,
        "delay_s": 0.002,
    },
    "in an evaluation": {"at": STAGE, "when": "before", "path": "evaluate", "call": 2, "delay_s": 0.03},
    "after a sync": {"at": f"{POOL}.end_weight_update", "when": "after", "call": 4},
    "before the first sync": {"at": f"{POOL}.begin_weight_update", "when": "before", "call": 1},
    "in the commit": {"at": "megatron_fipo.actor.checkpoint_files:commit", "when": "before", "call": 2},
}
FIXED_KILLS = ("during generation", "after a sync")
FIXED_SIGNALS = (("during generation", "SIGUSR1"), ("in an evaluation", "SIGTERM"))


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> None:
    """The engine, and with it the keeper of the memory that weights came through, outlives a test here. `generating`
    looks for what is left once it has ended."""


@pytest.fixture(scope="module")
def generating(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs with one live engine."""
    next(
        make_buckets([("any", torch.ones(1))], 1 << 10)
    )  # torch's keeper of shared memory is this process's, and stays
    with nothing_left_behind("engine"), live_engine(runs.inputs, tmp_path_factory.mktemp("engine")) as engine:
        yield runs.with_engine(engine)


@pytest.fixture(scope="module")
def undisturbed(generating: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    ended = generating.run(directory)
    assert ended.statuses == [0], ended.stderr
    return directory


def test_the_undisturbed_run_has_something_left_over_at_a_checkpoint(undisturbed: Path) -> None:
    states = [
        json.loads((undisturbed / "checkpoints" / f"step_{step:07d}" / "run_state.json").read_text()) for step in (2, 4)
    ]
    text = json.dumps([state["trainer"] for state in states])
    assert '"group"' in text, "no group was left over"
    assert '"unfinished"' in text, "no response was unfinished"
    assert [record["step"] for record in records(undisturbed, "evaluations.jsonl")] == [0, 3, 5]
    assert last_checkpoint(undisturbed).name == "step_0000005"


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in FIXED_KILLS else pytest.mark.full_only) for point in POINTS],
)
def test_a_killed_run_repeats_its_samples(
    point: str, generating: Runs, undisturbed: Path, tmp_path: Path, faults: FaultTable
) -> None:
    ended = generating.run(tmp_path, [{"do": "SIGKILL", **POINTS[point]}], auto_resume=True)
    found = resumes_bitwise(generating, tmp_path, undisturbed)
    ok = bool(ended.faults) and ended.statuses == [-9] and not found
    faults.record("SIGKILL, live engine", point, f"{ended.statuses}, resumed {found or 'bitwise'}", ok)
    assert ok, f"{ended}\n{found}"


@pytest.mark.parametrize(
    ("point", "name"),
    [
        pytest.param(
            point, name, id=f"{point}-{name}", marks=() if (point, name) in FIXED_SIGNALS else pytest.mark.full_only
        )
        for point in POINTS
        for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    ],
)
def test_a_signalled_run_repeats_its_samples(
    point: str, name: str, generating: Runs, undisturbed: Path, tmp_path: Path, faults: FaultTable
) -> None:
    ended = generating.run(tmp_path, [{"do": name, **POINTS[point]}], auto_resume=True)
    outcome, ok = outcome_of(generating, tmp_path, undisturbed, ended, (REQUEUE,))
    faults.record("signal, live engine", f"{name} {point}", outcome, ok)
    assert ok, outcome
