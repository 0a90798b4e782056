"""The sbatch file, held against bash and sbatch: what it is, what is refused, that words arrive as given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import wait_for
from slurm_jobs import PROGRAM, Jobs

ARGUMENTS = [
    "plain",
    "two words",
    "it's",
    'say "hi"',
    "",
    "$HOME `id` $(id)",
    "back\\slash",
    "line\nbreak",
    "tab\there",
    "cr\r\n",
    "#SBATCH --nodes=9",
    "*",
    "~",
    "ünï",
    "!x",
    "a\n#SBATCH --nodes=9",
]
EVERYTHING = [
    *("--nodes=2", "--ntasks-per-node", "2", "-p", "main", "--time=0:50:00", "--cpus-per-task=2", "-J", "a name"),
    *("--comment", "it's # 1, a & b", "--mem=64", "--max-failures=1", "--array-seeds=1,5-6%2"),
    *("--sbatch-option", "--wckey=x", "--setup", 'export A="b c"', "--master-port=4321", "--srun-option=--quiet"),
]


def script_of(jobs: Jobs, directory: Path, options: list[str], program: list[str]) -> Path:
    done = jobs.launch(directory, [*options, "--dry-run"], program)
    assert done.returncode == 0, done.stderr
    path = directory / "dry.sbatch"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain"),
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(
            ["--container-image=a/b:c", "--container-mounts", "/a b:/c", "--container-writable", "--log-dir=logs"],
            id="container",
        ),
    ],
)
def test_a_dry_run_is_read_by_bash_and_by_sbatch_and_writes_nothing(
    options: list[str], jobs: Jobs, tmp_path: Path
) -> None:
    path = script_of(jobs, tmp_path, options, [*PROGRAM, *jobs.flags(auto_resume=True)])
    assert sorted(tmp_path.iterdir()) == [path]
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=True, text=True).stderr == ""
    tested = jobs.cluster.run(["sbatch", "--test-only", path], tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert "to start at" in tested.stderr


def test_container_options_are_given_to_srun_and_the_job_runs_the_container_s_python(
    jobs: Jobs, tmp_path: Path
) -> None:
    """Text only: pyxis is not here."""
    options = ["--container-image=nvcr.io#nvidia/pytorch:25", "--container-mounts", "/a b:/c", "--container-writable"]
    path = script_of(jobs, tmp_path, [*options, "--log-dir=logs"], [*PROGRAM, *jobs.flags(auto_resume=True)])
    text = path.read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    wanted = "--container-image='nvcr.io#nvidia/pytorch:25' --container-mounts='/a b:/c' --container-writable \\"
    assert line.endswith(wanted)
    assert '    python3 "${PROGRAM[@]}"' in text


def test_words_arrive_exactly_and_every_rank_knows_where_to_meet(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "a dir").mkdir()
    (tmp_path / "show.py").write_text(
        "import json, os, pathlib, sys\n"
        "names = ('SLURM_PROCID', 'MASTER_ADDR', 'MASTER_PORT', 'A')\n"
        "found = [sys.argv[1:], [os.environ.get(name) for name in names]]\n"
        "pathlib.Path(f'shown-{os.environ[\"SLURM_PROCID\"]}').write_text(json.dumps(found))\n"
    )
    options = [
        "-N",
        "2",
        "--ntasks-per-node=2",
        "--no-requeue",
        "--comment",
        "it's # 1, a & b",
        "--setup=export A='b c'",
        "--export=B=1",
    ]
    job = jobs.submit(tmp_path, [*options, "--log-dir=a dir/100%j"], ["show.py", *ARGUMENTS])
    assert jobs.wait(job) == "COMPLETED"
    for rank in range(4):
        words, variables = json.loads((tmp_path / f"shown-{rank}").read_text())
        assert words == ARGUMENTS
        assert variables == [str(rank), "n1", str(20000 + int(job) % 10000), "b c"]
    assert {path.name for path in (tmp_path / "a dir" / "100%j").iterdir()} == {
        f"{job}.0",
        f"{job}.log",
        f"{job}.sbatch",
    }
    assert "Comment=it's # 1, a & b \n" in jobs.cluster.ask("scontrol", "show", "job", job)


def test_tasks_of_an_array_are_requeued_one_by_one(jobs: Jobs, tmp_path: Path) -> None:
    """The last one's own id is the array's."""
    (tmp_path / "turn.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))\n"
        "restarts = os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        "pathlib.Path(f'{os.environ[\"SLURM_ARRAY_TASK_ID\"]}.{restarts}').touch()\n"
        "time.sleep(100 if restarts == '0' else 0)\n"
    )
    program = ["turn.py", "--save=ckpt", "--auto-resume", "--output-dir=out"]
    job = jobs.submit(tmp_path, ["--time=10", "--array-seeds=5,6"], program)
    wait_for("two tasks", lambda: (tmp_path / "0.0").exists() and (tmp_path / "1.0").exists())
    jobs.cluster.ask("scancel", "--signal=USR1", job)
    for index in (0, 1):
        assert jobs.wait(f"{job}_{index}") == "COMPLETED"
        assert jobs.cluster.field(f"{job}_{index}", "Restarts") == "1"


def test_what_the_cluster_does_not_have_is_one_line_and_no_job(jobs: Jobs, tmp_path: Path) -> None:
    program = [*PROGRAM, *jobs.flags(auto_resume=True)]
    (tmp_path / "file").write_text("")
    for options, wanted in (
        (["--partition=gpu"], "--partition is 'gpu', but must be one of main, small"),
        (["--nodes=3"], "--nodes is 3, but must be at most 2, as many as the largest partition has"),
        (["-p", "small", "-N", "2"], "--nodes is 2, but must be at most 1, as many as the partition small has"),
        (
            ["-p", "small", "--signal-before-s=600"],
            "--time is None, but must be given: the partition small gives 10:00",
        ),
        (["--account=x", "--reservation=nobody"], "sbatch refused the job: Batch job submission failed: "),
        (["--time=tomorrow"], "--time is 'tomorrow', but must be as sbatch wants it: "),
        ([f"--log-dir={tmp_path}/file/logs"], f"--log-dir is '{tmp_path}/file/logs', but must be a directory to write"),
    ):
        done = jobs.launch(tmp_path, options, program)
        assert (done.returncode, done.stdout) == (2, ""), options
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {wanted}"), line
    assert jobs.cluster.ask("squeue", "--noheader") == ""
    assert not list(tmp_path.glob("**/*.sbatch"))


def test_a_time_that_no_partition_gives_is_warned_of(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text("")
    options = ["--time=2:00:00", "--no-requeue", "--log-dir=logs"]
    done = jobs.launch(tmp_path, options, ["show.py"])
    jobs.cluster.ask("scancel", "--name=fipo", "--state=PENDING")
    wanted = "--time 2:00:00 is more than 1:00:00, the most that main gives: the job may wait for ever"
    assert (done.returncode, done.stderr) == (0, f"warning: {wanted}\n")


def test_a_batch_script_without_srun_is_told_so(jobs: Jobs, tmp_path: Path) -> None:
    """It has the variables of a rank 0, which would wait for the others."""
    flags = jobs.flags(save=None, save_interval=None)
    job = jobs.cluster.run(
        ["sbatch", "--parsable", "--output=out.txt", "--wrap", subprocess.list2cmdline(["python", *PROGRAM, *flags])],
        tmp_path,
        {**jobs.environment(tmp_path), "PATH": f"{Path(sys.executable).parent}:{jobs.cluster.environment['PATH']}"},
    ).stdout.strip()
    assert jobs.wait(job) == "FAILED"
    said = (tmp_path / "out.txt").read_text()
    assert said == "error: this is a Slurm job, but no task of srun: start with srun, or with torchrun\n"
