"""What `--slurm` accepts, refuses, and makes of it; the file itself is tested on a Slurm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_fipo import slurm_follow
from megatron_fipo.slurm_follow import follow, read_jobs
from megatron_fipo.slurm_options import SlurmJob, flag_value, read_command, seconds_of
from megatron_fipo.slurm_script import quoted, sbatch_script
from megatron_fipo.slurm_submit import describe, without_overrides

PROGRAM = ["-m", "megatron_fipo.train", "--save", "ckpt", "--auto-resume", "--output-dir", "out"]


def job(*options: str, program: list[str] = PROGRAM) -> SlurmJob:
    return read_command([*options, *program]).job


def test_ranks_are_one_per_gpu_unless_said_otherwise() -> None:
    assert (job().nodes, job().ranks_per_node) == (1, 1)
    assert job("-N2", "--gpus-per-node=8").ranks_per_node == 8
    assert job("--gpus-per-node", "h100:4").ranks_per_node == 4
    assert job("--gres=gpu:a100:2,tmp:1G").ranks_per_node == 2
    assert job("--gres", "gpu").ranks_per_node == 1
    assert job("--nnodes", "4", "--nproc-per-node=3") == job("--nodes=4", "--ntasks-per-node", "3")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--partiton=x"], "unknown option --partiton of --slurm; did you mean --partition?"),
        (["--zzz"], 'see --slurm --help (any line for sbatch: --sbatch-option "--zzz=...")'),
        (["--gpus-per-task=1"], "every rank must see all GPUs of its node"),
        (["--output=x"], "--output is not an option here: the logs lie in --log-dir"),
        (["--nodes", "0"], "--nodes is '0', but must be a whole number >= 1"),
        (["--nodes", "1-4"], "--nodes is '1-4', but must be a whole number >= 1"),
        (["--nodes=1", "--nodes=2"], "--nodes is given twice, as '1' and '2'"),
        (["--nodes"], "--nodes is None, but must be followed by a value"),
        (
            ["--gpus-per-node=2", "--ntasks-per-node=4"],
            "--ntasks-per-node is 4, but must be at most the GPUs of a node",
        ),
        (["--time=5:xx"], "--time is '5:xx', but must be as sbatch wants it"),
        (["--time=2"], "--time is '2', but must be longer than --signal-before-s (180 s"),
        (["--array-seeds=1,x"], "--array-seeds is '1,x', but must be seeds as in 1,2,7-9"),
        (["--array-seeds=1,1-2"], "--array-seeds is '1,1-2', but must be without a seed twice"),
        (["--container-mounts=/a:/b"], "--container-image is None, but must be given with --container-mounts"),
        (["--container-image=x"], "--log-dir is None, but must be given with a container"),
        (["--comment=a\n#SBATCH --x"], "--comment is 'a\\n#SBATCH --x', but must be without"),
        (["--log-dir=a\nb"], "--log-dir is 'a\\nb', but must be a directory without"),
        (["--sbatch-option=x"], "--sbatch-option is 'x', but must be an option of sbatch"),
        (["--max-failures=1", "--no-requeue"], "--max-failures is 1, but must be 0 with --no-requeue"),
        (["--requeue", "--no-requeue"], "--requeue is 'given', but must be absent with --no-requeue"),
        (["--master-port=80"], "--master-port is 80, but must be in [1024, 65536)"),
        (
            ["--sbatch-option=--array=0-3"],
            "--sbatch-option is '--array=0-3', but must be something else: --array-seeds makes",
        ),
        (["--sbatch-option=--output x"], "--sbatch-option is '--output x', but must be something else: the logs lie"),
        (["-G16", "-N2"], "--gpus is '16', but must be given as --gpus-per-node, or with --ntasks-per-node"),
        (["--gres=gpu:8(S:0-1)"], "--gres is 'gpu:8(S:0-1)', but must be a count of each node's GPUs"),
        (["--gres=gpu:h100:4,gpu:a100:4"], "--gres is 'gpu:h100:4,gpu:a100:4', but must be a count"),
        (["--dry-run=1"], "--dry-run is '1', but must be given without a value"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: list[str], wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        job(*options)


def test_a_job_that_is_requeued_must_save_and_resume() -> None:
    for missing, rest in (("--save", PROGRAM[:2] + PROGRAM[4:]), ("--auto-resume", PROGRAM[:4] + PROGRAM[5:])):
        with pytest.raises(ValueError, match=f"{missing} of the program .* or say --no-requeue"):
            job(program=rest)
        assert not job("--no-requeue", program=rest).requeue
    unsaved = job("--no-requeue", program=PROGRAM[:2] + PROGRAM[5:])
    assert unsaved.signal_before_s is None
    assert "idle-starts" not in sbatch_script(unsaved, [])
    with pytest.raises(ValueError, match="the program"):
        read_command(["--nodes=2"])


def test_the_signal_leaves_time_to_save_and_for_slurm_to_be_early() -> None:
    assert job("--time=1:00:00").signal_before_s == 120 + 60
    assert job(program=[*PROGRAM, "--exit-grace-s", "600"]).signal_before_s == 660
    assert job("--signal-before-s=30").signal_before_s == 30


def test_every_directory_that_is_written_to_is_a_seed_s_own() -> None:
    array = job("--array-seeds=3,8-9%2", program=[*PROGRAM, "--export-hf=a b", "--tensorboard-dir", "tb"])
    assert (array.seeds, array.concurrent_seeds) == ((3, 8, 9), 2)
    text = sbatch_script(array, [])
    for line in (
        "#SBATCH --array=0-2%2",
        "SEEDS=(3 8 9)",
        'PROGRAM+=(--save ckpt/"seed-$SEED")',
        'PROGRAM+=(--output-dir out/"seed-$SEED")',
        "PROGRAM+=(--export-hf 'a b'/\"seed-$SEED\")",
        'PROGRAM+=(--tensorboard-dir tb/"seed-$SEED")',
    ):
        assert line in text.splitlines()
    with pytest.raises(ValueError, match="--seed is '4', but must be absent with --array-seeds"):
        job("--array-seeds=1", program=[*PROGRAM, "--seed", "4"])


def test_a_retry_needs_other_nodes() -> None:
    assert "FAILURES" not in sbatch_script(job(), [])
    with pytest.raises(ValueError, match="--nodelist"):
        job("--max-failures=2", "-w", "n1")


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    for text, seconds in (
        ("90", 5400),
        ("1:30", 90),
        ("2:0:1", 7201),
        ("1-0", 86400),
        ("1-2:3", 93780),
        ("1-2:3:4", 93784),
    ):
        assert seconds_of(text) == seconds
    assert seconds_of("unlimited") == float("inf")
    for text in ("", "1:2:3:4", "-5", "0", "1-"):
        with pytest.raises(ValueError, match="--time is"):
            seconds_of(text)


def test_what_is_said_last_about_a_flag_holds() -> None:
    assert flag_value(["--save", "a", "--save=b"], "--save") == "b"
    assert flag_value(["--auto-resume", "--x"], "--auto-resume") == ""
    assert flag_value(["--saved", "a"], "--save") is None


def test_a_word_stays_on_one_line_of_bash() -> None:
    assert [quoted(word) for word in ("a", "a b", "", "a\nb'\\", "\x01")] == [
        "a",
        "'a b'",
        "''",
        "$'a\\nb\\'\\\\'",
        "$'\\x01'",
    ]


def test_what_scontrol_says_of_a_job_and_of_an_array_is_read() -> None:
    text = (
        "JobId=7 ArrayJobId=6 ArrayTaskId=1 JobName=a b JobState=PENDING Reason=Priority NodeList=(null)\n"
        "JobId=6 ArrayJobId=6 ArrayTaskId=0 JobName=x JobState=FAILED Reason=None ExitCode=2:0 NodeList=n[1-2]\n"
    )
    assert [(name, task["JobState"]) for name, task in read_jobs(text)] == [("6_0", "FAILED"), ("6_1", "PENDING")]
    assert [name for name, _ in read_jobs("JobId=9 JobState=RUNNING Reason=None")] == ["9"]
    assert read_jobs("slurm_load_jobs error: Invalid job id specified\n") == []


def test_following_an_array_remembers_a_task_that_slurm_has_forgotten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks = [
        {"6_0-1": {"JobState": "PENDING"}},
        {"6_0": {"JobState": "FAILED", "ExitCode": "3:0"}, "6_1": {"JobState": "RUNNING"}},
        {"6_1": {"JobState": "COMPLETED"}},
    ]
    monkeypatch.setattr(slurm_follow, "_look", lambda job_id: looks.pop(0))
    array = job("--array-seeds=1,2", f"--log-dir={tmp_path}")
    assert follow(array, "6", look_every_s=0.0) == 3
    looks += [{"6_0-1": {"JobState": "PENDING"}}, {name: {"JobState": "COMPLETED"} for name in ("6_0", "6_1")}]
    assert follow(array, "6", look_every_s=0.0) == 0


def test_a_slurm_that_does_not_answer_for_a_while_is_asked_again_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    down = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"
    up = "echo JobId=6 JobState=RUNNING"
    count = tmp_path / "count"
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\necho x >>'{count}'\n[ $(wc -l <'{count}') -gt 5 ] || {{ {down}; }}\n{up}\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tasks = slurm_follow._look("6", pause=lambda seconds: None)
    assert tasks == {"6": {"JobId": "6", "JobState": "RUNNING"}}
    said = "slurm_load_jobs error: Unable to contact slurm controller"
    assert capsys.readouterr().err == f"Slurm does not answer, and is asked again: {said}\n"


def test_what_the_file_says_holds_against_the_variables_of_sbatch() -> None:
    text = sbatch_script(job("--time=20", "--mem=4G", "--partition", "gpu"), ["x"])
    site = {"SBATCH_ACCOUNT": "rl", "SBATCH_QOS": "long", "PATH": "/bin"}
    against = {
        **{
            "SBATCH_PARTITION": "debug",
            "SBATCH_TIMELIMIT": "1",
            "SBATCH_MEM_PER_CPU": "1G",
            "SBATCH_MEM_PER_NODE": "1G",
        },
        **{"SBATCH_OUTPUT": "x", "SBATCH_OPEN_MODE": "truncate", "SBATCH_SIGNAL": "USR2", "SBATCH_NO_REQUEUE": "1"},
        **{"SBATCH_ARRAY_INX": "1-3", "SBATCH_WAIT": "1", "SBATCH_GPUS_PER_TASK": "1"},
    }
    assert without_overrides({**site, **against}, text) == site
    assert "SBATCH_PARTITION" in without_overrides(against, sbatch_script(job("--time=20"), ["x"]))


def test_only_a_job_that_saves_is_told_how_to_save() -> None:
    assert "scancel --signal=USR1 7   (saves, and is requeued)" in describe(job(), "7")
    assert "scancel --signal=USR1 7   (saves, and ends)" in describe(job("--no-requeue"), "7")
    assert "USR1" not in describe(job("--no-requeue", "--log-dir", "x", program=["show.py"]), "7")
