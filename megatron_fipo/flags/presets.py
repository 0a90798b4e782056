"""The settings of the FIPO paper (arXiv 2603.19835, tables 2 and 3 and the released scripts), for `--preset`.

A preset fills in settings that no flag gives; its generation batch stays a multiple of --rollout-batch-size. The models
they belong to: Qwen2.5-32B, and Qwen2.5-Math-7B with its context raised from 4096 to 32768 positions in config.json.
The paper's entropy coefficient is 0: there is no such term here. docs/reproduce.md has the commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHARED: Mapping[str, Any] = {
    "batch.rollout_batch_size": 512,
    "batch.n_samples_per_prompt": 16,
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.28,
    "loss.dual_clip": 10.0,
    "loss.loss_agg": "token-mean",
    "correction.kl_coef": 0.0,
    "correction.use_tis": False,
    "correction.use_icepop": False,
    "rollout.rollout_max_prompt_len": 2048,
    "rollout.rollout_temperature": 1.0,
    "rollout.dynamic_sampling": True,
    "rollout.max_generation_batches": 10,
    "rollout.overlong_penalty": True,
    "rollout.overlong_penalty_factor": 1.0,
    "data.on_long_prompt": "truncate-left",
    "data.n_samples_per_eval_prompt": 32,
    "data.eval_temperature": 1.0,
    "data.eval_top_p": 0.7,
    "data.eval_top_k": -1,
    "run.eval_interval": 5,
    "megatron.lr": 1e-6,
    "megatron.lr_decay_style": "constant",
    "megatron.lr_warmup_iters": 10,
    "megatron.weight_decay": 0.1,
    "megatron.clip_grad": 1.0,
}
_FIPO: Mapping[str, Any] = {
    **_SHARED,
    "algorithm": "fipo",
    "batch.num_updates_per_rollout": 8,
    "loss.half_life": 32.0,
    "loss.semantics": "released",
    "rollout.over_sampling_batch_size": 4 * 512,
}
_DAPO: Mapping[str, Any] = {
    **_SHARED,
    "algorithm": "dapo",
    "batch.num_updates_per_rollout": 16,
    "rollout.over_sampling_batch_size": 3 * 512,
}
_DAPO_32B: Mapping[str, Any] = {
    **_DAPO,
    "rollout.rollout_max_response_len": 20480,
    "rollout.overlong_buffer_len": 4096,
}
_DAPO_7B: Mapping[str, Any] = {
    **_DAPO,
    "rollout.rollout_max_response_len": 8192,
    "rollout.overlong_buffer_len": 4096,
}
# not in the paper: DAPO with FIPO's 8 updates of 64 prompts, for a comparison at the same mini-batch
_MINI_BATCH_64: Mapping[str, Any] = {"batch.num_updates_per_rollout": 8}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fipo-qwen2.5-32b": {
        **_FIPO,
        "loss.influence_low": 1.0,
        "loss.influence_high": 1.2,
        "loss.safety_threshold": 10.0,
        "rollout.rollout_max_response_len": 20480,
        "rollout.overlong_buffer_len": 4096,
    },
    "dapo-qwen2.5-32b": _DAPO_32B,
    "dapo-qwen2.5-32b-mini-batch-64": {**_DAPO_32B, **_MINI_BATCH_64},
    "fipo-qwen2.5-math-7b": {
        **_FIPO,
        "batch.n_samples_per_prompt": 32,
        "loss.influence_low": 0.8,
        "loss.influence_high": 1.2,
        "loss.safety_threshold": 3.0,
        "rollout.rollout_max_response_len": 10240,
        "rollout.overlong_buffer_len": 2048,
    },
    "dapo-qwen2.5-math-7b": _DAPO_7B,
    "dapo-qwen2.5-math-7b-mini-batch-64": {**_DAPO_7B, **_MINI_BATCH_64},
}
"""Name -> setting -> value."""
