"""What the job's script makes of what srun says: who failed, and what follows. Bash scripts stand in for Slurm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_fipo.slurm_options import read_command
from megatron_fipo.slurm_script import sbatch_script
from megatron_fipo.train import _check_started

PROGRAM = ["-m", "megatron_fipo.train", "--save", "ckpt", "--auto-resume", "--output-dir", "out"]
ENDS_OTHERS = "srun: launch/slurm: _step_signal: Terminating StepId=7.0"
LOST = "error: another rank ended, or cannot be reached any more"
STANDING_IN = {
    "srun": 'env >"$TOLD/ranks"; cat "$TOLD/said" >&2; cp "$TOLD"/rank-* out/slurm/*.?/; exit "$STATUS"',
    "squeue": 'echo "squeue $*" >>"$TOLD/asked"; if [[ -s $TOLD/busy ]]; then sed -i 1d "$TOLD/busy"; exit 1; fi; '
    "echo RUNNING",
    "scontrol": 'if [[ $1 == show ]]; then echo n1; else echo "scontrol $*" >>"$TOLD/asked"; fi',
    "sleep": "",
}


def end_of(
    directory: Path,
    said: Sequence[str],
    status: int,
    *,
    options: Sequence[str] = (),
    ranks: dict[str, str] | None = None,
    variables: dict[str, str] | None = None,
    num_busy: int = 0,
) -> tuple[int, list[str], list[str]]:
    """The script's status, its last lines, and what it asked Slurm for when srun said `said`."""
    told = directory / "told"
    told.mkdir(exist_ok=True)
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in STANDING_IN.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (told / "said").write_text("".join(f"{line}\n" for line in said))
    (told / "busy").write_text("x\n" * num_busy)
    (told / "asked").write_text("")
    for name, text in (ranks or {"0-n1": ""}).items():
        (told / f"rank-{name}.log").write_text(text + "\n")
    script = directory / "job.sbatch"
    script.write_text(sbatch_script(read_command([*options, *PROGRAM]).job, []))
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        **{"TOLD": str(told), "STATUS": str(status), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"},
        **(variables or {}),
    }
    done = subprocess.run(
        ["bash", script], cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=20
    )
    assert "job 7" in done.stdout, done.stderr
    return done.returncode, done.stdout.splitlines()[1:], (told / "asked").read_text().splitlines()


