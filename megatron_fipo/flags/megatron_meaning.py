"""What Megatron-LM makes of flags together, and what a script for pretraining says that is odd in an RL run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fipo.config import BatchSettings
from megatron_fipo.megatron_config import MegatronSettings
from megatron_fipo.run_config import RunSettings

_FOR_SPEED = (
    ("transformer.cp_comm_type", "--cp-comm-type"),
    ("transformer.moe_grouped_gemm", "--moe-grouped-gemm"),
    ("transformer.moe_permute_fusion", "--moe-permute-fusion"),
    ("transformer.moe_router_fusion", "--moe-router-fusion"),
    ("transformer.tp_comm_overlap", "--tp-comm-overlap"),
    ("transformer.use_te_activation_func", "--use-te-activation-func"),
)
"""What only Transformer Engine has and what changes nothing but the speed: field, flag."""

_OF_DELAYED_SCALING = (
    ("fp8_margin", "--fp8-margin"),
    ("fp8_amax_history_len", "--fp8-amax-history-len"),
    ("fp8_amax_compute_algo", "--fp8-amax-compute-algo"),
)
"""What other FP8 recipes do not read."""

HIGHEST_USUAL_LR = 2e-5


def settled(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The given settings as Megatron-LM means them together, and a note for each that thereby has no effect.

    Sequence parallelism needs tensor parallelism; an interval of saving needs a place; `--load` of the directory of
    `--save` resumes where there is something to resume from; layers that are asked to be local do without Transformer
    Engine's faster kernels; only delayed scaling has a history.
    """
    values, notes = dict(given), []
    if values.get("megatron.sequence_parallel") and values.get("megatron.tensor_model_parallel_size", 1) == 1:
        del values["megatron.sequence_parallel"]
        notes.append("--sequence-parallel has no effect: --tensor-model-parallel-size is 1")
    load, save = values.get("run.load"), values.get("run.save")
    must_exist = values.pop("check.exit_on_missing_checkpoint", False)
    if load is not None and save is not None and load.rstrip("/") == save.rstrip("/") and not must_exist:
        del values["run.load"]
        values["run.auto_resume"] = True
        notes.append(f"--load {load} is where --save writes: as --auto-resume, it may be empty")
    for setting, flag in (("run.save_interval", "--save-interval"), ("run.async_save", "--async-save")):
        if save is None and values.pop(setting, None) is not None:
            notes.append(f"{flag} has no effect: without --save nothing is saved")
    if not values.get("run.wandb_project"):  # "" is Megatron-LM's default, and off
        values.pop("run.wandb_project", None)
        if values.pop("run.wandb_exp_name", None):
            notes.append("--wandb-exp-name has no effect without --wandb-project")
    implementation = values.get("megatron.transformer_impl")
    device = values.get("megatron.device")
    if implementation == "local" or (implementation is None and device == "cpu"):
        for name, flag in _FOR_SPEED:
            if values.pop(f"megatron.{name}", None):
                notes.append(f"{flag} has no effect: it is about the speed of Transformer Engine's layers")
    recipe = values.get("megatron.transformer.fp8_recipe", "delayed")
    for name, flag in _OF_DELAYED_SCALING if recipe != "delayed" else ():
        if values.pop(f"megatron.transformer.{name}", None) is not None:
            notes.append(f"{flag} has no effect: --fp8-recipe {recipe} keeps no history")
    return values, notes


def pretraining_notes(run: RunSettings, batch: BatchSettings, megatron: MegatronSettings) -> list[str]:
    """What is allowed, and in an RL run most likely left over from pretraining."""
    notes = []
    num_updates = run.train_iters * batch.num_updates_per_rollout
    if megatron.lr > HIGHEST_USUAL_LR:
        notes.append(f"--lr {megatron.lr:g} is a rate for pretraining: a policy is usually trained at 1e-6")
    if megatron.lr == 0:
        notes.append("--lr 0 trains nothing")
    if megatron.lr_warmup_iters >= num_updates:
        notes.append(
            f"--lr-warmup-iters {megatron.lr_warmup_iters}: the run makes {num_updates} updates (--train-iters x "
            "--num-updates-per-rollout) and never reaches --lr"
        )
    for flag, interval in (("--save-interval", run.save_interval), ("--eval-interval", run.eval_interval)):
        if interval is not None and interval > run.train_iters:
            notes.append(f"{flag} {interval} counts steps, of which the run makes {run.train_iters} (--train-iters)")
    return notes
