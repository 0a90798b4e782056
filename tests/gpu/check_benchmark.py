"""A benchmark on the GPU, for its figures: passes when it runs to its end. They are in the check's log.

python tests/gpu/check_benchmark.py future_kl|fused_loss|logprob_head
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
from checking import ROOT, CheckFailed, arguments, require_modules, run_check

SMALL = {"logprob_head": ["--shape", "64,16,500", "--rounds", "1", "--repeats", "1", "--chunk-sizes", "32"]}


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("numpy", *(["triton"] if device.type == "cuda" else []))
    small = SMALL[options.name] if device.type == "cpu" else []
    command = [sys.executable, f"benchmarks/{options.name}.py", "--device", device.type, *small]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    print(done.stdout, done.stderr[-3000:], sep="\n")
    if done.returncode:
        raise CheckFailed(f"it ended with {done.returncode}: {' '.join(done.stderr[-300:].split())}")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|") and "---" not in line]
    return f"{len(rows)} rows in the log"


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("name", choices=("future_kl", "fused_loss", "logprob_head"))
    sys.exit(run_check(check, parser.parse_args()))
