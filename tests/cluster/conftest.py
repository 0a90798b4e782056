"""Fixtures of the cluster's tests: two nodes, a Slurm on two others, and jobs that are submitted as a user would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from left_behind import nothing_left_behind
from namespaces import Node, two_nodes
from processes import REPO_ROOT
from runs import write_inputs
from slurm_cluster import slurm_cluster
from slurm_jobs import ENVIRONMENT, Jobs


@pytest.fixture(scope="session")
def slurm_directory() -> Iterator[Path]:
    """Short enough a path for munged's socket."""
    with tempfile.TemporaryDirectory(prefix="slurm") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, problems, and recorded rollouts. Not to be written to."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def jobs(slurm_directory: Path, inputs: Path) -> Iterator[Jobs]:
    with slurm_cluster(slurm_directory) as cluster:
        yield Jobs(cluster, inputs)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two machines without a batch system."""
    with two_nodes(tmp_path, tag="mfn") as both:
        yield both


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process and no shared memory outlives a test."""
    with nothing_left_behind(request.node.name):
        yield


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command on a node, its output in a file; ends what is left of it."""
    started: list[subprocess.Popen[bytes]] = []

    def on(node: Node, words: Sequence[str | Path], output: Path, cwd: Path) -> subprocess.Popen[bytes]:
        env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(cwd), str(REPO_ROOT)])}
        with output.open("wb") as file:
            started.append(node.start(words, env, cwd=cwd, stdout=file, stderr=file))
        return started[-1]

    yield on
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
