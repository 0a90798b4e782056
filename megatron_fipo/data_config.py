"""Settings of the data, the reward and the evaluation, as config.py has those of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_fipo.config import require, setting

OnLongPrompt = Literal["error", "skip", "truncate-left"]
OnRewardError = Literal["fail", "drop"]


@dataclass(frozen=True)
class DataSettings:
    """Where problems come from: a seeded endless task, or a file of prompts with ground truths."""

    task: str | None = setting(None, "a task: 'small_arithmetic' or any reasoning-gym data set, e.g. chain_sum")
    task_args: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "the task's parameters as JSON"})
    prompt_data: str | None = setting(
        None, "training prompts: a JSONL or parquet file, or the directory of a Hugging Face dataset saved to disk"
    )
    eval_prompt_data: tuple[str, ...] = setting(
        (), "evaluation prompts, likewise; several as NAME=PATH, and the name stands in the metrics"
    )
    input_key: str = setting("prompt", "column of the prompt: text or a list of chat messages")
    label_key: str = setting("label", "column of the ground truth; dots descend: reward_model.ground_truth")
    apply_chat_template: bool = setting(
        False, "render text prompts as a user turn through the tokenizer's chat template"
    )
    deduplicate: bool = setting(True, "take rows of a file that ask the same once, and say how many there were")
    dedup_key: str = setting(
        "extra_info.index", "column that rows of one problem share; dots descend; '': by question and answer alone"
    )
    prompt_template: str | None = setting(None, "text around each text prompt; {prompt} stands for it")
    system_prompt: str | None = setting(None, "the system's message before each prompt of the chat template")
    on_long_prompt: OnLongPrompt = setting(
        "error",
        "a prompt longer than --rollout-max-prompt-len: stop, leave it out, or cut off its beginning",
        choices=("error", "skip", "truncate-left"),
    )
    rollout_shuffle: bool = setting(True, "shuffle a prompt file anew every epoch, seeded by --seed")
    rm_type: str | None = setting(None, "the reward, by its name in REWARDS (default: the task's own verifier)")
    custom_rm_path: str | None = setting(None, "the user's own reward, as module:function")
    reward_timeout_s: float = setting(10.0, "seconds one response's grading may take")
    reward_memory_mb: int = setting(1024, "MiB of memory one grader process may use")
    on_reward_error: OnRewardError = setting(
        "fail",
        "a grader that gives no verdict: stop the run, or learn nothing from that response",
        choices=("fail", "drop"),
    )
    num_eval_problems: int = setting(96, "held-out problems a task is evaluated on")
    n_samples_per_eval_prompt: int = setting(1, "responses per evaluation problem")
    eval_temperature: float = setting(0.0, "sampling temperature of evaluation; 0 is greedy")
    eval_top_p: float = setting(1.0, "nucleus sampling of evaluation")
    eval_top_k: int = setting(-1, "likeliest tokens that evaluation draws from; -1: all")
    eval_max_response_len: int | None = setting(
        None, "longest response of evaluation, tokens (default: --rollout-max-response-len)"
    )

    def __post_init__(self) -> None:
        require(
            self.task is None or self.prompt_data is None,
            "--task",
            self.task,
            f"unset when --prompt-data ({self.prompt_data}) is set",
        )
        require(
            not self.eval_prompt_data or self.task is None,
            "--eval-prompt-data",
            " ".join(self.eval_prompt_data),
            "used with --prompt-data; a --task makes its own evaluation problems",
        )
        require(
            self.rm_type is None or self.custom_rm_path is None,
            "--rm-type",
            self.rm_type,
            f"unset when --custom-rm-path ({self.custom_rm_path}) is set",
        )
        require(
            not self.task_args or self.task is not None,
            "--task-args",
            dict(self.task_args),
            f"used with --task, not with --prompt-data ({self.prompt_data})",
        )
        require(self.reward_timeout_s > 0, "--reward-timeout-s", self.reward_timeout_s, "> 0 seconds")
        require(self.reward_memory_mb >= 64, "--reward-memory-mb", self.reward_memory_mb, ">= 64 MiB")
        require(self.num_eval_problems >= 1, "--num-eval-problems", self.num_eval_problems, ">= 1")
        require(
            self.n_samples_per_eval_prompt >= 1, "--n-samples-per-eval-prompt", self.n_samples_per_eval_prompt, ">= 1"
        )
        require(self.eval_temperature >= 0, "--eval-temperature", self.eval_temperature, ">= 0")
        require(0 < self.eval_top_p <= 1, "--eval-top-p", self.eval_top_p, "in (0, 1]")
        require(self.eval_top_k == -1 or self.eval_top_k >= 1, "--eval-top-k", self.eval_top_k, ">= 1, or -1 for all")
        require(
            self.eval_max_response_len is None or self.eval_max_response_len >= 1,
            "--eval-max-response-len",
            self.eval_max_response_len,
            ">= 1",
        )
        require(
            self.prompt_template is None or self.prompt_template.count("{prompt}") == 1,
            "--prompt-template",
            self.prompt_template,
            "a text that holds {prompt} once",
        )
        for flag, value, choices in (
            ("--on-long-prompt", self.on_long_prompt, ("error", "skip", "truncate-left")),
            ("--on-reward-error", self.on_reward_error, ("fail", "drop")),
        ):
            require(value in choices, flag, value, f"one of {choices}")


HELP = {field.name: field.metadata["help"] for field in fields(DataSettings) if "help" in field.metadata}
"""What the settings are about, by name: for the programs that take some of them."""
