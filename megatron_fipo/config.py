"""Every setting this project owns, as frozen dataclasses: the one place of a default; flags and docs come from here.

Settings that Megatron or SGLang own are not repeated here. `setting()` carries the help text and, where it differs
from `--field-name`, the flag. A ValueError raised here names the flag, the value found and the value wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Algorithm = Literal["grpo", "dapo", "fipo"]
Semantics = Literal["paper", "released"]
LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
LOSS_AGGREGATIONS: tuple[str, ...] = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
LEAST_TEMPERATURE = 1e-6  # of SGLang's sampling


def setting(default: T, help: str, *, flag: str | None = None, choices: tuple[str, ...] | None = None) -> T:
    """A dataclass field with its help text, its flag when that is not the field's name, and its allowed values."""
    metadata: dict[str, Any] = {"help": help}
    if flag is not None:
        metadata["flag"] = flag
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)  # type: ignore[return-value]


def require(condition: bool, flag: str, found: object, wanted: str) -> None:
    """Raise the ValueError every bad setting gets: the flag, the value found, the value wanted."""
    if not condition:
        raise ValueError(f"{flag} is {found!r}, but must be {wanted}")


@dataclass(frozen=True)
class PPOSettings:
    """The clipped policy loss. `clip_*` are offsets from ratio 1."""

    clip_low: float = setting(0.2, "PPO clips the ratio at 1 - this")
    clip_high: float = setting(0.28, "PPO clips the ratio at 1 + this")
    dual_clip: float | None = setting(10.0, "dual-clip bound c on the loss of tokens with A < 0, or none")
    loss_agg: LossAggregation = setting("token-mean", "what the loss is averaged over", choices=LOSS_AGGREGATIONS)

    def __post_init__(self) -> None:
        require(0 < self.clip_low < 1, "--clip-low", self.clip_low, "between 0 and 1")
        require(self.clip_high > 0, "--clip-high", self.clip_high, "> 0")
        require(self.dual_clip is None or self.dual_clip > 1, "--dual-clip", self.dual_clip, "> 1, or none")
        require(self.loss_agg in LOSS_AGGREGATIONS, "--loss-agg", self.loss_agg, f"one of {LOSS_AGGREGATIONS}")


