"""A benchmark on the GPU, for its figures: passes when it runs to its end. They are in the check's log, row by row.

    python tests/gpu/check_benchmark.py future_kl|fused_loss|logprob_head [-- FLAGS]

FLAGS are the benchmark's own, for fewer rounds or shapes: `logprob_head -- --rounds 1 --shape 4096,4096,152064`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
from checking import ROOT, CheckFailed, arguments, require_modules, run_check

SMALL = {
    "future_kl": ["--rounds", "1"],
    "fused_loss": ["--shape", "2,64", "--rounds", "1", "--contestants", "fused", "eager"],
    "logprob_head": ["--shape", "64,16,500", "--rounds", "1", "--repeats", "1", "--chunk-sizes", "32"],
}


def check(options: argparse.Namespace, device: torch.device) -> str:
    rival = ["scipy"] if options.name == "future_kl" else []
    require_modules("numpy", *(["triton"] if device.type == "cuda" else rival))
    small = SMALL[options.name] if device.type == "cpu" else []
    flags = ["--device", device.type, *small, *options.flags]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}  # what is measured stays if it is killed
    command = [sys.executable, f"benchmarks/{options.name}.py", *flags]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=1800).returncode
    if status:
        raise CheckFailed(f"{' '.join(command[1:])} ended with {status}, its words are in the log")
    return "its table is in the log"


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("name", choices=tuple(SMALL))
    parser.add_argument("flags", nargs="*", help="after --: the benchmark's own")
    sys.exit(run_check(check, parser.parse_args()))