@pytest.mark.parametrize(
    ("said", "ranks", "blamed"),
    [
        pytest.param(
            ["srun: error: n2: task 1: Exited with exit code 1", ENDS_OTHERS, "srun: error: n1: task 0: Killed"],
            {"0-n1": "up", "1-n2": "error: step 7 is NaN"},
            "rank 1 on n2 failed: error: step 7 is NaN",
            id="a rank that was too slow to leave is no failure",
        ),
        pytest.param(
            ["srun: error: n2: task 1: Killed", ENDS_OTHERS, "srun: error: n1: task 0: Exited with exit code 1"],
            {"0-n1": LOST, "1-n2": "3/5"},
            "rank 1 on n2 failed: Killed; its last line: 3/5",
            id="killed",
        ),
        pytest.param(
            [
                "srun: error: Task launch for StepId=24.0 failed on node n2: Communication connection failure",
                "srun: error: Application launch failed: Communication connection failure",
                "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
                "srun: error: n1: task 0: Killed",
            ],
            {"0-n1": "up"},
            "n2 failed: task launch: Communication connection failure",
            id="a node that cannot be reached",
        ),
    ],
)
def test_the_first_failure_is_blamed_and_its_node_left_out(
    said: list[str], ranks: dict[str, str], blamed: str, tmp_path: Path
) -> None:
    status, lines, asked = end_of(tmp_path, said, 137, ranks=ranks, options=["-N2", "--max-failures=1", "-xn7"])
    assert lines[0].startswith(f"job 7: {blamed} (")
    assert lines[1:] == ["job 7: requeued, without n2"]
    assert asked[1:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2,n7"]
    assert status == (1 if "NaN" in blamed else 137)


def test_a_rank_that_only_lost_another_one_leaves_no_node_out(tmp_path: Path) -> None:
    said = ["srun: error: n2: task 1: Exited with exit code 1", ENDS_OTHERS, "srun: error: n1: task 0: Killed"]
    ranks = {"0-n1": "", "1-n2": LOST}
    status, lines, asked = end_of(tmp_path, said, 137, ranks=ranks, options=["-N2", "--max-failures=1"])
    assert lines[0].startswith(f"job 7: rank 1 on n2 failed: Exited with exit code 1; its last line: {LOST} (")
    assert (status, asked[1:]) == (1, ["scontrol requeue 7"])


def test_a_user_s_error_is_the_job_s_status_and_not_tried_again(tmp_path: Path) -> None:
    said = ["srun: error: n1: tasks 0-1: Exited with exit code 2", ENDS_OTHERS]
    ranks = {"0-n1": "error: --lr is -1", "1-n1": ""}
    status, lines, asked = end_of(tmp_path, said, 75, ranks=ranks, options=["--max-failures=1"])
    assert (status, asked) == (2, [])
    assert lines[0].startswith("job 7: rank 0 on n1 failed: error: --lr is -1 (")


@pytest.mark.parametrize("first", ["Exited with exit code 75", "Exited with exit code 138", "User defined signal 1"])
def test_a_run_that_saved_is_requeued_though_a_rank_is_slow_to_leave_and_slurm_is_busy(
    first: str, tmp_path: Path
) -> None:
    said = [f"srun: error: n1: task 0: {first}", ENDS_OTHERS, "srun: error: n2: task 1: Killed"]
    status, lines, asked = end_of(tmp_path, said, 137, num_busy=2)
    assert (status, lines) == (75, ["job 7: requeued, to go on from its checkpoint"])
    assert asked == ["squeue --noheader --format %T --jobs 7"] * 3 + ["scontrol requeue 7"]


def test_a_task_of_an_array_is_requeued_alone(tmp_path: Path) -> None:
    """The last one's own job id is the array's."""
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    said = ["srun: error: n1: task 0: Exited with exit code 75", ENDS_OTHERS]
    _, _, asked = end_of(tmp_path, said, 75, options=["--array-seeds=5,6"], variables=variables)
    assert asked == ["squeue --noheader --format %T --jobs 7_1", "scontrol requeue 7_1"]


def test_starts_that_save_nothing_new_come_to_an_end(tmp_path: Path) -> None:
    said = ["srun: error: n1: task 0: Exited with exit code 75", ENDS_OTHERS]
    for _ in range(2):
        assert end_of(tmp_path, said, 75)[2][-1] == "scontrol requeue 7"
    _, lines, asked = end_of(tmp_path, said, 75)
    assert asked == []
    assert lines == ["job 7: not requeued: 3 starts in a row saved no step; is --time too short?"]


def test_what_a_launcher_left_in_the_shell_does_not_reach_the_ranks(tmp_path: Path) -> None:
    left = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID"), "0")
    status, lines, _ = end_of(tmp_path, [], 0, variables={**left, "MEGATRON_FIPO_LAUNCHER_PID": "1", "A": "b"})
    assert (status, lines) == (0, ["job 7: finished"])
    names = {line.partition("=")[0] for line in (tmp_path / "told" / "ranks").read_text().splitlines()}
    assert not names & {*left, "MEGATRON_FIPO_LAUNCHER_PID"}
    assert names >= {"A", "MASTER_ADDR", "MASTER_PORT"}


def test_variables_of_another_launcher_are_noticed_among_the_tasks_of_srun() -> None:
    left = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(ValueError, match="WORLD_SIZE is 1, but srun started 2 tasks: unset RANK"):
        _check_started(left)
    _check_started({**left, "WORLD_SIZE": "2"})
    _check_started({**left, "TORCHELASTIC_RUN_ID": "x"})
