"""What a check of the GPU path is: a program that passes, fails, or says what it lacks.

Its last line of output is one JSON object, `{"result": "passed|failed|skipped", "reason": ...}`, and its exit status 0,
1 or 77. With `--device cpu` the same code runs at small shapes on the CPU, which is how the tests keep it alive.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct"
"""The quickstart's, made from its wheel."""
STATUS = {"passed": 0, "failed": 1, "skipped": 77}


class Skip(Exception):
    """The machine lacks what this check needs."""


class CheckFailed(Exception):
    """Found, and not as it must be."""


def require(condition: bool, what: str) -> None:
    """Raises CheckFailed with `what` was found."""
    if not condition:
        raise CheckFailed(what)


def require_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> float:
    """The largest difference, relative to the largest value wanted. Raises CheckFailed where it is beyond the tolerance
    or anything is not finite."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
    require(bool(torch.isfinite(found).all()), f"{what}: not finite")
    if not found.numel():
        return 0.0
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    require(
        difference <= tolerance, f"{what}: off by {difference:.2e} of the largest, at most {tolerance:.0e} is right"
    )
    return difference


def require_modules(*names: str) -> None:
    """Raises Skip naming those that are not installed."""
    absent = [name for name in names if not is_installed(name)]
    if absent:
        raise Skip(f"not installed: {', '.join(absent)}")


def is_installed(name: str) -> bool:
    """Whether there is such a module; a submodule's package is imported for it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def require_gpus(device: torch.device, count: int) -> None:
    """Raises Skip where there are fewer; on the CPU any number of processes will do."""
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise Skip(f"{count} GPUs are needed, {torch.cuda.device_count()} are visible")


def require_model(directory: Path) -> None:
    """Make the quickstart's model where it is asked for and not there yet. Raises Skip where it cannot be made, and
    where another model that is asked for is not there."""
    if (directory / "config.json").is_file():
        return
    command = ["tools/prepare_smollm2.py", "--save", str(directory)]
    if directory != MODEL:
        raise Skip(f"no model in {directory}: python {' '.join(command)}")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip(f"no model in {directory}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


def exact_fp32(environment: MutableMapping[str, str]) -> None:
    """fp32 products in fp32, before CUDA starts: Transformer Engine asks cuBLAS for TF32, whatever torch's settings."""
    environment["NVIDIA_TF32_OVERRIDE"] = "0"


def repeatable_updates(environment: MutableMapping[str, str]) -> None:
    """Sums in one order, before CUDA starts: torch's, cuBLAS's, and Transformer Engine's attention."""
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True, warn_only=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every check has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def run_check(check: Callable[[argparse.Namespace, torch.device], str], options: argparse.Namespace) -> int:
    """Run it, print its result, return the exit status. `check` returns what it measured, in words."""
    device = torch.device(options.device)
    try:
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise Skip("no CUDA device is visible")
            torch.cuda.set_device(0)
        result, reason = "passed", check(options, device)
    except Skip as skip:
        result, reason = "skipped", str(skip)
    except Exception as error:  # whatever goes wrong is the finding
        traceback.print_exc()
        result, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(json.dumps({"result": result, "reason": reason}), flush=True)
    return STATUS[result]


def add_paths(*folders: str) -> None:
    """Put folders of the repository, and the repository, where Python looks for modules."""
    sys.path[:0] = [str(ROOT / folder) for folder in folders] + [str(ROOT)]
