"""Settings every test shares: one thread per process, and a runner of functions on several gloo ranks."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # importing megatron-core would import torch's compiler: a second per process

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from processes import RunRanks


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis keeps notes in the working directory, from the collection on, unless told otherwise."""
    directory = tempfile.TemporaryDirectory()
    config.add_cleanup(directory.cleanup)
    set_hypothesis_home_dir(directory.name)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage looks through it again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two spinning threads per process on a busy machine are several times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """`processes.run_ranks` writing its files into this test's own directory."""
    return RunRanks(tmp_path)
