"""What can be known to be wrong before anything is started: the checkpoint, the layout, and what is not built yet."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from megatron_fipo.arguments import Settings
from megatron_fipo.config import require
from megatron_fipo.flags.megatron_table import contradictions
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import (
    Architecture,
    check_layout,
    read_architecture,
    to_gpt_model_fields,
    to_transformer_fields,
)
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes


def ranks_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) as torchrun, or srun, sets them. Raises ValueError when neither did."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and world in environment:
            return int(environment[rank]), int(environment[world])
    raise ValueError(
        "RANK and WORLD_SIZE are not set: start with torchrun --nproc-per-node N -m megatron_fipo.train ..."
    )


def choose_device(settings: Settings) -> torch.device:
    """The device of this rank. Raises ValueError when the one asked for is not there."""
    has_cuda = torch.cuda.is_available()
    wanted = settings.megatron.device
    require(wanted != "cuda" or has_cuda, "--device", wanted, "cpu or auto: no CUDA device is visible")
    if has_cuda and wanted != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def choose_transformer_impl(settings: Settings, device: torch.device) -> str:
    """The layers' implementation: Transformer Engine on CUDA, local on the CPU, unless a flag says otherwise."""
    chosen = settings.megatron.transformer_impl
    if chosen is None:
        return "transformer_engine" if device.type == "cuda" else "local"
    require(
        chosen == "local" or device.type == "cuda",
        "--transformer-impl",
        chosen,
        "local where there is no CUDA device",
    )
    return chosen


def check_checkpoint(settings: Settings, layout: ParallelLayout) -> tuple[Architecture, HFWeights]:
    """Read the Hugging Face checkpoint's header and compare it with the flags and the layout.

    Raises ValueError naming file or flag: a missing or damaged checkpoint, flags that contradict it, a layout that
    does not divide it, prompts and responses longer than its context.
    """
    directory = settings.run.hf_checkpoint
    arch = read_architecture(directory)
    derived = {
        **to_transformer_fields(arch),
        **to_gpt_model_fields(arch),
        "vocab_size": arch.vocab_size,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
    }
    differences = contradictions({**settings.megatron.transformer, **settings.megatron.model}, derived)
    if differences:
        raise ValueError("; ".join(differences))
    require(layout.cp == 1, "--context-parallel-size", layout.cp, "1: context parallelism is not built yet")
    check_layout(arch, layout.tp, layout.pp)
    longest = settings.rollout.rollout_max_prompt_len + settings.rollout.rollout_max_response_len
    require(
        longest <= arch.max_position_embeddings,
        "--rollout-max-prompt-len + --rollout-max-response-len",
        longest,
        f"at most the checkpoint's context, {arch.max_position_embeddings} tokens ({directory}/config.json)",
    )
    require(
        settings.batch.global_batch_size >= layout.dp,
        "--global-batch-size",
        settings.batch.global_batch_size,
        f"at least the number of data-parallel ranks ({layout.dp})",
    )
    weights = HFWeights(directory)
    check_hf_shapes(arch, weights)
    return arch, weights
