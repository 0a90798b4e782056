"""Faults of one rank among several: nobody waits for ever, and the run goes on bit for bit in its layout."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultTable
from runs import Runs, differences, last_checkpoint, steps_done
from test_kills import FILES, UPSTREAM

REQUEUE = 75
ENDS_WITHIN_S = 30.0
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, flags
    "DP 2": (2, {"use-distributed-optimizer": True}),
    "TP 2 x PP 2, bf16": (
        4,
        {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "bf16": True},
    ),
}
POINTS: dict[str, dict[str, Any]] = {
    "between two updates": {"at": "megatron_fipo.actor.actor:Actor.update", "when": "after", "call": 5},
    "while it writes its part": {"at": f"{UPSTREAM}:_write_item", "when": "after", "call": 50},
    "before the commit": {"at": "megatron_fipo.actor.checkpoint:commit_together", "when": "before", "call": 2},
    "in the commit": {"at": f"{FILES}:commit", "when": "before", "call": 2},  # rank 0 alone gets there
}


@pytest.fixture(scope="module")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Runs, Path]]:
    """Runs of a layout, and the directory of one that nothing disturbed."""

    @functools.cache
    def make(layout: str) -> tuple[Runs, Path]:
        num_ranks, flags = LAYOUTS[layout]
        ranks = runs.on_ranks(num_ranks, **{name.replace("-", "_"): value for name, value in flags.items()})
        directory = tmp_path_factory.mktemp("undisturbed")
        ended = ranks.run(directory)
        assert set(ended.statuses) == {0}, ended.stderr
        return ranks, directory

    return make


def cases(*fixed: tuple[str, str, int, bool]) -> list[Any]:
    """(layout, point, rank, is_async); those that are not `fixed` are for --all-faults."""
    everything = [
        (layout, point, rank, is_async)
        for layout, (num_ranks, _) in LAYOUTS.items()
        for point in POINTS
        for rank in range(num_ranks)
        for is_async in (False, True)
        if rank == 0 or not (point == "in the commit" or (layout, point) == ("DP 2", "while it writes its part"))
    ]
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case in fixed else pytest.mark.full_only)
        for case in everything
    ]


@pytest.mark.parametrize(
    ("layout", "point", "rank", "is_async"),
    cases(
        ("DP 2", "between two updates", 1, False),
        ("DP 2", "while it writes its part", 0, True),  # all shards are data-parallel rank 0's on the CPU
        ("DP 2", "before the commit", 0, False),
        ("TP 2 x PP 2, bf16", "between two updates", 3, False),
    ),
)
def test_a_run_of_several_ranks_goes_on_bit_for_bit_when_one_is_killed(
    layout: str,
    point: str,
    rank: int,
    is_async: bool,
    reference: Callable[[str], tuple[Runs, Path]],
    tmp_path: Path,
    faults: FaultTable,
) -> None:
    runs, undisturbed = reference(layout)
    flags = {"auto_resume": True, "async_save": is_async}
    began = time.monotonic()
    ended = runs.run(tmp_path, [{"do": "SIGKILL", "rank": rank, **POINTS[point]}], **flags)
    seconds = time.monotonic() - began
    resumed = runs.run(tmp_path, **flags)
    found = "; ".join(differences(tmp_path, undisturbed)) if set(resumed.statuses) == {0} else resumed.stderr[-500:]
    survivors = [status for index, status in enumerate(ended.statuses) if index != rank]
    ok = bool(ended.faults) and ended.statuses[rank] == -9 and set(survivors) <= {1, REQUEUE, -15} and not found
    outcome = f"{ended.statuses} after {seconds:.0f} s, resumed {found or 'bitwise'}"
    faults.record("SIGKILL of one rank", f"{layout}, rank {rank}, {point}", outcome, ok)
    assert ok, f"{outcome}\n{ended.stderr[-2000:]}"


@pytest.mark.parametrize(
    ("stage", "rank", "fault"),
    [
        pytest.param("update", 1, {"at": "megatron_fipo.actor.actor:Actor.update", "call": 5}, id="update-1"),
        pytest.param(
            "log-probs", 0, {"at": "megatron_fipo.actor.pipeline:forward_logprobs", "call": 5}, id="log-probs-0"
        ),
        pytest.param("save", 1, {"at": "megatron_fipo.actor.checkpoint:commit_together", "call": 1}, id="save-1"),
        pytest.param(
            "start",
            1,
            {"at": "megatron_fipo.assembly:build_trainer_side", "call": 1},
            id="start-1",
            marks=pytest.mark.full_only,
        ),
    ],
)
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.full_only)])
def test_a_signal_to_one_rank_is_heard_by_all(
    name: str,
    stage: str,
    rank: int,
    fault: dict[str, Any],
    reference: Callable[[str], tuple[Runs, Path]],
    tmp_path: Path,
    faults: FaultTable,
) -> None:
    runs, undisturbed = reference("DP 2")
    ended = runs.run(tmp_path, [{"do": name, "rank": rank, "when": "after", **fault}], auto_resume=True)
    saved = int(last_checkpoint(tmp_path).name.split("_")[1]) if (tmp_path / "checkpoints" / "latest").exists() else 0
    resumed = runs.run(tmp_path, auto_resume=True)
    found = "; ".join(differences(tmp_path, undisturbed)) if set(resumed.statuses) == {0} else resumed.stderr[-500:]
    ok = (
        bool(ended.faults)
        and REQUEUE in ended.statuses
        and set(ended.statuses) <= {REQUEUE, -15}  # one that is told to end while it does so may die of that
        and ended.seconds < ENDS_WITHIN_S
        and not found
    )
    outcome = f"{ended.statuses} after {ended.seconds:.1f} s, step {saved} saved, resumed {found or 'bitwise'}"
    faults.record("signal to one rank", f"{name} to rank {rank} in {stage}", outcome, ok)
    assert ok, f"{outcome}, {steps_done(tmp_path)} steps\n{ended.stderr[-2000:]}"
