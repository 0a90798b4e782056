"""What the actor's tests run on every rank: build it in a layout, update, and bring everything back to rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tiny_models import make_sequences, with_rollout_logprobs

from megatron_fipo.actor import pipeline
from megatron_fipo.actor.actor import Actor, build_actor
from megatron_fipo.actor.setup import Groups, initialize_model_parallel
from megatron_fipo.actor.weights import export_weights
from megatron_fipo.config import LOSS_SETTINGS, CorrectionSettings, FIPOSettings, PPOSettings
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.patches.megatron_cpu import apply_patches
from megatron_fipo.trainer.exchange import scatter_shares
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.hf_files import HFWeights

OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0, "adam_beta2": 0.999, "adam_eps": 1e-4}


def make_groups(*, sp: bool = False, **sizes: int) -> tuple[ParallelLayout, Groups]:
    """The layout over all ranks of the running gloo job, and its groups."""
    apply_patches()
    layout = ParallelLayout.for_world(dist.get_world_size(), dist.get_rank(), sequence_parallel=sp, **sizes)
    return layout, initialize_model_parallel(layout, seed=1, timeout_minutes=5)


def make_actor(
    model_dir: str,
    layout: ParallelLayout,
    groups: Groups,
    *,
    budget: int = 64,
    bf16: bool = False,
    distributed_optimizer: bool = True,
    overlap: bool = False,
    transformer: dict[str, Any] | None = None,
    keep_reference: bool = False,
) -> Actor:
    """An actor with the checkpoint's weights; with `overlap`, gradients and parameters go round beside the passes."""
    overlapped = {"overlap_param_gather": True} if overlap else {}
    return build_actor(
        read_architecture(model_dir),
        HFWeights(model_dir),
        layout,
        groups,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        device=torch.device("cpu"),
        transformer_impl="local",
        transformer=transformer or {},
        ddp={"use_distributed_optimizer": distributed_optimizer, "overlap_grad_reduce": overlap, **overlapped},
        optimizer={**OPTIMIZER, **overlapped},
        lr_warmup_iters=0,
        max_tokens_per_micro_batch=budget,
        max_response_len=32,
        keep_reference=keep_reference,
    )


def settings_for(algorithm: str, semantics: str) -> PPOSettings:
    """FIPO with bounds wide enough to see f at work."""
    if algorithm == "fipo":
        return FIPOSettings(influence_low=0.8, influence_high=1.2, safety_threshold=3.0, semantics=semantics)
    return LOSS_SETTINGS[algorithm]


def run_layouts(
    model_dir: str,
    old_logprobs: list[torch.Tensor],
    num_sequences: int,
    layouts: dict[str, dict[str, Any]],
    cases: dict[str, list[dict[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """`run_cases`, each layout's, in one layout of these ranks after the other: starting processes takes longer."""
    found = {}
    for name, layout in layouts.items():
        print("layout", name, flush=True)
        found[name] = run_cases(model_dir, old_logprobs, num_sequences, layout, cases[name])
        parallel_state.destroy_model_parallel()
    return found


def run_cases(
    model_dir: str,
    old_logprobs: list[torch.Tensor],
    num_sequences: int,
    layout: dict[str, Any],
    cases: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """`run_updates` for several cases in one layout."""
    made = make_groups(**layout)
    return [run_updates(model_dir, old_logprobs, num_sequences, *made, **case) for case in cases]


def run_updates(
    model_dir: str,
    old_logprobs: list[torch.Tensor],
    num_sequences: int,
    layout: ParallelLayout,
    groups: Groups,
    *,
    algorithm: str = "fipo",
    semantics: str = "paper",
    reverse: bool = False,
    corrections: dict[str, Any] | None = None,
    **actor_options: Any,
) -> dict[str, Any]:
    """The gradients of the first mini-batch, then two optimizer steps; on rank 0 gradients, metrics, parameters.

    `corrections` are the fields of CorrectionSettings.
    """
    correction = CorrectionSettings(**corrections or {})
    actor = make_actor(model_dir, layout, groups, keep_reference=correction.kl_coef > 0, **actor_options)
    sequences = with_rollout_logprobs(make_sequences(num_sequences), old_logprobs)
    position = {sequence.uid: i for i, sequence in enumerate(sequences)}
    if reverse:
        half = num_sequences // 2
        sequences = sequences[:half][::-1] + sequences[half:][::-1]
    mine = scatter_shares(sequences if layout.rank == 0 else None, 2, layout, groups.control, actor.arch.hidden_size)
    settings = settings_for(algorithm, semantics)

    def old_of(mini_batch: list[Any]) -> list[torch.Tensor]:
        return [old_logprobs[position[sequence.uid]] for sequence in mini_batch]

    def reference_of(mini_batch: list[Any]) -> list[torch.Tensor]:
        return actor.reference_logprobs([mini_batch]) if correction.kl_coef else []

    result: dict[str, Any] = {}
    if not actor.chunks[0].ddp_config.use_distributed_optimizer:  # whose ranks hold whole gradients
        for chunk in actor.chunks:
            chunk.zero_grad_buffer()
        reference = reference_of(mine[0]) or None
        batches = actor._packed(mine[0], old_of(mine[0]) if layout.is_last_stage else None, reference)
        objective = pipeline.Objective(algorithm, settings, correction, actor.max_response_len)
        pipeline.accumulate_gradients(actor.chunks, batches, objective, cp_group=groups.cp)
        gradients = export_weights(actor.chunks, actor.arch, layout, groups, actor.table, read=lambda p: p.main_grad)
        result["gradients"] = {name: gradient.clone() for name, gradient in gradients}
    metrics = [
        actor.update(
            m,
            old_of(m),
            algorithm=algorithm,
            settings=settings,
            correction=correction,
            reference_logprobs=reference_of(m),
        )
        for m in mine
    ]
    result["parameters"] = {name: value.clone() for name, value in actor.export_weights()}
    if layout.rank == 0:
        result["metrics"] = metrics
    return result
