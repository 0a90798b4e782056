"""Our quickstart's steady-state loop beside TRL's GRPOTrainer: same model, prompts, sample count and updates.

Rollout, log-probs, 4 updates and weight sync of 64 samples of at most 8 tokens, without dynamic sampling and without
evaluation. The two run one after the other, in turns, under the same environment variables; medians over the steps
after warm-up. TRL wants packages of its own:

    python3 -m venv DIR && DIR/bin/pip install -r requirements/benchmark.txt
    python benchmarks/rl_step.py --hf-checkpoint MODEL --trl-python DIR/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_PROMPTS, SAMPLES_PER_PROMPT, NUM_UPDATES, MAX_RESPONSE_LEN, SEED = 8, 8, 4, 8, 1234
NUM_SAMPLES = NUM_PROMPTS * SAMPLES_PER_PROMPT
GOAL = 2.0
STAGES = ("rollout", "logprobs", "update", "sync")


def main() -> None:
    """Run the contestants in turns and print one table."""
    options = _parse()
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        write_prompts(prompts, options.hf_checkpoint, options.steps * NUM_PROMPTS)
        for turn in range(options.rounds):
            run_dir = Path(scratch) / f"ours-{turn}"
            ours += run_ours(options, run_dir)[options.warmup :]
            print(f"round {turn + 1}: ours {_rate([step['step'] for step in ours]):.2f} samples/s", flush=True)
            theirs += run_trl(options, prompts, Path(scratch) / f"trl-{turn}.json")[options.warmup :]
            print(f"round {turn + 1}: TRL  {_rate(theirs):.2f} samples/s", flush=True)
    print_table(ours, theirs)


def write_prompts(path: Path, model_dir: Path, num_prompts: int) -> None:
    """The quickstart's first training prompts as rendered text, with their answers."""
    from transformers import AutoTokenizer

    from megatron_fipo.data.arithmetic import small_arithmetic
    from megatron_fipo.data.prompts import tokenize_problem

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    source, _ = small_arithmetic(SEED, 96)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_prompts):
            problem = source.next_problem()
            prompt = tokenize_problem(problem, tokenizer, apply_chat_template=True, max_prompt_len=64)
            row = {"prompt": tokenizer.decode(prompt.token_ids), "answer": problem.ground_truth}
            file.write(json.dumps(row) + "\n")


def run_ours(options: argparse.Namespace, run_dir: Path) -> list[dict[str, float]]:
    """Seconds per step, whole ("step") and by stage, of a run in the quickstart's configuration."""
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart

    configuration = argparse.Namespace(
        hf_checkpoint=options.hf_checkpoint,
        algorithm="fipo",
        seed=SEED,
        steps=options.steps,
        num_eval_problems=96,  # held out of training; evaluated before and after the steps, outside their time
    )
    flags = quickstart.training_flags(configuration, run_dir, run_dir / "model")
    flags += ["--no-dynamic-sampling", "--eval-interval", str(options.steps), *options.extra]
    _run([*quickstart.launcher(), *flags], threads=1)  # two ranks, one thread each
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: record[f"time/{name}"] for name in ("step", *STAGES) if f"time/{name}" in record}
        for record in map(json.loads, lines)
    ]


def run_trl(options: argparse.Namespace, prompts: Path, output: Path) -> list[float]:
    """Seconds per rollout batch of GRPOTrainer."""
    command = [
        *(options.trl_python, str(ROOT / "benchmarks" / "trl_side.py")),
        *("--hf-checkpoint", str(options.hf_checkpoint)),
        *("--prompts", str(prompts)),
        *("--output", str(output)),
        *("--steps", str(options.steps)),
        *("--samples", str(NUM_SAMPLES)),
        *("--samples-per-prompt", str(SAMPLES_PER_PROMPT)),
        *("--updates", str(NUM_UPDATES)),
        *("--max-response-len", str(MAX_RESPONSE_LEN)),
        *("--threads", str(options.threads)),
        *(["--autocast"] if options.trl_autocast else []),
    ]
    _run(command, threads=options.threads, as_it_comes=options.trl_as_it_comes)
    return json.loads(output.read_text(encoding="utf-8"))["seconds"]


def print_table(ours: list[dict[str, float]], theirs: list[float]) -> None:
    """Samples/s of both from the median step, our stages, the ratio."""
    steps = [step["step"] for step in ours]
    print(f"\n{'':<14}{'samples/s':>10}{'s/step':>9}{'steps':>7}")
    for name, seconds in (("megatron_fipo", steps), ("TRL", theirs)):
        print(f"{name:<14}{_rate(seconds):>10.2f}{statistics.median(seconds):>9.2f}{len(seconds):>7}")
    stages = {name: statistics.median(step.get(name, 0.0) for step in ours) for name in STAGES}
    print("of ours: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()))
    print(f"ratio {_rate(steps) / _rate(theirs):.2f} (goal >= {GOAL})")


def _rate(seconds: list[float]) -> float:
    return NUM_SAMPLES / statistics.median(seconds)


def _run(command: list[str], *, threads: int, as_it_comes: bool = False) -> None:
    from quickstart import ENVIRONMENT

    ours = {} if as_it_comes else ENVIRONMENT
    environment = {**ours, **os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} ... ended with status {done.returncode}:\n{done.stderr[-3000:]}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="directory of the model")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter with TRL (default: this one)")
    parser.add_argument("--threads", type=int, default=2, help="of TRL; ours is two ranks of one thread")
    parser.add_argument("--steps", type=int, default=8, help="rollout batches of one run")
    parser.add_argument("--warmup", type=int, default=2, help="first batches of a run that are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument(
        "--trl-as-it-comes", action="store_true", help="TRL: without the environment variables the quickstart sets"
    )
    parser.add_argument("--trl-autocast", action="store_true", help="TRL: fp32 weights under bf16 autocast")
    options, options.extra = parser.parse_known_args()
    if options.steps <= options.warmup:
        parser.error(f"--steps is {options.steps}, but must be more than --warmup ({options.warmup})")
    return options


if __name__ == "__main__":
    main()
