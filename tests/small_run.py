"""The command of a small run with a live engine: a tiny model, forty problems, a reward by length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START_WITHIN_S = 240.0
PROBLEMS = [{"prompt": f"{i} + {i} = ", "label": str(2 * i)} for i in range(40)]
# by the process that runs it: the graders' memory is their own, so a file says what to do
REWARD = """
import pathlib
from megatron_fipo.types import RewardResult

def grade(response, ground_truth, **extra):
    if pathlib.Path(__file__).with_name("raise").exists():
        raise RuntimeError("no verdict, on purpose")
    score = float(len(response) % 2)
    return RewardResult(score, score, response)

def constant(response, ground_truth, **extra):
    return RewardResult(0.0, 0.0, response)
"""


def command_line(model: Path, directory: Path, *, reward: str = "grade", ranks: int = 2, **more: Any) -> list[str]:
    (directory / "own_reward.py").write_text(REWARD)
    (directory / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    flags = {
        "hf-checkpoint": model,
        "prompt-data": directory / "problems.jsonl",
        "custom-rm-path": f"own_reward:{reward}",
        "rollout-batch-size": 4,
        "n-samples-per-prompt": 4,
        "num-updates-per-rollout": 2,
        "rollout-max-prompt-len": 32,
        "rollout-max-response-len": 32,
        "max-tokens-per-micro-batch": 128,
        "overlong-buffer-len": 4,
        "train-iters": 10000,
        "output-dir": directory / "out",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [
        *("-m", "megatron_fipo.launch", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "megatron_fipo.train", *words),
    ]


def num_steps(directory: Path) -> int:
    path = directory / "out" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
