"""Two checkpoints of a real actor, saved once: every test damages copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import run_ranks
from tiny_models import save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "qwen2", tied=True)
    return directory


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A directory of checkpoints after steps 1 and 2 of a real actor; not to be written to."""
    directory = tmp_path_factory.mktemp("saved")
    kwargs = {"model_dir": str(model_dir), "root": str(directory / "checkpoints")}
    run_ranks(directory, 1, "files.real_checkpoint:save_two_steps", kwargs)
    return directory / "checkpoints"


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture
def one_process_job() -> Iterator[None]:
    """The process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
