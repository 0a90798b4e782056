"""Settings: defaults that pass, derived numbers, and every refusal naming flag, value found and value wanted."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fipo.config import (
    LOSS_SETTINGS,
    BatchSettings,
    FIPOSettings,
    PPOSettings,
    RolloutSettings,
)
from megatron_fipo.data_config import DataSettings
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.run_config import EngineSettings, RunSettings

FULL = {"recompute_granularity": "full"}
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (PPOSettings, {"clip_low": 0.0}, "--clip-low is 0.0, but must be between 0 and 1"),
    (PPOSettings, {"clip_low": 1.0}, "--clip-low is 1.0"),
    (PPOSettings, {"clip_high": -0.1}, "--clip-high is -0.1"),
    (PPOSettings, {"dual_clip": 1.0}, "--dual-clip is 1.0, but must be > 1, or none"),
    (PPOSettings, {"loss_agg": "mean"}, "--loss-agg is 'mean', but must be one of ('token-mean'"),
    (FIPOSettings, {"half_life": 0.0}, "--fipo-half-life is 0.0, but must be > 0 tokens"),
    (FIPOSettings, {"influence_low": 1.1}, "--fipo-influence-low is 1.1, but must be in (0, 1]"),
    (FIPOSettings, {"influence_low": 0.0}, "--fipo-influence-low is 0.0"),
    (FIPOSettings, {"influence_high": 0.9}, "--fipo-influence-high is 0.9, but must be >= 1"),
    (FIPOSettings, {"influence_high": 1.0}, "equal bounds switch FIPO off"),
    (FIPOSettings, {"safety_threshold": 0.0}, "--fipo-safety-threshold is 0.0"),
    (FIPOSettings, {"semantics": "ours"}, "--fipo-semantics is 'ours', but must be paper or released"),
    (FIPOSettings, {"dual_clip": None}, "--dual-clip is None"),
    (BatchSettings, {"rollout_batch_size": 0}, "--rollout-batch-size is 0, but must be >= 1"),
    (BatchSettings, {"n_samples_per_prompt": 1}, "--n-samples-per-prompt is 1, but must be >= 2 (a group)"),
    (BatchSettings, {"num_updates_per_rollout": 0}, "--num-updates-per-rollout is 0"),
    (BatchSettings, {"num_updates_per_rollout": 7}, "a divisor of --rollout-batch-size (512)"),
    (BatchSettings, {"max_tokens_per_micro_batch": 0}, "--max-tokens-per-micro-batch is 0"),
    (BatchSettings, {"log_probs_chunk_size": 0}, "--log-probs-chunk-size is 0, but must be >= 1 token, or -1"),
    (RolloutSettings, {"rollout_temperature": 1e-7}, "--rollout-temperature is 1e-07, but must be >= 1e-06"),
    (RolloutSettings, {"max_generation_batches": 0}, "--max-generation-batches is 0"),
    (RolloutSettings, {"over_sampling_batch_size": 0}, "--over-sampling-batch-size is 0"),
    (RolloutSettings, {"overlong_buffer_len": 0}, "--overlong-buffer-len is 0"),
    (RolloutSettings, {"engine_mismatch_limit": 0.0}, "--engine-mismatch-limit is 0.0"),
    (RolloutSettings, {"record_rollouts": "a", "replay_rollouts": "b"}, "--replay-rollouts is 'b', but must be unset"),
    (DataSettings, {"task": "t", "prompt_data": "f"}, "unset when --prompt-data (f) is set"),
    (DataSettings, {"task": "t", "eval_prompt_data": "f"}, "--eval-prompt-data is 'f'"),
    (DataSettings, {"task": "t", "rm_type": "dapo", "custom_rm_path": "m:f"}, "--rm-type is 'dapo'"),
    (DataSettings, {"prompt_data": "f", "task_args": {"n": 1}}, "--task-args is {'n': 1}"),
    (DataSettings, {"task": "t", "eval_top_p": 0.0}, "--eval-top-p is 0.0, but must be in (0, 1]"),
    (RunSettings, {"hf_checkpoint": "m", "train_iters": 0}, "--train-iters is 0, but must be >= 1 step"),
    (RunSettings, {"hf_checkpoint": "m", "seed": 2**31}, "--seed is 2147483648"),
    (RunSettings, {"hf_checkpoint": "m", "save_interval": 5}, "--save-interval is 5, but must be used with --save"),
    (RunSettings, {"hf_checkpoint": "m", "eval_interval": 0}, "--eval-interval is 0"),
    (EngineSettings, {"num_engines": 0}, "--rollout-num-engines is 0"),
    (EngineSettings, {"tp_size": 0}, "--rollout-num-gpus-per-engine is 0"),
    (EngineSettings, {"weight_bucket_mb": 0}, "--weight-bucket-mb is 0, but must be >= 1 MiB"),
    (MegatronSettings, {"sequence_parallel": True}, "--sequence-parallel is True"),
    (MegatronSettings, {"pipeline_model_parallel_size": 0}, "--pipeline-model-parallel-size is 0"),
    (
        MegatronSettings,
        {"num_virtual_stages_per_pipeline_rank": 2},
        "--num-virtual-stages-per-pipeline-rank is 2, but must be used with --pipeline-model-parallel-size > 1",
    ),
    (
        MegatronSettings,
        {
            "num_virtual_stages_per_pipeline_rank": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "pipeline_model_parallel_size": 2,
        },
        "--num-layers-per-virtual-pipeline-stage is 1, but must be absent when "
        "--num-virtual-stages-per-pipeline-rank (2) is given",
    ),
    (MegatronSettings, {"lr": -1.0}, "--lr is -1.0"),
    (MegatronSettings, {"optimizer": {"optimizer": "sgd"}}, "--optimizer is 'sgd', but must be adam"),
    (MegatronSettings, {"adam_beta2": 1.0}, "--adam-beta2 is 1.0"),
    (MegatronSettings, {"transformer": {"hidden_dropout": 0.1}}, "--hidden-dropout is 0.1, but must be 0"),
    (MegatronSettings, {"transformer": {"attention_dropout": 0.1}}, "--attention-dropout is 0.1"),
    (MegatronSettings, {"transformer": FULL}, "--recompute-method is None, but must be given with"),
    (
        MegatronSettings,
        {"transformer": {"recompute_granularity": "selective", "recompute_num_layers": 2}},
        "--recompute-num-layers is 2, but must be unset unless",
    ),
    (MegatronSettings, {"transformer_impl": "transformer_engine", "device": "cpu"}, "Transformer Engine needs CUDA"),
    (MegatronSettings, {"model": {"make_vocab_size_divisible_by": 0}}, "--make-vocab-size-divisible-by is 0"),
]


@pytest.mark.parametrize(("settings", "values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_by_flag(settings: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        settings(**values)
    assert message in str(raised.value)
    assert "but must be" in str(raised.value)


def test_defaults_pass_and_are_the_32b_presets() -> None:
    fipo = FIPOSettings()
    assert (fipo.clip_low, fipo.clip_high, fipo.dual_clip, fipo.loss_agg) == (0.2, 0.28, 10.0, "token-mean")
    assert (fipo.half_life, fipo.influence_low, fipo.influence_high, fipo.safety_threshold) == (32.0, 1.0, 1.2, 10.0)
    assert fipo.semantics == "paper"
    for settings in (BatchSettings(), RolloutSettings(), EngineSettings(), MegatronSettings()):
        assert settings == type(settings)()


def test_each_algorithm_has_its_own_defaults() -> None:
    assert list(LOSS_SETTINGS) == ["grpo", "dapo", "fipo"]
    grpo, dapo = LOSS_SETTINGS["grpo"], LOSS_SETTINGS["dapo"]
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.loss_agg) == (0.2, 0.2, None, "seq-mean-token-mean")
    assert (dapo.clip_low, dapo.clip_high, dapo.dual_clip, dapo.loss_agg) == (0.2, 0.28, 10.0, "token-mean")


def test_samples_per_update_times_updates_are_the_rollout_batch() -> None:
    batch = BatchSettings()
    assert (batch.num_samples, batch.global_batch_size) == (512 * 16, 64 * 16)
    small = BatchSettings(rollout_batch_size=6, n_samples_per_prompt=4, num_updates_per_rollout=3)
    assert (small.num_samples, small.global_batch_size) == (24, 8)


def test_edges_of_the_ranges_are_allowed() -> None:
    FIPOSettings(influence_low=0.8, influence_high=1.0)
    BatchSettings(rollout_batch_size=1, n_samples_per_prompt=2, num_updates_per_rollout=1)
    MegatronSettings(lr=0.0, clip_grad=0.0, weight_decay=0.0, lr_warmup_iters=0)
    MegatronSettings(transformer={**FULL, "recompute_method": "uniform", "recompute_num_layers": 1})
    RunSettings(hf_checkpoint="m", seed=2**31 - 1, save="s", save_interval=1)


def test_explicit_optimizer_flags_win_over_our_defaults() -> None:
    fields = MegatronSettings(lr=3e-6, optimizer={"adam_eps": 1e-6, "decoupled_weight_decay": True}).optimizer_fields
    assert fields == {
        "lr": 3e-6,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-6,
        "decoupled_weight_decay": True,
    }


def test_virtual_stages_follow_from_either_flag() -> None:
    assert MegatronSettings().virtual_stages(8) == 1
    pipeline = {"pipeline_model_parallel_size": 2}
    assert MegatronSettings(**pipeline, num_virtual_stages_per_pipeline_rank=4).virtual_stages(8) == 4
    by_layers = MegatronSettings(**pipeline, num_layers_per_virtual_pipeline_stage=1)
    assert by_layers.virtual_stages(8) == 4
    with pytest.raises(ValueError, match="--num-layers-per-virtual-pipeline-stage is 3, but must be a divisor"):
        MegatronSettings(**pipeline, num_layers_per_virtual_pipeline_stage=3).virtual_stages(8)
