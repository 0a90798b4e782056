"""Settings of the run itself, of its guards and of its engines, as config.py has those of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fipo.config import require, setting


@dataclass(frozen=True)
class RunSettings:
    """The run itself: what it starts from, how long it goes, where its results lie."""

    hf_checkpoint: str = setting("", "directory of the Hugging Face model; gives the architecture")
    output_dir: str = setting("runs/fipo", "metrics.jsonl, samples, curves.png, engine logs")
    train_iters: int = setting(100, "steps (rollout batches) to train for")
    seed: int = setting(1234, "seed of data order, sampling and initialisation")
    save: str | None = setting(None, "directory to write checkpoints to")
    load: str | None = setting(None, "directory of checkpoints to resume from")
    pretrained_checkpoint: str | None = setting(None, "Megatron-LM's or a run's checkpoint whose weights to start from")
    auto_resume: bool = setting(False, "resume from --save where it holds a checkpoint, else start anew")
    save_interval: int | None = setting(None, "steps between checkpoints (default: at the end only)")
    async_save: bool = setting(False, "write checkpoints while training goes on")
    keep_last: int | None = setting(
        None, "newest checkpoints to keep; older ones are removed (default: all)", flag="--keep-last-checkpoints"
    )
    keep_best: int = setting(0, "checkpoints with the best evaluations to keep besides", flag="--keep-best-checkpoints")
    exit_grace_s: float = setting(
        120.0, "seconds that saving may take after SIGTERM, SIGUSR1 or SIGINT before the run ends without"
    )
    eval_interval: int | None = setting(None, "steps between evaluations (default: before and after only)")
    tensorboard_dir: str | None = setting(None, "TensorBoard logs (default: tensorboard/ in --output-dir)")
    wandb_project: str | None = setting(None, "Weights & Biases project to log to as well; needs the package wandb")
    wandb_exp_name: str | None = setting(None, "name of the run there (default: the last part of --output-dir)")
    export_hf: str | None = setting(None, "directory to export the final model to, as Hugging Face safetensors")
    distributed_timeout_minutes: int = setting(10, "minutes a collective may wait")
    node_timeout_s: int = setting(120, "seconds that another node may be unreachable before the run ends")

    def __post_init__(self) -> None:
        require(
            self.wandb_exp_name is None or self.wandb_project is not None,
            "--wandb-exp-name",
            self.wandb_exp_name,
            "used with --wandb-project",
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
        for flag, value, unset in (
            ("--async-save", self.async_save, False),
            ("--keep-last-checkpoints", self.keep_last, None),
            ("--keep-best-checkpoints", self.keep_best, 0),
            ("--auto-resume", self.auto_resume, False),
        ):
            require(value == unset or self.save is not None, flag, value, "used with --save, the directory to write to")
        require(not (self.auto_resume and self.load is not None), "--auto-resume", True, "used without --load")
        require(self.keep_last is None or self.keep_last >= 1, "--keep-last-checkpoints", self.keep_last, ">= 1")
        require(self.keep_best >= 0, "--keep-best-checkpoints", self.keep_best, ">= 0")
        require(self.exit_grace_s > 0, "--exit-grace-s", self.exit_grace_s, "> 0 seconds")
        require(
            self.eval_interval is None or self.eval_interval >= 1, "--eval-interval", self.eval_interval, ">= 1 step"
        )
        require(
            self.distributed_timeout_minutes >= 1,
            "--distributed-timeout-minutes",
            self.distributed_timeout_minutes,
            ">= 1 minute",
        )
        require(
            4 <= self.node_timeout_s <= 86400, "--node-timeout-s", self.node_timeout_s, "in [4, 86400] seconds, a day"
        )


GuardAction = Literal["off", "warn", "stop"]
_ACTIONS = ("off", "warn", "stop")


@dataclass(frozen=True)
class GuardSettings:
    """What is watched at every step, and what happens when it looks wrong."""

    guard_fipo_inert: GuardAction = setting(
        "stop", "every influence weight is 1 in all updates after a step's first, twice running", choices=_ACTIONS
    )
    guard_noise_gauge: GuardAction = setting("warn", "the noise gauge is above --noise-gauge-limit", choices=_ACTIONS)
    noise_gauge_limit: float = setting(0.02, "largest spread of the Future-KL in a step's first update")
    guard_entropy_collapse: GuardAction = setting("warn", "the entropy is below --entropy-floor", choices=_ACTIONS)
    entropy_floor: float = setting(0.01, "least mean entropy, nats per token")
    guard_length_collapse: GuardAction = setting(
        "warn", "the mean response is shorter than --length-floor times its mean over the first steps", choices=_ACTIONS
    )
    length_floor: float = setting(0.3, "least mean response length, as a share of that of the first 5 steps")
    guard_constant_reward: GuardAction = setting(
        "warn", "every response of a step's generated batches has the same score", choices=_ACTIONS
    )
    max_skipped_updates: int = setting(
        3, "updates in a row that may be skipped for a NaN or an infinity before the run stops"
    )

    def __post_init__(self) -> None:
        for name in ("fipo_inert", "noise_gauge", "entropy_collapse", "length_collapse", "constant_reward"):
            value = getattr(self, f"guard_{name}")
            require(value in _ACTIONS, f"--guard-{name.replace('_', '-')}", value, f"one of {_ACTIONS}")
        require(self.noise_gauge_limit > 0, "--noise-gauge-limit", self.noise_gauge_limit, "> 0")
        require(self.entropy_floor >= 0, "--entropy-floor", self.entropy_floor, ">= 0 nats")
        require(0 <= self.length_floor < 1, "--length-floor", self.length_floor, "in [0, 1)")
        require(self.max_skipped_updates >= 0, "--max-skipped-updates", self.max_skipped_updates, ">= 0")


EnginePlacement = Literal["colocated", "disaggregated"]
_PLACEMENTS = ("colocated", "disaggregated")


@dataclass(frozen=True)
class EngineSettings:
    """The inference engines. Everything else SGLang can be told goes through `--sglang-*` into `server_args`."""

    num_engines: int | None = setting(
        None, "engines to start (default: one per --rollout-num-gpus-per-engine ranks)", flag="--rollout-num-engines"
    )
    tp_size: int = setting(1, "tensor-parallel ranks of one engine", flag="--rollout-num-gpus-per-engine")
    placement: EnginePlacement = setting(
        "colocated",
        "engines take turns with the trainer on its GPUs, or have the GPUs of each node after those of its ranks",
        flag="--rollout-placement",
        choices=_PLACEMENTS,
    )
    interface: str | None = setting(
        None,
        "network interface that engines listen on (default: loopback; on several nodes the one that reaches rank 0)",
        flag="--rollout-interface",
    )
    weight_bucket_mb: int = setting(256, "MiB of weights sent to the engines at once")
    check_weights_interval: int = setting(
        0,
        "weight updates between comparisons of all that an engine holds with what it was sent (0: only the first, and "
        "after an engine was started again; -1: never, for engines that rearrange parameters after loading)",
    )
    fp8_weights: bool = setting(False, "engines hold block-quantised FP8 weights", flag="--rollout-fp8")
    offload_trainer: bool = setting(
        True, "on GPUs, move parameters, gradients and optimizer to main memory while colocated engines generate"
    )
    start_timeout_s: float = setting(600.0, "seconds an engine may take to start", flag="--rollout-start-timeout-s")
    request_timeout_s: float = setting(
        1800.0, "seconds one generation batch may take", flag="--rollout-request-timeout-s"
    )
    health_check_interval_s: float = setting(
        30.0,
        "seconds between looks at whether a busy engine still answers; two in vain and it is ended",
        flag="--rollout-health-check-interval-s",
    )
    max_retries: int = setting(
        3, "times a request is asked again after the engine that had it failed", flag="--rollout-max-retries"
    )
    max_restarts: int = setting(
        5, "times in a row that an engine is started again before it is given up", flag="--rollout-max-restarts"
    )
    server_args: Mapping[str, Any] = field(default_factory=dict)  # from --sglang-*

    def __post_init__(self) -> None:
        require(self.num_engines is None or self.num_engines >= 1, "--rollout-num-engines", self.num_engines, ">= 1")
        require(self.tp_size >= 1, "--rollout-num-gpus-per-engine", self.tp_size, ">= 1")
        require(
            self.placement in _PLACEMENTS, "--rollout-placement", self.placement, f"one of {', '.join(_PLACEMENTS)}"
        )
        require(self.weight_bucket_mb >= 1, "--weight-bucket-mb", self.weight_bucket_mb, ">= 1 MiB")
        require(
            self.check_weights_interval >= -1,
            "--check-weights-interval",
            self.check_weights_interval,
            ">= 0 updates, or -1 for never",
        )
        for name in ("start_timeout_s", "request_timeout_s", "health_check_interval_s"):
            value = getattr(self, name)
            require(value > 0, f"--rollout-{name.replace('_', '-')}", value, "> 0 seconds")
        require(self.max_retries >= 0, "--rollout-max-retries", self.max_retries, ">= 0")
        require(self.max_restarts >= 0, "--rollout-max-restarts", self.max_restarts, ">= 0")
