"""Training runs as Slurm jobs: watched, preempted, requeued, resumed, cancelled, and failing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from runs import differences
from slurm_cluster import wait_for
from slurm_jobs import DISTURBED, PROGRAM, Jobs

READ = "megatron_fipo.trainer.recording:read_rollouts"
PAUSED_WITHIN_S = 90.0


def pause(call: int) -> dict[str, Any]:
    """Rank 0 waits at its `call`-th reading of a rollout batch until a signal comes."""
    return {"at": READ, "when": "before", "call": call, "pause_s": 300.0, "do": "SIGURG"}


def disturbed(*faults: dict[str, Any]) -> list[str]:
    return [str(DISTURBED), json.dumps(faults)]


def wait_for_faults(directory: Path, count: int, rank: int = 0) -> None:
    path = directory / "faults-done" / str(rank)
    wait_for(f"{count} faults", lambda: path.exists() and len(path.read_text().splitlines()) == count, PAUSED_WITHIN_S)


def log_of(directory: Path, job: str) -> str:
    return (directory / "out" / "slurm" / f"{job}.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run on two nodes, and what following it printed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    done = jobs.launch(directory, ["-N", "2", "--time=10", "--follow"], [*PROGRAM, *jobs.flags(auto_resume=True)])
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def test_a_followed_job_shows_its_states_its_log_and_rank_zero(undisturbed: tuple[Path, str]) -> None:
    directory, said = undisturbed
    (job,) = (path.stem for path in (directory / "out" / "slurm").glob("*.sbatch"))
    assert f"submitted job {job}: 2 nodes x 1 ranks" in said
    assert re.search(rf"^[\d:]+ job {job}: COMPLETED on n\[1-2\]$", said, re.MULTILINE)
    assert f"job {job}: start 0 on n[1-2], ranks meet at n1:{20000 + int(job) % 10000}, logs in" in said
    assert len(re.findall(r"^rank 0:  [1-5]/5 ", said, re.MULTILINE)) == 5
    assert f"job {job}: finished" in log_of(directory, job)
    logs = {path.name for path in (directory / "out" / "slurm" / f"{job}.0").iterdir()}
    assert logs == {"rank-0-n1.log", "rank-1-n2.log", "srun.log"}


def test_a_run_that_is_requeued_and_meets_its_time_limit_goes_on_bit_for_bit(
    jobs: Jobs, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """First by the administrator, who has Slurm end it; then by itself, after SIGUSR1 ahead of its time limit."""
    options = ["-N", "2", "--time=2", "--signal-before-s=60"]
    job = jobs.submit(tmp_path, options, [*disturbed(pause(2), pause(4)), *jobs.flags(auto_resume=True)])
    wait_for_faults(tmp_path, 1)
    jobs.cluster.ask("scontrol", "requeue", job)
    wait_for_faults(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_0000002"
    assert jobs.wait(job) == "COMPLETED", log_of(tmp_path, job)
    log = log_of(tmp_path, job)
    assert re.findall(r"start (\d) on", log) == ["0", "1", "2"]
    assert f"job {job}: requeued, to go on from its checkpoint\n" in log
    assert jobs.cluster.field(job, "Restarts") == "2"
    assert differences(tmp_path, undisturbed[0]) == []


def test_a_rank_that_is_killed_ends_the_job_by_name_and_a_retry_leaves_its_node_out(jobs: Jobs, tmp_path: Path) -> None:
    """Without a second node to go on with the job can only wait: it is cancelled then."""
    kill = {**pause(3), "do": "SIGKILL", "at": "megatron_fipo.actor.actor:Actor.update", "rank": 1}
    job = jobs.submit(
        tmp_path, ["-N", "2", "--time=10", "--max-failures=1"], [*disturbed(kill), *jobs.flags(auto_resume=True)]
    )
    wait_for("the requeue", lambda: jobs.cluster.field(job, "ExcNodeList") == "n2", PAUSED_WITHIN_S)
    assert re.search(rf"^job {job}: rank 1 on n2 failed: Killed", log_of(tmp_path, job), re.MULTILINE)
    assert f"job {job}: requeued, without n2" in log_of(tmp_path, job)
    jobs.cluster.ask("scancel", job)
    assert jobs.wait(job) == "CANCELLED"


def test_a_rank_that_fails_ends_the_job_with_its_status_and_its_reason(jobs: Jobs, tmp_path: Path) -> None:
    flags = jobs.flags(auto_resume=True, replay_rollouts=tmp_path / "nowhere")
    job = jobs.submit(tmp_path, ["-N", "2", "--time=10"], [*PROGRAM, *flags])
    assert jobs.wait(job) == "FAILED"
    assert jobs.cluster.field(job, "ExitCode") == "2:0"
    assert re.search(rf"^job {job}: rank \d on n\d failed: error: .*nowhere", log_of(tmp_path, job), re.MULTILINE)
    assert "requeued" not in log_of(tmp_path, job)
