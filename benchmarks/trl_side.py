"""The TRL side of rl_step.py: GRPOTrainer on given prompts, seconds per rollout batch as JSON.

Runs in an interpreter of its own (requirements/benchmark.txt), which needs torch, transformers and TRL only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepClock(TrainerCallback):
    """The time after every optimizer step, and when training began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def exact_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the whole completion is the number, a final full stop aside."""
    return [float(text.strip().removesuffix(".") == wanted) for text, wanted in zip(completions, answer)]


def main() -> None:
    """Train for `--steps` rollout batches and write seconds and rewards per batch."""
    options = _parse()
    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        config = GRPOConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=options.autocast,
            model_init_kwargs={"dtype": "float32" if options.autocast else "bfloat16"},
            per_device_train_batch_size=options.samples // options.updates,
            steps_per_generation=options.updates,
            num_generations=options.samples_per_prompt,
            num_iterations=1,
            max_steps=options.steps * options.updates,
            max_completion_length=options.max_response_len,
            temperature=1.0,
            beta=0.0,
            learning_rate=5e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=options.updates,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(options.hf_checkpoint),
            reward_funcs=exact_answer,
            args=config,
            train_dataset=Dataset.from_list(rows),
        )
        trainer.add_callback(clock)
        trainer.train()
    ends = clock.times[:: options.updates]
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    options.output.write_text(json.dumps({"seconds": seconds, "rewards": rewards}), encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-checkpoint", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of prompt and answer")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="rollout batches")
    parser.add_argument("--samples", type=int, required=True, help="of one rollout batch")
    parser.add_argument("--samples-per-prompt", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True, help="of one rollout batch")
    parser.add_argument("--max-response-len", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--autocast", action="store_true", help="fp32 weights under bf16 autocast, not bf16 weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
