"""Every setting of every preset, against the paper's tables 2 and 3 written out by hand; and where --print-config says
that each setting came from."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fipo.arguments import Settings, config_text, parse_arguments
from megatron_fipo.flags.presets import PRESETS

BASE = ["--hf-checkpoint", "model", "--prompt-data", "train.parquet"]

SHARED: dict[str, Any] = {
    # prompts per rollout batch, group size of all but one column
    "batch.rollout_batch_size": 512,
    "batch.n_samples_per_prompt": 16,
    # PPO clip [0.2, 0.28], dual clip c, token mean
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.loss_agg": "token-mean",
    # no KL term, no correction between engine and trainer
    "correction.kl_coef": 0.0,
    "correction.use_tis": False,
    "correction.use_icepop": False,
    # max prompt, cut at its beginning; sampling at T = 1
    "rollout.rollout_max_prompt_len": 2048,
    "data.on_long_prompt": "truncate-left",
    "rollout.rollout_temperature": 1.0,
    # dynamic sampling on accuracy, at most 10 generation batches
    "rollout.dynamic_sampling": True,
    "rollout.max_generation_batches": 10,
    "rollout.overlong_penalty": True,
    "rollout.overlong_penalty_factor": 1.0,
    # validation: T = 1, top-p 0.7, 32 samples a problem, every 5 steps
    "data.n_samples_per_eval_prompt": 32,
    "data.eval_temperature": 1.0,
    "data.eval_top_p": 0.7,
    "data.eval_top_k": -1,
    "run.eval_interval": 5,
    # lr 1e-6, constant after 10 warm-up steps; weight decay, gradient clipping
    "megatron.lr": 1e-6,
    "megatron.lr_decay_style": "constant",
    "megatron.lr_warmup_iters": 10,
    "megatron.weight_decay": 0.1,
    "megatron.clip_grad": 1.0,
}

FIPO_32B: dict[str, Any] = SHARED | {
    "algorithm": "fipo",
    "batch.num_updates_per_rollout": 8,
    "loss.half_life": 32.0,
    "loss.influence_low": 1.0,
    "loss.influence_high": 1.2,
    "loss.safety_threshold": 10.0,
    "loss.semantics": "released",
    "rollout.over_sampling_batch_size": 2048,  # 4 x 512
    "rollout.rollout_max_response_len": 20480,
    "rollout.overlong_buffer_len": 4096,
}
FIPO_7B: dict[str, Any] = SHARED | {
    "algorithm": "fipo",
    "batch.n_samples_per_prompt": 32,
    "batch.num_updates_per_rollout": 8,
    "loss.half_life": 32.0,
    "loss.influence_low": 0.8,
    "loss.influence_high": 1.2,
    "loss.safety_threshold": 3.0,
    "loss.semantics": "released",
    "rollout.over_sampling_batch_size": 2048,
    "rollout.rollout_max_response_len": 10240,
    "rollout.overlong_buffer_len": 2048,
}
DAPO_32B: dict[str, Any] = SHARED | {
    "algorithm": "dapo",
    "batch.num_updates_per_rollout": 16,
    "rollout.over_sampling_batch_size": 1536,  # 3 x 512
    "rollout.rollout_max_response_len": 20480,
    "rollout.overlong_buffer_len": 4096,
}
DAPO_7B: dict[str, Any] = SHARED | {
    "algorithm": "dapo",
    "batch.num_updates_per_rollout": 16,
    "rollout.over_sampling_batch_size": 1536,
    "rollout.rollout_max_response_len": 8192,
    "rollout.overlong_buffer_len": 4096,
}
TABLE: dict[str, dict[str, Any]] = {
    "fipo-qwen2.5-32b": FIPO_32B,
    "dapo-qwen2.5-32b": DAPO_32B,
    "dapo-qwen2.5-32b-mini-batch-64": DAPO_32B | {"batch.num_updates_per_rollout": 8},
    "fipo-qwen2.5-math-7b": FIPO_7B,
    "dapo-qwen2.5-math-7b": DAPO_7B,
    "dapo-qwen2.5-math-7b-mini-batch-64": DAPO_7B | {"batch.num_updates_per_rollout": 8},
}
SAMPLES_PER_UPDATE = {
    "fipo-qwen2.5-32b": 64 * 16,
    "dapo-qwen2.5-32b": 32 * 16,
    "dapo-qwen2.5-32b-mini-batch-64": 64 * 16,
    "fipo-qwen2.5-math-7b": 64 * 32,
    "dapo-qwen2.5-math-7b": 32 * 16,
    "dapo-qwen2.5-math-7b-mini-batch-64": 64 * 16,
}


def parse(*flags: str) -> Settings:
    return parse_arguments([*BASE, *flags])


def value_of(settings: Settings, path: str) -> Any:
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def rows_of(settings: Settings) -> dict[str, list[str]]:
    """What --print-config shows: setting -> the words after it."""
    return {line.split()[0]: line.split()[1:] for line in config_text(settings).splitlines()}


def test_the_presets_are_the_papers_columns_and_the_fair_comparison() -> None:
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_of_a_preset_is_the_papers(name: str) -> None:
    settings = parse("--preset", name)
    assert {path: value_of(settings, path) for path in TABLE[name]} == TABLE[name]
    assert settings.batch.global_batch_size == SAMPLES_PER_UPDATE[name]
    # a setting that joins a preset joins the table above too
    assert set(PRESETS[name]) == set(TABLE[name])


@pytest.mark.parametrize("name", TABLE)
def test_print_config_says_where_each_setting_came_from(name: str) -> None:
    settings = parse("--preset", name, "--lr", "2e-6", "--output-dir", "here")
    rows = rows_of(settings)
    for path in TABLE[name]:
        assert rows[path][-1] == ("flag" if path == "megatron.lr" else "preset"), path
    for path in ("run.hf_checkpoint", "data.prompt_data", "run.output_dir"):
        assert rows[path][-1] == "flag", path
    for path in ("run.seed", "megatron.adam_beta2", "data.reward_timeout_s", "guards.guard_fipo_inert"):
        assert rows[path][-1] == "default", path
    assert {words[-1] for words in rows.values()} == {"flag", "preset", "default"}


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        (["--fipo-half-life", "128"], "loss.half_life", 128.0),
        (["--fipo-influence-low", "0.8"], "loss.influence_low", 0.8),
        (["--fipo-semantics", "paper"], "loss.semantics", "paper"),
        (["--kl-coef", "0.001"], "correction.kl_coef", 0.001),
        (["--use-tis"], "correction.use_tis", True),
        (["--on-long-prompt", "skip"], "data.on_long_prompt", "skip"),
        (["--eval-top-p", "1.0"], "data.eval_top_p", 1.0),
        (["--over-sampling-batch-size", "512"], "rollout.over_sampling_batch_size", 512),
        (["--num-updates-per-rollout", "16"], "batch.num_updates_per_rollout", 16),
        (["--no-overlong-penalty"], "rollout.overlong_penalty", False),
    ],
)
def test_explicit_flags_win(flags: list[str], path: str, value: Any) -> None:
    for words in (["--preset", "fipo-qwen2.5-32b", *flags], [*flags, "--preset", "fipo-qwen2.5-32b"]):
        settings = parse(*words)
        assert value_of(settings, path) == value
        assert rows_of(settings)[path][-1] == "flag"
        others = set(TABLE["fipo-qwen2.5-32b"]) - {path}
        assert {other: value_of(settings, other) for other in others} == {
            other: TABLE["fipo-qwen2.5-32b"][other] for other in others
        }


@pytest.mark.parametrize(("name", "multiple"), [("fipo-qwen2.5-32b", 4), ("dapo-qwen2.5-math-7b", 3)])
def test_a_generation_batch_stays_a_multiple_of_a_rollout_batch_of_another_size(name: str, multiple: int) -> None:
    settings = parse("--preset", name, "--rollout-batch-size", "64")
    assert settings.rollout.over_sampling_batch_size == multiple * 64
    assert rows_of(settings)["rollout.over_sampling_batch_size"] == [str(multiple * 64), "preset"]
    explicit = parse("--preset", name, "--rollout-batch-size", "64", "--over-sampling-batch-size", "100")
    assert explicit.rollout.over_sampling_batch_size == 100
    with pytest.raises(ValueError, match="--rollout-batch-size is 0"):
        parse("--preset", name, "--rollout-batch-size", "0")
