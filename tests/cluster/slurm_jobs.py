"""Small training runs as Slurm jobs, submitted as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import REPO_ROOT, TESTS
from runs import REPLAYED_FLAGS, arguments_of
from slurm_cluster import ENDED, Cluster, wait_for

DISTURBED = TESTS / "cluster" / "disturbed_program.py"
PROGRAM = ("-m", "megatron_fipo.train")
JOB_WITHIN_S = 200.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "SPT_NOENV": "1"}


@dataclass(frozen=True)
class Jobs:
    """Submits small training runs on recorded rollouts, one rank per node."""

    cluster: Cluster
    inputs: Path

    def launch(
        self, directory: Path, options: Sequence[str], program: Sequence[str | Path]
    ) -> subprocess.CompletedProcess[str]:
        """`megatron_fipo.launch --slurm OPTIONS PROGRAM` in `directory`, by a user of this cluster."""
        words = [sys.executable, "-m", "megatron_fipo.launch", "--slurm", *options, *program]
        return self.cluster.run(words, directory, self.environment(directory), timeout_s=JOB_WITHIN_S)

    def submit(self, directory: Path, options: Sequence[str], program: Sequence[str | Path]) -> str:
        """The id of a job that was submitted."""
        done = self.launch(directory, options, program)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.match(r"submitted job (\d+): ", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    def flags(self, **more: Any) -> list[str]:
        """A run of 5 steps that saves every second one; `more` replaces and adds."""
        return replayed_flags(self.inputs, **more)

    def environment(self, directory: Path) -> dict[str, str]:
        site = {"SBATCH_OUTPUT": "elsewhere.txt", "SBATCH_OPEN_MODE": "truncate"}  # as a user's profile may have it
        return {**ENVIRONMENT, **site, "PYTHONPATH": os.pathsep.join([str(directory), str(REPO_ROOT)])}

    def wait(self, job: str, timeout_s: float = JOB_WITHIN_S) -> str:
        """The state that the job ended in."""
        wait_for(f"end of job {job}", lambda: self.cluster.state(job) in ENDED, timeout_s)
        return self.cluster.state(job)

    def requeue_now(self, job: str) -> None:
        """Slurm lets a job that was requeued wait for its old credentials to run out."""
        self.cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def replayed_flags(inputs: Path, **more: Any) -> list[str]:
    """The program's arguments for a run on the recorded rollouts in `inputs`."""
    given = {name.replace("_", "-"): value for name, value in more.items()}
    paths = {
        "hf-checkpoint": inputs / "model",
        "prompt-data": inputs / "problems.jsonl",
        "replay-rollouts": inputs / "rollouts",
    }
    return arguments_of({**paths, **REPLAYED_FLAGS, **given})
