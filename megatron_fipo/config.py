"""Every setting this project owns, as frozen dataclasses: the one place of a default; flags and docs come from here.

Settings that Megatron or SGLang own are not repeated here. `setting()` carries the help text and, where it differs
from `--field-name`, the flag. A ValueError raised here names the flag, the value found and the value wanted.
"""

from __future__ import annotations

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
PartialTokens = Literal["mask", "correct"]
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
class CorrectionSettings:
    """What multiplies or joins the policy loss of every algorithm, outside FIPO's influence weight.

    With rho = exp(trainer's old log-prob - engine's log-prob) of a token, TIS weights its loss with
    clamp(rho, tis_clip_low, tis_clip), IcePop with rho where icepop_low <= rho <= icepop_high and 0 elsewhere.
    """

    use_tis: bool = setting(False, "weight each token's loss with the truncated ratio of trainer and engine")
    tis_clip: float = setting(2.0, "upper bound of the ratio (cap C of truncated importance sampling)")
    tis_clip_low: float = setting(0.0, "lower bound of the ratio")
    use_icepop: bool = setting(False, "likewise with the ratio, and drop tokens whose ratio is out of bounds")
    icepop_low: float = setting(0.5, "lower bound of the ratio of tokens that are trained on")
    icepop_high: float = setting(5.0, "upper bound of the ratio of tokens that are trained on")
    kl_coef: float = setting(0.0, "weight of the KL term (k3 estimator) against the initial weights")
    custom_loss_function_path: str | None = setting(
        None, "the user's own loss in place of --algorithm's, as module:function; called as those of LOSSES are"
    )

    def __post_init__(self) -> None:
        require(self.tis_clip > 0, "--tis-clip", self.tis_clip, "> 0")
        require(
            0 <= self.tis_clip_low <= min(1.0, self.tis_clip),
            "--tis-clip-low",
            self.tis_clip_low,
            "in [0, 1] and at most --tis-clip",
        )
        require(not (self.use_tis and self.use_icepop), "--use-icepop", True, "absent when --use-tis is given")
        require(0 <= self.icepop_low <= 1, "--icepop-low", self.icepop_low, "in [0, 1]")
        require(self.icepop_high >= 1, "--icepop-high", self.icepop_high, ">= 1")
        require(
            self.icepop_low < self.icepop_high,
            "--icepop-high",
            self.icepop_high,
            f"above --icepop-low ({self.icepop_low})",
        )
        require(self.kl_coef >= 0, "--kl-coef", self.kl_coef, ">= 0")


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

    rollout_max_prompt_len: int = setting(2048, "longest prompt, tokens; see --on-long-prompt")
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
    partial_rollout_len: int | None = setting(
        None,
        "tokens a generation batch may add to a response; a longer one is continued later (default: no such limit)",
    )
    partial_rollout_older_tokens: PartialTokens = setting(
        "mask",
        "tokens of a continued response that older weights drew: no loss, or --use-tis / --use-icepop corrects them",
        choices=("mask", "correct"),
    )
    custom_generate_function_path: str | None = setting(
        None, "the user's own generation (tools, several turns), as module:function"
    )
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
        require(
            self.partial_rollout_len is None or 1 <= self.partial_rollout_len < self.rollout_max_response_len,
            "--partial-rollout-len",
            self.partial_rollout_len,
            f">= 1 and below --rollout-max-response-len ({self.rollout_max_response_len})",
        )
        require(
            self.partial_rollout_len is None or self.custom_generate_function_path is None,
            "--partial-rollout-len",
            self.partial_rollout_len,
            "absent with --custom-generate-function-path, which continues no response",
        )
        require(
            self.partial_rollout_older_tokens in ("mask", "correct"),
            "--partial-rollout-older-tokens",
            self.partial_rollout_older_tokens,
            "mask or correct",
        )
        require(self.engine_mismatch_limit > 0, "--engine-mismatch-limit", self.engine_mismatch_limit, "> 0")
        require(
            not (self.record_rollouts and self.replay_rollouts),
            "--replay-rollouts",
            self.replay_rollouts,
            f"unset when --record-rollouts ({self.record_rollouts}) is set",
        )
