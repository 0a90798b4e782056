"""Process groups: the one file that touches megatron-core's parallel_state."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_fipo.parallel import ParallelLayout


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank, by axis, and `control`: every rank over gloo, for objects and flags."""

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup  # without the context-parallel ranks
    ep: dist.ProcessGroup  # the ranks that share out the experts
    etp: dist.ProcessGroup  # the ranks that cut each expert
    control: dist.ProcessGroup


# The other ranks wait on rank 0 for as long as a rollout takes; a rank that dies is noticed by its closed sockets.
CONTROL_TIMEOUT = timedelta(days=7)


def initialize_distributed(layout: ParallelLayout, device: torch.device, *, timeout_minutes: int) -> None:
    """Join the job's ranks at MASTER_ADDR and MASTER_PORT: NCCL on GPUs, gloo on the CPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=layout.rank, world_size=layout.world_size, timeout=timedelta(minutes=timeout_minutes)
    )


def initialize_model_parallel(layout: ParallelLayout, *, seed: int, timeout_minutes: int) -> Groups:
    """Make Megatron's groups for `layout` and seed its random-state tracker."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    groups = Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
    )
    found = [group.rank() for group in (groups.tp, groups.pp, groups.cp, groups.dp, groups.ep, groups.etp)]
    wanted = [layout.tp_rank, layout.pp_rank, layout.cp_rank, layout.dp_rank, layout.ep_rank, layout.etp_rank]
    assert found == wanted, (found, layout)
    return groups


def shut_down() -> None:
    """Leave every group. Safe to call when there is none."""
    # gloo's threads need the interpreter once more to drop their last tensors, and abort the process where it is ending
    time.sleep(0.05)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
