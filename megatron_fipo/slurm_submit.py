"""From a command line to a job: check, write the sbatch file, submit it, say how to watch it, follow it if asked."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_fipo.config import require
from megatron_fipo.slurm_options import PROGRAM, REFUSED, SlurmJob, asks_for_help, read_command, seconds_of
from megatron_fipo.slurm_script import sbatch_script
from megatron_fipo.train import RUN_FAILED, USER_ERROR

# where sbatch's variable is not called as its option is
_VARIABLES = {"array": "array-inx", "mem": "mem-per-node", "switches": "req-switch", "time": "timelimit"}
HELP = """\
python -m megatron_fipo.launch --slurm [options] -m megatron_fipo.train [its arguments]

Writes one sbatch file and submits it: one srun task per rank. docs/cluster.md has examples.

  sbatch's options, under sbatch's names:
    --nodes N (1)  --ntasks-per-node R (default: the GPUs of --gpus-per-node or --gres)  --gpus-per-node  --gres
    --partition  --account  --qos  --time  --cpus-per-task  --mem  --job-name  --constraint  --exclude  --nodelist
    --reservation  --exclusive  --mail-type  --mail-user  --comment  --begin  --dependency  --licenses  --nice ...
    --sbatch-option "--x=y"   any other line; may be repeated
    --srun-option "--x=y"     an option of srun; may be repeated
  containers (pyxis): --container-image --container-mounts --container-workdir --container-name --container-env ...

  --dry-run                 print the file, submit nothing
  --follow                  show state changes and rank 0's log until the job ends; end with its status
  --log-dir DIR             logs and the file itself (default: slurm/ in the program's --output-dir)
  --array-seeds 1,2,7-9%2   a job array: every task has its own --seed, --save, --output-dir ...; here two at a time
  --no-requeue              do not requeue after a save (the default needs --save and --auto-resume)
  --max-requeues N          at most so many times (100)
  --max-failures N          requeue so many times after a failure too, without the nodes that failed (0)
  --signal-before-s N       SIGUSR1 to the ranks N seconds before the time limit (--exit-grace-s and 60 more)
  --master-port N           where the ranks meet (20000 + job id % 10000)
  --python FILE             interpreter (this one; python3 in a container)
  --setup LINE              a line of bash before the ranks start, such as "module load cuda"; may be repeated
"""


def main(words: Sequence[str]) -> int:
    """`--slurm` and what follows. Errors the user can act on are one line and status 2."""
    try:
        if asks_for_help(words):
            print(HELP, end="")
            return 0
        command = read_command(words)
        check_program(command.job)
        invocation = ["python", "-m", "megatron_fipo.launch", "--slurm", *words]
        text = sbatch_script(command.job, invocation)
        if command.is_dry:
            sys.stdout.buffer.write(os.fsencode(text))
            return 0
        job_id = submit(command.job, text)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_FAILED
    print(describe(command.job, job_id), flush=True)
    if not command.follows:
        return 0
    from megatron_fipo.slurm_follow import follow

    return follow(command.job, job_id)


def check_program(job: SlurmJob) -> None:
    """The training program's own check of its flags, before the job waits in a queue. Raises ValueError."""
    if job.program[:2] != ("-m", PROGRAM):
        return
    from megatron_fipo.arguments import parse_arguments
    from megatron_fipo.parallel import ParallelLayout
    from megatron_fipo.preview import preview

    ranks = {"RANK": 0, "WORLD_SIZE": job.nodes * job.ranks_per_node, "LOCAL_WORLD_SIZE": job.ranks_per_node}
    environment = {name: str(value) for name, value in ranks.items()}
    megatron = parse_arguments(job.program[2:], lambda settings: preview(settings, environment)).megatron
    ParallelLayout.for_world(
        job.nodes * job.ranks_per_node,
        0,
        tp=megatron.tensor_model_parallel_size,
        pp=megatron.pipeline_model_parallel_size,
        cp=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        ep=megatron.expert_model_parallel_size,
        etp=megatron.expert_tensor_parallel_size,
    )


def submit(job: SlurmJob, text: str) -> str:
    """Write the file into the job's directory of logs and give it to sbatch. Returns the job's id.

    Raises ValueError where something of the user's making speaks against it, with nothing submitted.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on the PATH: submit from a node of the cluster, or look with --dry-run")
    _check_partition(job)
    directory = Path(job.log_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        script = directory / f"submitted-{time.time_ns()}.sbatch"
        script.write_bytes(os.fsencode(text))
    except OSError as error:
        raise ValueError(f"--log-dir is {job.log_dir!r}, but must be a directory to write to: {error}") from None
    done = _slurm("sbatch", "--parsable", str(script), env=without_overrides(outside_of_jobs(os.environ), text))
    if done.returncode != 0:
        script.unlink()
        raise ValueError(f"sbatch refused the job: {_last_line(done.stderr)}")
    job_id = done.stdout.strip().partition(";")[0]
    script.rename(directory / f"{job_id}.sbatch")
    return job_id


def describe(job: SlurmJob, job_id: str) -> str:
    """What the user wants to know about a job that was submitted."""
    name = f"{job_id}_{{0..{len(job.seeds) - 1}}}" if job.seeds else job_id
    directory = shlex.quote(job.log_dir)
    rows = [
        f"submitted job {job_id}: {job.nodes} nodes x {job.ranks_per_node} ranks"
        + (f", seeds {', '.join(map(str, job.seeds))}" if job.seeds else ""),
        f"  file    {directory}/{job_id}.sbatch",
        f"  log     {directory}/{name}.log",
        f"  ranks   {directory}/{name}.<start>/rank-<rank>-<node>.log",
        f"  watch   squeue --jobs {job_id}; tail -F {directory}/{name}.log",
        f"  cancel  scancel {job_id}",
    ]
    if job.signal_before_s is not None:
        what = "saves, and is requeued" if job.requeue else "saves, and ends"
        rows.insert(-1, f"  save    scancel --signal=USR1 {job_id}   ({what})")
    return "\n".join(rows)


def _check_partition(job: SlurmJob) -> None:
    """What sbatch would let wait in the queue for ever, or refuse in other words."""
    done = _slurm("sinfo", "--all", "--noheader", "--format", "%P|%D|%L|%l")
    if done.returncode != 0:
        raise ValueError(f"Slurm does not answer: {_last_line(done.stderr)}")
    sizes: dict[str, int] = {}
    limits: dict[str, str] = {}  # of jobs that do not say
    longest: dict[str, str] = {}
    defaults = []
    for line in done.stdout.splitlines():
        name, count, usual, most = line.strip().split("|")
        if name.endswith("*"):
            name = name.removesuffix("*")
            defaults = [name]
        sizes[name] = sizes.get(name, 0) + (int(count) if count.isdecimal() else 0)
        longest[name] = most
        limits[name] = usual if usual != "n/a" else most
    wanted = job.sbatch.get("partition")
    names = wanted.split(",") if wanted else list(sizes)
    for name in names:
        require(name in sizes, "--partition", name, f"one of {', '.join(sorted(sizes))}")
    largest = max((sizes[name] for name in names), default=0)
    where = f"the partition {wanted}" if wanted else "the largest partition"
    asked = wanted.split(",") if wanted else defaults
    for name in asked:
        if "time" not in job.sbatch and job.signal_before_s is not None:
            require(
                job.signal_before_s < seconds_of(limits[name]),
                "--time",
                None,
                f"given: the partition {name} gives {limits[name]}, and {job.signal_before_s} s of it are for saving",
            )
    time_limit = job.sbatch.get("time")
    if time_limit and asked and all(seconds_of(time_limit) > seconds_of(longest[name]) for name in asked):
        most = f"{', '.join(longest[name] for name in asked)}, the most that {', '.join(asked)} gives"
        print(f"warning: --time {time_limit} is more than {most}: the job may wait for ever", file=sys.stderr)
    require(job.nodes <= largest, "--nodes", job.nodes, f"at most {largest}, as many as {where} has")


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what Slurm says of the job that the submitting shell is in: srun would take the memory,
    tasks and nodes of that one for the new job's."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
    is_inside = "SLURM_JOB_ID" in environment
    return {name: value for name, value in environment.items() if not (is_inside and _is_of_job(name)) or name in kept}


def without_overrides(environment: Mapping[str, str], text: str) -> dict[str, str]:
    """`environment` without the SBATCH_* variables of options that the file `text` names, or that must not be there:
    to sbatch they say more than the file does. Those of other options, a site's default account say, stay.
    """
    said = {*re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE), *REFUSED, "requeue", "no-requeue"}
    if said & {"mem", "mem-per-cpu", "mem-per-gpu"}:
        said |= {"mem", "mem-per-cpu", "mem-per-gpu"}
    names = {f"SBATCH_{_VARIABLES.get(option, option)}".replace("-", "_").upper() for option in said}
    return {name: value for name, value in environment.items() if name not in names}


def _is_of_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_"))


def _slurm(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=env)


def _last_line(text: str) -> str:
    """What a command of Slurm said last, without its own name before it."""
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: |fatal: )?", "", lines[-1]) if lines else "it did not say why"