@dataclass(frozen=True)
class FIPOSettings(PPOSettings):
    """FIPO (arXiv 2603.19835). `influence_*` are bounds of the influence weight f, not offsets."""

    half_life: float = setting(32.0, "half-life of the Future-KL decay, in tokens", flag="--fipo-half-life")
    influence_low: float = setting(1.0, "lower bound of the influence weight", flag="--fipo-influence-low")
    influence_high: float = setting(1.2, "upper bound of the influence weight", flag="--fipo-influence-high")
    safety_threshold: float = setting(
        10.0, "ratio above which A < 0 takes no influence weight", flag="--fipo-safety-threshold"
    )
    semantics: Semantics = setting(
        "paper",
        "as published, or as the authors' code (safety clamp, sequence drop)",
        flag="--fipo-semantics",
        choices=("paper", "released"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.half_life > 0, "--fipo-half-life", self.half_life, "> 0 tokens")
        require(0 < self.influence_low <= 1, "--fipo-influence-low", self.influence_low, "in (0, 1]")
        require(self.influence_high >= 1, "--fipo-influence-high", self.influence_high, ">= 1")
        require(
            self.influence_low < self.influence_high,
            "--fipo-influence-high",
            self.influence_high,
            f"above --fipo-influence-low ({self.influence_low}): equal bounds switch FIPO off",
        )
        require(self.safety_threshold > 0, "--fipo-safety-threshold", self.safety_threshold, "> 0")
        require(self.semantics in ("paper", "released"), "--fipo-semantics", self.semantics, "paper or released")
        require(self.dual_clip is not None, "--dual-clip", self.dual_clip, "a number > 1: FIPO's filter needs it")


LOSS_SETTINGS: dict[str, PPOSettings] = {
    "grpo": PPOSettings(clip_low=0.2, clip_high=0.2, dual_clip=None, loss_agg="seq-mean-token-mean"),
    "dapo": PPOSettings(),
    "fipo": FIPOSettings(),
}
"""Each algorithm's defaults; explicit flags replace single fields."""


@dataclass(frozen=True)
class BatchSettings:
    """How many prompts, samples and updates make a step: samples per update x updates = prompts x samples each."""

    rollout_batch_size: int = setting(512, "prompts per rollout batch (one step)")
    n_samples_per_prompt: int = setting(16, "responses drawn per prompt (G)")
    num_updates_per_rollout: int = setting(8, "updates per rollout batch; FIPO needs at least 2")
    max_tokens_per_micro_batch: int = setting(32768, "token budget of one packed micro-batch on one rank")
    log_probs_chunk_size: int = setting(
        1024, "tokens whose logits exist at a time; backward makes all but the last chunk again; -1: all at once"
    )

    @property
    def num_samples(self) -> int:
        """Samples per rollout batch."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer update (`--global-batch-size`)."""
        return self.num_samples // self.num_updates_per_rollout

    def __post_init__(self) -> None:
        require(self.rollout_batch_size >= 1, "--rollout-batch-size", self.rollout_batch_size, ">= 1")
        require(self.n_samples_per_prompt >= 2, "--n-samples-per-prompt", self.n_samples_per_prompt, ">= 2 (a group)")
        require(self.num_updates_per_rollout >= 1, "--num-updates-per-rollout", self.num_updates_per_rollout, ">= 1")
        require(
            self.max_tokens_per_micro_batch >= 1,
            "--max-tokens-per-micro-batch",
            self.max_tokens_per_micro_batch,
            ">= 1",
        )
        require(
            self.log_probs_chunk_size >= 1 or self.log_probs_chunk_size == -1,
            "--log-probs-chunk-size",
            self.log_probs_chunk_size,
            ">= 1 token, or -1 for all at once",
        )
        require(
            self.rollout_batch_size % self.num_updates_per_rollout == 0,
            "--num-updates-per-rollout",
            self.num_updates_per_rollout,
            f"a divisor of --rollout-batch-size ({self.rollout_batch_size}), so that groups stay whole",
        )


@dataclass(frozen=True)
class RolloutSettings:
    """Sampling, dynamic sampling and the overlong penalty."""

    rollout_max_prompt_len: int = setting(2048, "longest prompt, tokens; a longer one is an error")
    rollout_max_response_len: int = setting(20480, "longest response, tokens")
    rollout_temperature: float = setting(
        1.0, "sampling temperature of training rollouts, and of the log-probs trained on"
    )
    dynamic_sampling: bool | None = setting(
        None,
        "fill the batch with groups whose accuracies differ (default: not for grpo)",
    )
    over_sampling_batch_size: int | None = setting(None, "prompts per generation batch (default: --rollout-batch-size)")
    max_generation_batches: int = setting(10, "generation batches of a step before it gives up")
    overlong_penalty: bool | None = setting(None, "penalise responses near the length limit (default: not for grpo)")
    overlong_buffer_len: int = setting(4096, "tokens before the limit in which the penalty grows")
    overlong_penalty_factor: float = setting(1.0, "the overlong penalty at the limit")
    record_rollouts: str | None = setting(None, "directory to write every step's rollouts to")
    replay_rollouts: str | None = setting(None, "directory of recorded rollouts to train on instead of generating")
    engine_mismatch_limit: float = setting(1.0, "largest mean |engine - trainer| log-prob before the run stops")

    def __post_init__(self) -> None:
        require(self.rollout_max_prompt_len >= 1, "--rollout-max-prompt-len", self.rollout_max_prompt_len, ">= 1")
        require(self.rollout_max_response_len >= 1, "--rollout-max-response-len", self.rollout_max_response_len, ">= 1")
        require(
            self.rollout_temperature >= LEAST_TEMPERATURE,
            "--rollout-temperature",
            self.rollout_temperature,
            f">= {LEAST_TEMPERATURE}: below it SGLang takes the likeliest token",
        )
        require(
            self.over_sampling_batch_size is None or self.over_sampling_batch_size >= 1,
            "--over-sampling-batch-size",
            self.over_sampling_batch_size,
            ">= 1",
        )
        require(self.max_generation_batches >= 1, "--max-generation-batches", self.max_generation_batches, ">= 1")
        require(self.overlong_buffer_len > 0, "--overlong-buffer-len", self.overlong_buffer_len, "> 0")
        require(self.overlong_penalty_factor >= 0, "--overlong-penalty-factor", self.overlong_penalty_factor, ">= 0")
        require(self.engine_mismatch_limit > 0, "--engine-mismatch-limit", self.engine_mismatch_limit, "> 0")
        require(
            not (self.record_rollouts and self.replay_rollouts),
            "--replay-rollouts",
            self.replay_rollouts,
            f"unset when --record-rollouts ({self.record_rollouts}) is set",
        )


@dataclass(frozen=True)
class DataSettings:
    """Where problems come from: a seeded endless task, or a file of prompts with ground truths."""

    task: str | None = setting(None, "a task: 'small_arithmetic' or any reasoning-gym data set, e.g. chain_sum")
    task_args: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "the task's parameters as JSON"})
    prompt_data: str | None = setting(None, "JSONL or parquet file of training prompts")
    eval_prompt_data: str | None = setting(None, "JSONL or parquet file of evaluation prompts")
    input_key: str = setting("prompt", "column of the prompt: text or a list of chat messages")
    label_key: str = setting("label", "column of the ground truth; dots descend: reward_model.ground_truth")
    apply_chat_template: bool = setting(
        False, "render text prompts as a user turn through the tokenizer's chat template"
    )
    rollout_shuffle: bool = setting(True, "shuffle a prompt file anew every epoch, seeded by --seed")
    rm_type: str | None = setting(None, "the reward, by its name in REWARDS (default: the task's own verifier)")
    custom_rm_path: str | None = setting(None, "the user's own reward, as module:function")
    reward_timeout_s: float = setting(10.0, "seconds one response's grading may take")
    reward_memory_mb: int = setting(1024, "MiB of memory one grader process may use")
    num_eval_problems: int = setting(96, "held-out problems a task is evaluated on")
    n_samples_per_eval_prompt: int = setting(1, "responses per evaluation problem")
    eval_temperature: float = setting(0.0, "sampling temperature of evaluation; 0 is greedy")
    eval_top_p: float = setting(1.0, "nucleus sampling of evaluation")

    def __post_init__(self) -> None:
        require(
            self.task is not None or self.prompt_data is not None,
            "--task",
            self.task,
            "given, or --prompt-data with a file of prompts",
        )
        require(
            self.task is None or self.prompt_data is None,
            "--task",
            self.task,
            f"unset when --prompt-data ({self.prompt_data}) is set",
        )
        require(
            self.eval_prompt_data is None or self.prompt_data is not None,
            "--eval-prompt-data",
            self.eval_prompt_data,
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


@dataclass(frozen=True)
class RunSettings:
    """The run itself: what it starts from, how long it goes, where its results lie."""

    hf_checkpoint: str = setting("", "directory of the Hugging Face model; gives the architecture")
    output_dir: str = setting("runs/fipo", "metrics.jsonl, samples, curves.png, engine logs")
    train_iters: int = setting(100, "steps (rollout batches) to train for")
    seed: int = setting(1234, "seed of data order, sampling and initialisation")
    save: str | None = setting(None, "directory to write checkpoints to")
    load: str | None = setting(None, "directory of checkpoints to resume from")
    save_interval: int | None = setting(None, "steps between checkpoints (default: at the end only)")
    eval_interval: int | None = setting(None, "steps between evaluations (default: before and after only)")
    tensorboard_dir: str | None = setting(None, "TensorBoard logs (default: tensorboard/ in --output-dir)")
    export_hf: str | None = setting(None, "directory to export the final model to, as Hugging Face safetensors")
    distributed_timeout_minutes: int = setting(10, "minutes a collective may wait")

    def __post_init__(self) -> None:
        require(
            bool(self.hf_checkpoint), "--hf-checkpoint", self.hf_checkpoint, "the directory of a Hugging Face model"
        )
        require(self.train_iters >= 1, "--train-iters", self.train_iters, ">= 1 step")
        require(0 <= self.seed < 2**31, "--seed", self.seed, "in [0, 2**31)")
        require(
            self.save_interval is None or self.save_interval >= 1, "--save-interval", self.save_interval, ">= 1 step"
        )
        require(
            self.save_interval is None or self.save is not None,
            "--save-interval",
            self.save_interval,
            "used with --save, the directory to write to",
        )
        require(
            self.eval_interval is None or self.eval_interval >= 1, "--eval-interval", self.eval_interval, ">= 1 step"
        )
        require(
            self.distributed_timeout_minutes >= 1,
            "--distributed-timeout-minutes",
            self.distributed_timeout_minutes,
            ">= 1 minute",
        )


@dataclass(frozen=True)
class EngineSettings:
    """The inference engines. Everything else SGLang can be told goes through `--sglang-*` into `server_args`."""

    num_engines: int | None = setting(
        None, "engines to start (default: one per --rollout-num-gpus-per-engine ranks)", flag="--rollout-num-engines"
    )
    tp_size: int = setting(1, "tensor-parallel ranks of one engine", flag="--rollout-num-gpus-per-engine")
    weight_bucket_mb: int = setting(256, "MiB of weights sent to the engines at once")
    start_timeout_s: float = setting(600.0, "seconds an engine may take to start", flag="--rollout-start-timeout-s")
    request_timeout_s: float = setting(
        1800.0, "seconds one generation batch may take", flag="--rollout-request-timeout-s"
    )
    server_args: Mapping[str, Any] = field(default_factory=dict)  # from --sglang-*

    def __post_init__(self) -> None:
        require(self.num_engines is None or self.num_engines >= 1, "--rollout-num-engines", self.num_engines, ">= 1")
        require(self.tp_size >= 1, "--rollout-num-gpus-per-engine", self.tp_size, ">= 1")
        require(self.weight_bucket_mb >= 1, "--weight-bucket-mb", self.weight_bucket_mb, ">= 1 MiB")
        require(self.start_timeout_s > 0, "--rollout-start-timeout-s", self.start_timeout_s, "> 0 seconds")
        require(self.request_timeout_s > 0, "--rollout-request-timeout-s", self.request_timeout_s, "> 0 seconds")
