"""Megatron's distributed optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import get_standard_config_overrides as standard_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fipo.actor.megatron_flags import checked_config


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], *, params_dtype: torch.dtype, overrides: Mapping[str, Any]
) -> MegatronOptimizer:
    """Adam over this rank's shard, fp32 master weights. Norms and biases are not decayed."""
    config = checked_config(
        OptimizerConfig,
        {
            "optimizer": "adam",
            "use_distributed_optimizer": chunks[0].ddp_config.use_distributed_optimizer,
            "bf16": params_dtype == torch.bfloat16,
            "params_dtype": params_dtype,
            **overrides,
        },
    )
    optimizer = get_megatron_optimizer(
        config, list(chunks), config_overrides=standard_overrides(config), use_gloo_process_groups=False
    )
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    if next(chunks[0].parameters()).device.type == "cpu":
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's AdamW in one pass over memory instead of ten
    return optimizer


def build_scheduler(optimizer: MegatronOptimizer, *, lr_warmup_iters: int) -> OptimizerParamScheduler:
    """Linear warm-up over `lr_warmup_iters` updates, then constant: the paper's schedule. As in Megatron-LM the warm-up
    starts at 0, so the first update of a run with warm-up changes nothing."""
    config = optimizer.config
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr,
        lr_warmup_steps=lr_warmup_iters,
        lr_decay_steps=max(1, lr_warmup_iters + 1),
        lr_decay_style="constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
