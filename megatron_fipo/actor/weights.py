"""Weights between this rank's shards and Hugging Face names: loading into any layout, exporting as one stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fipo.actor.model import unwrapped
from megatron_fipo.actor.setup import Groups
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.hf_files import HFWeights
from megatron_fipo.weights.mapping import (
    canonical_name,
    expected_megatron_names,
    hf_from_shards,
    partition_of,
    shard_from_hf,
)


@dataclass(frozen=True)
class WeightTable:
    """Which parameters every pipeline stage holds: global Megatron names, local shapes; the same on every rank."""

    stages: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


def load_hf_weights(
    chunks: Sequence[nn.Module], arch: Architecture, weights: HFWeights, layout: ParallelLayout, *, padded_vocab: int
) -> None:
    """Fill this rank's parameters from a Hugging Face checkpoint, reading only what this rank holds."""
    with torch.no_grad():
        for name, parameter in _global_parameters(chunks, arch).items():
            shard = shard_from_hf(
                name, arch, weights, tp_rank=layout.tp_rank, tp_size=layout.tp, padded_vocab=padded_vocab
            )
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            parameter.copy_(shard)


def weight_table(
    chunks: Sequence[nn.Module], arch: Architecture, layout: ParallelLayout, groups: Groups
) -> WeightTable:
    """Collect every stage's parameter names and shapes. Collective over the pipeline axis."""
    mine = tuple((name, tuple(parameter.shape)) for name, parameter in _global_parameters(chunks, arch).items())
    stages: list[tuple[tuple[str, tuple[int, ...]], ...]] = [()] * layout.pp
    dist.all_gather_object(stages, mine, group=groups.pp)
    return WeightTable(tuple(stages))


def export_weights(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    layout: ParallelLayout,
    groups: Groups,
    table: WeightTable,
    *,
    read: Callable[[nn.Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) on rank 0, nothing elsewhere; every rank must exhaust the iterator.

    `read` says what of a parameter is exported: its value, or something of its shape, such as its gradient. All
    exported tensors have one dtype. Collective: one all-gather over the tensor-parallel axis per parameter and one
    transfer from its stage to rank 0, so at most one whole parameter is held beyond what the consumer keeps.
    """
    named = {name: read(parameter) for name, parameter in _global_parameters(chunks, arch).items()}
    example = next(iter(named.values()))
    for stage, parameters in enumerate(table.stages):
        sender = stage * layout.tp * layout.cp * layout.dp
        takes_part = layout.pp_rank == stage and layout.dp_rank == 0 and layout.cp_rank == 0
        for name, shape in parameters:
            if name == "output_layer.weight" and arch.tied:
                continue  # the last stage's copy of the embedding
            num_shards = 1 if partition_of(name) == "replicated" else layout.tp
            shards: list[Tensor] | None = None
            if takes_part:
                shards = _gathered(named[name], num_shards, groups)
            if layout.rank == 0 and sender != 0:
                shards = [example.new_empty(shape) for _ in range(num_shards)]
                for shard in shards:
                    dist.recv(shard, src=sender)
            elif layout.rank == sender and sender != 0:
                assert shards is not None
                for shard in shards:
                    dist.send(shard, dst=0)
            if layout.rank == 0:
                assert shards is not None
                yield from hf_from_shards(name, arch, shards)


def _gathered(local: Tensor, num_shards: int, groups: Groups) -> list[Tensor]:
    if num_shards == 1:
        return [local.contiguous()]
    shards = [torch.empty_like(local) for _ in range(num_shards)]
    dist.all_gather(shards, local.contiguous(), group=groups.tp)
    return shards


def _global_parameters(chunks: Sequence[nn.Module], arch: Architecture) -> dict[str, nn.Parameter]:
    """This rank's parameters under global names (layer numbers count from the model's first), checked to be the
    architecture's."""
    policies = [unwrapped(chunk) for chunk in chunks]
    named: dict[str, nn.Parameter] = {}
    for policy in policies:
        numbers = [layer.layer_number - 1 for layer in policy.decoder.layers]
        for name, parameter in policy.named_parameters():
            named[canonical_name(_with_global_layer(name, numbers))] = parameter
    expected = expected_megatron_names(
        arch,
        [layer.layer_number - 1 for policy in policies for layer in policy.decoder.layers],
        first_stage=any(policy.pre_process for policy in policies),
        last_stage=any(policy.post_process for policy in policies),
    )
    assert set(named) == set(expected), sorted(set(named) ^ set(expected))
    return named


def _with_global_layer(name: str, numbers: Sequence[int]) -> str:
    """decoder.layers.I.rest -> decoder.layers.numbers[I].rest."""
    return re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{numbers[int(match[1])]}", name)
