"""The quickstart's task on one GPU: SmolLM2-135M-Instruct, small arithmetic, trainer and engine taking turns on it.

    python tests/gpu/check_quickstart.py [--hf-checkpoint DIR] [--steps 12] [-- further flags of megatron_fipo.train]

Passes when the evaluated accuracy rose by 0.2 (by any amount with fewer than 12 steps) and the noise gauge stayed at 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checking import MODEL, ROOT, CheckFailed, arguments, require, require_model, require_modules, run_check

FLAGS = {
    "--bf16": (),
    "--task": ("small_arithmetic",),
    "--num-eval-problems": ("96",),
    "--rollout-batch-size": ("8",),
    "--n-samples-per-prompt": ("8",),
    "--num-updates-per-rollout": ("4",),
    "--rollout-max-prompt-len": ("64",),
    "--rollout-max-response-len": ("8",),
    "--max-tokens-per-micro-batch": ("1024",),
    "--lr": ("1e-5",),
    "--lr-warmup-iters": ("0",),
    "--weight-decay": ("0.0",),
    "--algorithm": ("fipo",),
    "--no-overlong-penalty": (),
    "--rollout-num-engines": ("1",),
}


def training_flags(options: argparse.Namespace, output_dir: str) -> list[str]:
    """Those of megatron_fipo.train, one rank."""
    flags = [word for flag, values in FLAGS.items() for word in (flag, *values)]
    where = ["--hf-checkpoint", str(options.hf_checkpoint), "--output-dir", output_dir, "--device", options.device]
    steps = ["--train-iters", str(options.steps), "--eval-interval", str(options.steps)]
    share = [] if options.device == "cpu" else ["--sglang-mem-fraction-static", "0.5"]
    return [*where, *flags, *steps, *share, *options.flags]


def check(options: argparse.Namespace, device: torch.device) -> str:
    require_modules("transformers", "megatron.core", "sglang", "reasoning_gym", "rich", "tensorboard")
    require_model(options.hf_checkpoint)
    launch = [sys.executable, "-m", "megatron_fipo.launch", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0", "-m", "megatron_fipo.train"]
    with tempfile.TemporaryDirectory() as directory:
        command = [*launch, *training_flags(options, f"{directory}/run")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000)
        print(done.stderr[-6000:], file=sys.stderr)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "rror" in line]
            raise CheckFailed(f"the run ended with {done.returncode}: {(errors or ['no word'])[-1][-300:]}")
        evaluations = records(Path(directory, "run", "evaluations.jsonl"))
        steps = records(Path(directory, "run", "metrics.jsonl"))
    before, after = evaluations[0]["accuracy"], evaluations[-1]["accuracy"]
    gauges = [step["noise_gauge"] for step in steps if "noise_gauge" in step]
    require(max(gauges, default=0.0) == 0.0, f"the noise gauge showed {max(gauges, default=0.0)}")
    risen = after - before
    require(risen >= 0.2 if options.steps >= 12 else risen >= -0.2, f"accuracy {before:.2f} -> {after:.2f}")
    return f"accuracy {before:.2f} -> {after:.2f} in {len(steps)} steps"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--hf-checkpoint", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("flags", nargs="*", help="further flags of megatron_fipo.train, after --")
    sys.exit(run_check(check, parser.parse_args()))
