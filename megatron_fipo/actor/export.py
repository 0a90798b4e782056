"""A checkpoint's model, without its optimizer, as a Hugging Face directory: one process, no training around it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fipo.actor.checkpoint import load_model, require_same_architecture
from megatron_fipo.actor.checkpoint_files import read_run_state, saved_dtype
from megatron_fipo.actor.model import build_policy, transformer_config
from megatron_fipo.actor.setup import initialize_model_parallel, shut_down
from megatron_fipo.actor.weights import export_weights, weight_table
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture, padded_vocab_size
from megatron_fipo.weights.hf_files import write_hf_checkpoint
from megatron_fipo.weights.mapping import checked_stream

TIMEOUT_MINUTES = 10
NO_GRADIENTS = {"gradient_accumulation_fusion": False}  # which local layers on CUDA want Apex for
EXPORT_ONLY = {"use_distributed_optimizer": False, "grad_reduce_in_fp32": False}  # the least memory for gradients


def export_checkpoint(
    checkpoint: Path,
    save_dir: str | Path,
    *,
    hf_checkpoint: str,
    arch: Architecture,
    device: torch.device,
    transformer_impl: str,
) -> None:
    """Write the model in `checkpoint`, which has passed `verify_checkpoint`, to `save_dir`, in the precision it has.

    Whatever layout saved it: this process holds the whole model, and is a job of its own meanwhile. `hf_checkpoint` is
    the model that training started from, whose architecture `arch` is. On the CPU the patches must be in force.
    Raises CheckpointError for a checkpoint of another architecture, ValueError for a `save_dir` that holds other files.
    """
    state = read_run_state(checkpoint)
    require_same_architecture(checkpoint, state["model"], asdict(arch))
    params_dtype = saved_dtype(checkpoint)
    layout = ParallelLayout()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = initialize_model_parallel(layout, seed=0, timeout_minutes=TIMEOUT_MINUTES)
        chunks = build_policy(
            arch,
            transformer_config(arch, layout, params_dtype=params_dtype, device=device, overrides=NO_GRADIENTS),
            layout,
            padded_vocab=padded_vocab_size(arch.vocab_size, 1, 1),
            transformer_impl=transformer_impl,
            ddp=EXPORT_ONLY,
            temperature=1.0,
            logprobs_chunk_size=1,
            device=device,
        )
        load_model(chunks, checkpoint)
        stream = export_weights(chunks, arch, layout, groups, weight_table(chunks, arch, layout, groups))
        write_hf_checkpoint(save_dir, hf_checkpoint, checked_stream(arch, stream))
    finally:
        shut_down()
