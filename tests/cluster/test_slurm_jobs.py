"""Training runs as Slurm jobs: watched, preempted, requeued, resumed, cancelled, and failing."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from left_behind import MARK, marked
from runs import differences
from slurm_cluster import ENDED, wait_for
from slurm_jobs import DISTURBED, PROGRAM, Jobs
from small_run import START_WITHIN_S, command_line, num_steps

from megatron_fipo.actor.checkpoint_files import verify_checkpoint
from megatron_fipo.sheltered import ASKING

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


def started_by_ranks() -> list[tuple[str, set[int]]]:
    """Command and ineffective signals of every living process that the ranks have started: Slurm signals them too."""
    found = []
    for pid, command in marked(os.environ[MARK]).items():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            is_task = any(entry.startswith(b"SLURM_PROCID=") for entry in environment)
            is_rank = PROGRAM[1] in command and "-m" in command
            if is_task and not is_rank and not command.startswith(("slurm", "srun", "/bin/bash")):
                status = Path(f"/proc/{pid}/status").read_text()
                mask = int(re.findall(r"SigBlk:\s*(\w+)", status)[0], 16)
                if "megatron_fipo.rewards.worker" in command:  # it has handlers, so that what it starts is not deaf
                    mask |= int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
                found.append((command, {number for number in range(1, 65) if mask >> (number - 1) & 1}))
    return found


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


def test_a_cancelled_job_with_engines_leaves_whole_checkpoints_and_does_not_come_back(
    jobs: Jobs, tmp_path: Path
) -> None:
    arguments = command_line(jobs.inputs / "model", tmp_path, ranks=1, save="checkpoints", save_interval=1)
    program = [*arguments[arguments.index("megatron_fipo.train") - 1 :], "--auto-resume"]
    job = jobs.submit(tmp_path, ["-N", "2", "--time=10", f"--log-dir={tmp_path}/out/slurm"], program)
    wait_for("two steps", lambda: num_steps(tmp_path) >= 2 or jobs.cluster.state(job) in ENDED, START_WITHIN_S)
    assert jobs.cluster.state(job) == "RUNNING", log_of(tmp_path, job)
    deaf = [command for command, blocked in started_by_ranks() if blocked.issuperset(ASKING)]
    assert sum("torch_shm_manager" in command for command in deaf) >= 2, deaf
    assert len(deaf) == len(started_by_ranks()) >= 2 * len(("server", "scheduler", "grader or manager"))
    jobs.cluster.ask("scancel", job)
    assert jobs.wait(job) == "CANCELLED"
    assert jobs.cluster.field(job, "Restarts") == "0"
    newest = tmp_path / "checkpoints" / (tmp_path / "checkpoints" / "latest").read_text()
    verify_checkpoint(newest)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert newest.name == steps[-1] >= "step_0000002"
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.name not in (*steps, "latest")] == []


def test_an_array_gives_every_seed_a_run_of_its_own(jobs: Jobs, tmp_path: Path) -> None:
    flags = jobs.flags(train_iters=1, auto_resume=True)
    job = jobs.submit(tmp_path, ["--time=10", "--array-seeds=5,17", "--follow"], [*PROGRAM, *flags])
    for index, seed in enumerate((5, 17)):
        assert jobs.cluster.state(f"{job}_{index}") == "COMPLETED"
        config = json.loads((tmp_path / "out" / f"seed-{seed}" / "config.json").read_text())
        assert config["run.seed"] == seed
        assert (tmp_path / "checkpoints" / f"seed-{seed}" / "latest").read_text() == "step_0000001"
        assert (tmp_path / "out" / "slurm" / f"{job}_{index}.0" / "rank-0-n1.log").exists() or (
            tmp_path / "out" / "slurm" / f"{job}_{index}.0" / "rank-0-n2.log"
        ).exists()
