"""The quickstart's run: FIPO on SmolLM2-135M-Instruct and small arithmetic, two pipeline stages, one engine.

Started by quickstart.sh once .venv and the model are there. Progress goes to stderr; stdout ends with one line
`quickstart: accuracy A -> B on N held-out problems in S s`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_SAMPLES_SHOWN = 3
INTERRUPT_GRACE_S = 2.0  # Ctrl-C in a terminal reaches the run as well: it is told again only after this long
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # nothing here is compiled
    # glibc hands freed memory back to the kernel, and every tensor would fault its pages in anew (docs/performance.md)
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def main() -> int:
    """Run torchrun, show what changed, print the closing line. Returns torchrun's status when it failed."""
    started = time.monotonic()
    options, extra = _parse()
    run_dir = options.run_dir or ROOT / "runs" / f"quickstart-{options.algorithm}-{options.seed}"
    export_dir = run_dir / "model"
    _make_way(run_dir)
    command = [*launcher(), *training_flags(options, run_dir, export_dir), *extra]
    status = _run(command)
    if status != 0:
        print(
            f"quickstart failed: the run ended with status {status}; engine log: {run_dir}/engine-0.log",
            file=sys.stderr,
        )
        return status
    evaluations = _records(run_dir / "evaluations.jsonl")
    _show_samples(_records(run_dir / "samples.jsonl"), last_step=evaluations[-1]["step"])
    print(f"TensorBoard: {run_dir}/tensorboard   curves: {run_dir}/curves.png   metrics: {run_dir}/metrics.jsonl")
    print(f"model, loadable by transformers: {export_dir}")
    before, after = evaluations[0]["accuracy"], evaluations[-1]["accuracy"]
    seconds = time.monotonic() - started
    print(
        f"quickstart: accuracy {before:.2f} -> {after:.2f} on {options.num_eval_problems} held-out problems "
        f"in {seconds:.0f} s",
        flush=True,
    )
    return 0


def training_flags(options: argparse.Namespace, run_dir: Path, export_dir: Path) -> list[str]:
    """The flags of `megatron_fipo.train`, as they would stand in a launch script."""
    model_and_layout = ["--hf-checkpoint", str(options.hf_checkpoint), "--pipeline-model-parallel-size", "2", "--bf16"]
    task = ["--task", "small_arithmetic", "--num-eval-problems", str(options.num_eval_problems)]
    batch = [
        *("--rollout-batch-size", "8"),
        *("--n-samples-per-prompt", "8"),
        *("--num-updates-per-rollout", "4"),
        *("--rollout-max-prompt-len", "64"),
        *("--rollout-max-response-len", "8"),
        *("--max-tokens-per-micro-batch", "256"),
    ]
    optimizer = ["--lr", "1e-5", "--lr-warmup-iters", "0", "--weight-decay", "0.0"]
    algorithm = ["--algorithm", options.algorithm]
    if options.algorithm != "grpo":
        algorithm += ["--no-overlong-penalty"]
    engine = ["--rollout-num-engines", "1"]
    output = [
        *("--train-iters", str(options.steps)),
        *("--eval-interval", "5"),
        *("--seed", str(options.seed)),
        *("--output-dir", str(run_dir)),
        *("--export-hf", str(export_dir)),
    ]
    return [*model_and_layout, *task, *batch, *optimizer, *algorithm, *engine, *output]


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Teach a real 135M-parameter model small arithmetic.")
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="the model's directory")
    parser.add_argument("--algorithm", choices=("fipo", "dapo", "grpo"), default="fipo")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--steps", type=int, default=12, help="rollout batches to train on")
    parser.add_argument("--num-eval-problems", type=int, default=96)
    parser.add_argument("--run-dir", type=Path, help="default: runs/quickstart-ALGORITHM-SEED")
    options, extra = parser.parse_known_args()
    for flag in extra:
        if flag.partition("=")[0] in ("--output-dir", "--export-hf"):
            parser.error(f"{flag}: the quickstart reads its own output; say where with --run-dir")
    return options, extra


def launcher() -> list[str]:
    return [
        *(sys.executable, "-m", "megatron_fipo.launch"),
        *("--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "megatron_fipo.train"),
    ]


def _run(command: list[str]) -> int:
    """Run to the end and return the status. A signal to this process ends the run, which ends its engines itself."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**ENVIRONMENT, **os.environ})
    status = None
    while status is None and not received:
        status = _status_within(process, 0.2)
    if status is None and signal.SIGINT in received:
        status = _status_within(process, INTERRUPT_GRACE_S)
    if status is None:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    return 130 if signal.SIGINT in received else status


def _status_within(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _make_way(run_dir: Path) -> None:
    """Keep an earlier run of the same name: move it aside under a number."""
    if not run_dir.exists():
        return
    number = 1
    while (moved := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(moved)
    print(f"an earlier run is now in {moved}", file=sys.stderr)


def _records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _show_samples(samples: list[dict[str, object]], *, last_step: object) -> None:
    for title, step in (("before training", 0), ("after training", last_step)):
        print(f"{title}:")
        shown = [s for s in samples if s.get("kind") == "evaluation" and s["step"] == step][:NUM_SAMPLES_SHOWN]
        for sample in shown:
            prompt = " ".join(str(sample["prompt"]).split())
            verdict = "right" if sample["accuracy"] == 1 else f"wrong, {sample['ground_truth']}"
            print(f"  ...{prompt[-40:]!r} -> {sample['response']!r} ({verdict})")


if __name__ == "__main__":
    sys.exit(main())
