"""A real Slurm of two nodes: munged, slurmctld and a slurmd in each of two namespaces, with files of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from namespaces import Node, two_nodes

START_WITHIN_S = 30.0
ENDED = frozenset("CANCELLED COMPLETED FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT".split())
# cred_expire: how long a requeued job waits at least, 2 minutes otherwise
CONFIGURATION = """
ClusterName=local
SlurmctldHost=n1
SlurmUser=root
SlurmctldPort=6817
SlurmdPort=6818
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
KillWait=20
NodeName=n1,n2 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP OverSubscribe=YES
PartitionName=small Nodes=n2 MaxTime=10 State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """Where the cluster's commands are run: on its first node, with its configuration."""

    nodes: tuple[Node, Node]
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": path}

    def run(
        self, words: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """A command on the first node, and how it ended."""
        return subprocess.run(
            self.nodes[0].command(words),
            cwd=cwd,
            env={**os.environ, **self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = self.run(words, self.directory)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, which knows a job for some minutes after its end."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job)
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")


@contextlib.contextmanager
def slurm_cluster(directory: Path) -> Iterator[Cluster]:
    """Starts the daemons in `directory`, waits until both nodes are idle; ends the daemons by their process ids."""
    (directory / "state").mkdir()
    (directory / "slurm.conf").write_text(CONFIGURATION.format(directory=directory))
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    with two_nodes(directory) as nodes, contextlib.ExitStack() as daemons:
        cluster = Cluster(nodes, directory)

        def start(node: Node, *words: str) -> None:
            log = daemons.enter_context((directory / f"{words[0]}-{node.name}.out").open("wb"))
            process = node.start(words, cluster.environment, cwd=directory, stdout=log, stderr=log)
            daemons.callback(_stop, process)

        start(
            nodes[0],
            *("munged", "--foreground", "--force", f"--socket={directory}/munge.socket", f"--key-file={key}"),
            *(f"--{name}-file={directory}/munge.{name}" for name in ("log", "pid", "seed")),
        )
        wait_for("munged's socket", (directory / "munge.socket").exists)
        start(nodes[0], "slurmctld", "-D")
        for node in nodes:
            start(node, "slurmd", "-D", "-N", node.name)
        wait_for("two idle nodes", lambda: _idle(cluster) == ["idle", "idle"])
        yield cluster


def wait_for(what: str, ready: Callable[[], bool], timeout_s: float = START_WITHIN_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.1)


def _idle(cluster: Cluster) -> list[str]:
    done = cluster.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], cluster.directory)
    return done.stdout.split()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
