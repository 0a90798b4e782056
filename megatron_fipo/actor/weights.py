"""Weights between this rank's shards and Hugging Face names: loading into any layout, exporting as one stream."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fipo.actor.model import unwrapped
from megatron_fipo.actor.setup import Groups
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.mapping import (
    EMBEDDING,
    OUTPUT,
    canonical_name,
    expected_megatron_names,
    expert_of,
    hf_from_shards,
    partition_of,
    shard_from_hf,
)
from megatron_fipo.weights.source import WeightSource


@dataclass(frozen=True)
class TableEntry:
    """A parameter of a pipeline stage: its global name, the shape of one shard, and who holds it."""

    name: str
    shape: tuple[int, ...]
    ep_rank: int | None  # the expert-parallel rank whose expert it belongs to; None: outside of experts


@dataclass(frozen=True)
class WeightTable:
    """Which parameters every pipeline stage holds, layer by layer; the same on every rank."""

    stages: tuple[tuple[TableEntry, ...], ...]


def load_hf_weights(
    chunks: Sequence[nn.Module], arch: Architecture, weights: WeightSource, layout: ParallelLayout, *, padded_vocab: int
) -> None:
    """Fill this rank's parameters from a checkpoint's files, reading only what this rank holds."""
    with torch.no_grad():
        for name, parameter in global_parameters(chunks, arch, layout).items():
            is_dense = expert_of(name) is None
            tp_rank, tp_size = (layout.tp_rank, layout.tp) if is_dense else (layout.etp_rank, layout.etp)
            shard = shard_from_hf(name, arch, weights, tp_rank=tp_rank, tp_size=tp_size, padded_vocab=padded_vocab)
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            parameter.copy_(shard)


def weight_table(
    chunks: Sequence[nn.Module], arch: Architecture, layout: ParallelLayout, groups: Groups
) -> WeightTable:
    """Collect every stage's parameter names and shapes. Collective over the expert- and pipeline-parallel axes."""
    mine = [
        TableEntry(name, tuple(parameter.shape), None if expert_of(name) is None else layout.ep_rank)
        for name, parameter in global_parameters(chunks, arch, layout).items()
    ]
    shares: list[list[TableEntry]] = [[]] * layout.ep
    dist.all_gather_object(shares, mine, group=groups.ep)
    experts = [entry for share in shares for entry in share if entry.ep_rank is not None]
    of_stage = sorted([entry for entry in mine if entry.ep_rank is None] + experts, key=_place)
    stages: list[list[TableEntry]] = [[]] * layout.pp
    dist.all_gather_object(stages, of_stage, group=groups.pp)
    return WeightTable(tuple(tuple(stage) for stage in stages))


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
    exported tensors have one dtype. Collective: one all-gather over the (expert-)tensor-parallel axis per parameter and
    one transfer from its holder to rank 0, so at most one whole parameter is held beyond what the consumer keeps.
    """
    named = {name: read(parameter) for name, parameter in global_parameters(chunks, arch, layout).items()}
    example = next(iter(named.values()))
    for stage, entries in enumerate(table.stages):
        for entry in entries:
            if entry.name == OUTPUT and arch.tied:
                continue  # the last stage's copy of the embedding
            senders = holders(entry, stage, layout)
            shards: list[Tensor] | None = None
            if layout.rank in senders:
                group = groups.tp if entry.ep_rank is None else groups.etp
                shards = _gathered(named[entry.name], len(senders), group)
            if layout.rank == 0 and senders[0] != 0:
                shards = [example.new_empty(entry.shape) for _ in senders]
                for shard in shards:
                    dist.recv(shard, src=senders[0])
            elif layout.rank == senders[0] != 0:
                assert shards is not None
                for shard in shards:
                    dist.send(shard, dst=0)
            if layout.rank == 0:
                assert shards is not None
                yield from hf_from_shards(entry.name, arch, shards)


def holders(entry: TableEntry, stage: int, layout: ParallelLayout, receiver: int = 0) -> range:
    """The ranks whose shards make up one copy of a parameter, in order; of a replicated one the first rank alone.

    Of the copies of a stage it is the one at the receiver's own data- and context-parallel place.
    """
    size = layout.tp * layout.cp * layout.dp  # ranks of a stage
    span, offset, num_shards = layout.tp, 0, layout.tp
    if entry.ep_rank is not None:
        span, offset, num_shards = layout.ep * layout.etp, entry.ep_rank * layout.etp, layout.etp
    first = stage * size + receiver % size // span * span + offset
    return range(first, first + (1 if partition_of(entry.name) == "replicated" else num_shards))


def _place(entry: TableEntry) -> tuple[int, int]:
    """Sorts a stage's parameters by layer and, below it, the experts by number after everything else."""
    found = re.match(r"decoder\.layers\.(\d+)\.", entry.name)
    expert = expert_of(entry.name)
    if found is None:
        return (-1 if entry.name == EMBEDDING else sys.maxsize), 0
    return int(found[1]), -1 if expert is None else expert


def _gathered(local: Tensor, num_shards: int, group: dist.ProcessGroup) -> list[Tensor]:
    if num_shards == 1:
        return [local.contiguous()]
    shards = [torch.empty_like(local) for _ in range(num_shards)]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def global_parameters(
    chunks: Sequence[nn.Module], arch: Architecture, layout: ParallelLayout
) -> dict[str, nn.Parameter]:
    """This rank's parameters under global names (layers and experts count from the model's first), checked to be the
    architecture's."""
    num_experts = (arch.num_moe_experts or 0) // layout.ep  # of each rank
    experts = range(layout.ep_rank * num_experts, (layout.ep_rank + 1) * num_experts)
    policies = [unwrapped(chunk) for chunk in chunks]
    named: dict[str, nn.Parameter] = {}
    for policy in policies:
        numbers = [layer.layer_number - 1 for layer in policy.decoder.layers]
        for name, parameter in policy.named_parameters():
            named[canonical_name(_with_global_layer(name, numbers), first_expert=experts.start)] = parameter
    expected = expected_megatron_names(
        arch,
        [layer.layer_number - 1 for policy in policies for layer in policy.decoder.layers],
        first_stage=any(policy.pre_process for policy in policies),
        last_stage=any(policy.post_process for policy in policies),
        experts=experts,
    )
    assert set(named) == set(expected), sorted(set(named) ^ set(expected))
    return named


def _with_global_layer(name: str, numbers: Sequence[int]) -> str:
    """decoder.layers.I.rest -> decoder.layers.numbers[I].rest."""
    return re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{numbers[int(match[1])]}", name)
