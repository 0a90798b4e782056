"""The checks of the GPU path run their own code here, on the CPU at small shapes: none is dead when a GPU comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(repo_root: Path, *command: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the JSON object of the last line that is one."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=repo_root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"result"')]
    assert found, done.stderr[-2000:]
    return done.returncode, found[-1]


@pytest.mark.parametrize(
    "command",
    [
        ["check_logprobs.py"],
        ["check_layouts.py", "--num-ranks", "1"],  # which runs check_actor.py; more ranks are tests/distributed's
        ["check_offload.py"],
        ["check_checkpoint.py"],
        ["check_weight_sync.py"],
        ["check_benchmark.py", "logprob_head"],
    ],
    ids=" ".join,
)
def test_a_check_passes_on_the_cpu(command: list[str], repo_root: Path) -> None:
    status, found = run(repo_root, f"tests/gpu/{command[0]}", *command[1:], "--device", "cpu")
    assert (status, found["result"]) == (0, "passed"), found


@pytest.mark.parametrize("case", ["future_kl", "fused_loss"])
def test_the_kernels_check_passes_under_the_interpreter(case: str, repo_root: Path) -> None:
    kernels = repo_root / ".venv" / "kernels"
    command = ("tests/gpu/check_kernels.py", "--case", case, "--device", "cpu")
    status, found = run(repo_root, *command, PYTHONPATH=str(kernels))
    if (kernels / "triton").is_dir():  # there once `tests/run.sh kernels` was run
        assert (status, found["result"]) == (0, "passed"), found
    else:
        assert (status, found) == (77, {"result": "skipped", "reason": "not installed: triton"})


def test_without_a_gpu_or_a_package_a_check_is_skipped_and_says_why(repo_root: Path) -> None:
    assert run(repo_root, "tests/gpu/check_logprobs.py") == (
        77,
        {"result": "skipped", "reason": "no CUDA device is visible"},
    )
    engine = ("tests/gpu/check_actor.py", "--device", "cpu", "--transformer-impl", "transformer_engine")
    assert run(repo_root, *engine) == (77, {"result": "skipped", "reason": "not installed: transformer_engine"})
    quickstart = ("tests/gpu/check_quickstart.py", "--device", "cpu", "--hf-checkpoint", "nowhere")
    status, found = run(repo_root, *quickstart)
    assert (status, found["result"]) == (77, "skipped")
    assert found["reason"].startswith("no model in nowhere: python tools/prepare_smollm2.py --save nowhere")


def test_without_a_gpu_the_script_says_so(repo_root: Path) -> None:
    done = subprocess.run(
        ["bash", "tests/gpu/run.sh"], cwd=repo_root, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tests/gpu: there is no GPU here: torch sees no CUDA device\n"
