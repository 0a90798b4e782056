"""Runs every check of the GPU path, each a process of its own, and prints a table. Started by run.sh.

Exit status: 0 when checks ran and none failed, 1 when one failed, 2 without torch or a CUDA device, 3 when every check
was skipped for what the machine lacks, 130 when interrupted (the table holds what ran). A check's own status is 0
passed, 1 failed, 77 skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
GROUPED = "moe_grouped_gemm=true"
GRACE_S = 30.0  # for a check that is asked to end
ENGINE = ("--transformer-impl", "transformer_engine")


@dataclass(frozen=True)
class Check:
    """A row of the table: a program of this directory and its arguments."""

    name: str
    command: tuple[str, ...]
    timeout_s: int = 900


CHECKS = (
    Check("Future-KL kernels", ("check_kernels.py", "--case", "future_kl")),
    Check("fused loss kernels", ("check_kernels.py", "--case", "fused_loss")),
    Check("log-probs of long packs", ("check_logprobs.py",)),
    Check("actor, local layers", ("check_actor.py",)),
    Check("actor, local layers, bf16", ("check_actor.py", "--bf16")),
    Check("actor, local layers, experts", ("check_actor.py", "--family", "qwen3_moe")),
    Check("actor, Transformer Engine", ("check_actor.py", *ENGINE, "--bf16")),
    Check("actor, Transformer Engine, Qwen3", ("check_actor.py", *ENGINE, "--bf16", "--family", "qwen3")),
    Check("actor, Transformer Engine, experts", ("check_actor.py", *ENGINE, "--family", "qwen3_moe")),
    *(Check(f"FP8, {name}", ("check_actor.py", *ENGINE, "--fp8-recipe", name)) for name in RECIPES),
    Check("grouped expert GEMMs", ("check_actor.py", *ENGINE, "--bf16", "--family", "qwen3_moe", "--field", GROUPED)),
    Check("layouts over NCCL, local layers", ("check_layouts.py",), 3600),
    Check("layouts over NCCL, Transformer Engine", ("check_layouts.py", *ENGINE), 3600),
    Check("layouts over NCCL, experts", ("check_layouts.py", *ENGINE, "--family", "qwen3_moe"), 3600),
    Check("checkpoints", ("check_checkpoint.py",)),
    Check("checkpoints, Transformer Engine", ("check_checkpoint.py", *ENGINE)),
    Check("checkpoints, FP8 delayed", ("check_checkpoint.py", *ENGINE, "--fp8-recipe", "delayed")),
    Check("offloading", ("check_offload.py",)),
    Check("weights to SGLang over CUDA IPC", ("check_weight_sync.py",), 1800),
    Check("--rollout-fp8", ("check_weight_sync.py", "--fp8"), 1800),
    Check("quantised checkpoints, served", ("check_quantized_serving.py",), 3600),
    Check("quickstart", ("check_quickstart.py",), 3600),
    Check("benchmark: Future-KL", ("check_benchmark.py", "future_kl"), 1800),
    Check("benchmark: fused loss", ("check_benchmark.py", "fused_loss"), 1800),
    Check("benchmark: log-prob head", ("check_benchmark.py", "logprob_head"), 1800),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a check."""

    check: Check
    result: str
    seconds: float
    reason: str


def main() -> int:
    """Run the checks that --only chooses, or all; print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="checks with this in their name; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print every check and its command, and end")
    parser.add_argument("--log-dir", type=Path, default=ROOT / "runs" / "gpu-checks", help="for each check's output")
    options = parser.parse_args()
    chosen = [check for check in CHECKS if options.only is None or any(text in check.name for text in options.only)]
    if not chosen:
        parser.error(f"--only {options.only}: no check has that in its name")
    if options.list:
        for check in chosen:
            print(f"{check.name}: python tests/gpu/{' '.join(check.command)}")
        return 0
    problem = no_gpu()
    if problem is not None:
        print(f"tests/gpu: {problem}", file=sys.stderr)
        return 2
    options.log_dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: checks are in sessions of their own
    outcomes: list[Outcome] = []
    try:
        for check in chosen:
            outcomes.append(run(check, options.log_dir))
            print(f"{outcomes[-1].result:8} {check.name} ({outcomes[-1].seconds:.0f} s)", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(table(outcomes))
        print(f"tests/gpu: interrupted before {len(chosen) - len(outcomes)} of {len(chosen)} checks", file=sys.stderr)
        return 130
    print(table(outcomes))
    return exit_status(outcomes)


def no_gpu() -> str | None:
    """Why nothing can run here; None where there is a GPU."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed for this Python"
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU here: torch sees no CUDA device"
    return None


def run(check: Check, log_dir: Path) -> Outcome:
    """Run one check; its output goes to a log of its name."""
    log = log_dir / f"{check.name.replace(' ', '-').replace(',', '').replace(':', '')}.log"
    program = HERE / check.command[0]
    if not program.is_file():
        return Outcome(check, "skipped", 0.0, f"{program.name} is not there")
    command = [sys.executable, str(program), *check.command[1:]]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "4", **os.environ}, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(check.timeout_s)
        except subprocess.TimeoutExpired:
            return Outcome(check, "failed", time.monotonic() - started, f"not done after {check.timeout_s} s: {log}")
        finally:
            end(process)
    seconds = time.monotonic() - started
    result, reason = read_result(log.read_text(errors="replace"))
    if {"passed": 0, "failed": 1, "skipped": 77}.get(result) != status:
        result, reason = "failed", f"ended with status {status}: {log}"
    return Outcome(check, result, seconds, reason)


def end(process: subprocess.Popen[bytes]) -> None:
    """A check that hung or was interrupted must not leave what it started on the GPU of the next one: torchrun ends its
    ranks when it is asked to, engines end with who started them."""
    for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
        if not signal_group(process.pid, number):
            return
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            process.poll()  # so that it counts as gone
            if not signal_group(process.pid, 0):
                return
            time.sleep(0.1)


def signal_group(group: int, number: int) -> bool:
    """Whether anybody is left in the process group to get the signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def read_result(output: str) -> tuple[str, str]:
    """(result, reason) from the last line that is one; ("", "") without."""
    for line in reversed(output.splitlines()):
        if line.startswith('{"result"'):
            found = json.loads(line)
            return found["result"], found["reason"]
    return "", ""


def table(outcomes: list[Outcome]) -> str:
    """One row a check."""
    rows = ["| check | result | seconds | reason |", "|---|---|---|---|"]
    for each in outcomes:
        reason = each.reason.replace("|", "/")
        rows.append(f"| {each.check.name} | {each.result} | {each.seconds:.0f} | {reason} |")
    return "\n".join(rows)


def exit_status(outcomes: list[Outcome]) -> int:
    """1: one failed; 3: none could run; else 0."""
    results = {each.result for each in outcomes}
    return 1 if "failed" in results else 0 if "passed" in results else 3


if __name__ == "__main__":
    sys.exit(main())
