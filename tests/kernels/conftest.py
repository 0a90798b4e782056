"""Kernels run under Triton's interpreter (`bash tests/run.sh kernels`), or compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU when they are compiled, else the CPU."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
