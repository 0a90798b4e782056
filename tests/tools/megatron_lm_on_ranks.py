"""Megatron-LM on the ranks of a test: megatron-core's GPTModel, saved and loaded by its own dist_checkpointing, with
what Megatron-LM's training puts around it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from actor_on_ranks import make_groups
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.enums import AttnBackend

from megatron_fipo.actor.logit_check import plain_model
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture, padded_vocab_size, read_architecture
from megatron_fipo.weights.hf_files import HFWeights
from megatron_fipo.weights.mapping import canonical_name, expert_of, shard_from_hf
from megatron_fipo.weights.megatron_arguments import to_arguments

DIVISIBLE_BY = 16
FORMS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "layer by layer": {"non_homogeneous_layers": True},
    "all apart": {"singleton_local_shards": True},
}


def megatron_model(arch: Architecture, layout: ParallelLayout) -> GPTModel:
    """This rank's stage, uninitialised."""
    padded = padded_vocab_size(arch.vocab_size, layout.tp, DIVISIBLE_BY)
    return plain_model(
        arch, layout, padded, pre_process=layout.is_first_stage, post_process=layout.is_last_stage, parallel_output=True
    )


def fill(model: GPTModel, arch: Architecture, layout: ParallelLayout, hf_dir: str) -> None:
    """Weights from `hf_dir`, without a checkpoint in between."""
    weights, padded = HFWeights(hf_dir), padded_vocab_size(arch.vocab_size, layout.tp, DIVISIBLE_BY)
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    first_expert = layout.ep_rank * ((arch.num_moe_experts or 0) // layout.ep)
    for local, parameter in model.named_parameters():
        name = re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{numbers[int(match[1])]}.", local)
        name = canonical_name(name, first_expert=first_expert)
        is_dense = expert_of(name) is None
        rank, size = (layout.tp_rank, layout.tp) if is_dense else (layout.etp_rank, layout.etp)
        shard = shard_from_hf(name, arch, weights, tp_rank=rank, tp_size=size, padded_vocab=padded)
        parameter.data.copy_(shard)


def save_forms(hf_dir: str, save: str, sizes: dict[str, int], forms: list[str], *, changed: dict[str, Any]) -> None:
    """Save the model as Megatron-LM would after 123 iterations, once in each form. `changed` overrides its `args`."""
    layout, _ = make_groups(**sizes)
    arch = read_architecture(hf_dir)
    model = megatron_model(arch, layout)
    fill(model, arch, layout, hf_dir)
    arguments = to_arguments(arch) | {
        "tensor_model_parallel_size": layout.tp,
        "padded_vocab_size": padded_vocab_size(arch.vocab_size, layout.tp, DIVISIBLE_BY),
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.local,
        "lr": 1e-4,
        "data_path": ["a", "b"],
    }
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-4, params_dtype=torch.float32)
    optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()  # of zero gradients: Adam has moments after its first step
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])  # it decayed them
    for form in forms:
        state: dict[str, Any] = {
            "args": argparse.Namespace(**(arguments | changed)),
            "checkpoint_version": 3.0,
            "iteration": 123,
            "model": model.sharded_state_dict(metadata=dict(FORMS[form])),
            "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 123},
            "rng_state": ShardedObject(
                "rng_state", [{"cpu": torch.get_rng_state()}], (1,), (0,), replica_id=dist.get_rank()
            ),
            "num_floating_point_operations_so_far": 0,
        }
        if form == "stacked":
            state["optimizer"] = optimizer.sharded_state_dict(state["model"])
        directory = Path(save, form, "iter_0000123")
        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
            (directory.parent / "latest_checkpointed_iteration.txt").write_text("123")
        dist.barrier()
        dist_checkpointing.save(state, str(directory))
    parallel_state.destroy_model_parallel()


def answer_in_layouts(
    hf_dir: str, checkpoint: str, layouts: dict[str, dict[str, int]], tokens: list[int]
) -> dict[str, Any]:
    """Load the checkpoint through dist_checkpointing in each layout of these ranks; on the last rank [L, V] logits."""
    found: dict[str, Any] = {}
    arch = read_architecture(hf_dir)
    for name, sizes in layouts.items():
        layout, _ = make_groups(**sizes)
        model = megatron_model(arch, layout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
        model.load_state_dict(loaded["model"])
        logits = _forward(model, layout, torch.tensor(tokens), arch.hidden_size)
        if logits is not None:
            found[name] = logits[:, : arch.vocab_size]
        parallel_state.destroy_model_parallel()
    return found


def _forward(model: GPTModel, layout: ParallelLayout, tokens: torch.Tensor, hidden_size: int) -> torch.Tensor | None:
    """One pass over all stages; the last one's ranks have [L, V_padded]."""
    length, stage = len(tokens), layout.world_size // layout.pp
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        if not layout.is_first_stage:
            hidden = torch.empty(length, 1, hidden_size)
            dist.recv(hidden, src=layout.rank - stage)
            model.set_input_tensor(hidden)
        output = model(tokens[None], torch.arange(length)[None], masked)
        if not layout.is_last_stage:
            dist.send(output.contiguous(), dst=layout.rank + stage)
            return None
        parts = [torch.empty_like(output) for _ in range(layout.tp)]
        dist.all_gather(parts, output.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)[0]
