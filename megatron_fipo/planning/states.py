"""Parameters, gradients and optimizer state of one pipeline rank, to the byte, as Megatron's buffers hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.planning.training import Training

# Megatron-LM's DistributedDataParallel and ParamAndGradBuffer
_BUCKET_ALIGNMENT = 128
_PARAMETER_ALIGNMENT = 64
_LEAST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank's chunk of the model."""

    numel: int
    is_expert: bool = False
    has_own_bucket: bool = False  # a tied embedding that two pipeline stages hold


@dataclass(frozen=True)
class StateBytes:
    """What a rank keeps from one update to the next."""

    parameters: int
    gradients: int
    optimizer: int  # masters and moments, of the data-parallel rank that has most

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(training: Training, pp_rank: int) -> StateBytes:
    """Of the ranks of one pipeline stage. Exact; the optimizer's state is that after its first step."""
    layout, optimizer = training.layout, training.optimizer
    parameters = gradients = shard = 0
    for chunk in range(layout.vpp):
        everything = list(chunk_parameters(training, pp_rank, chunk))
        for is_expert, group_size in ((False, layout.dp * layout.cp), (True, _expert_group_size(layout))):
            mine = [parameter for parameter in everything if parameter.is_expert == is_expert]
            if not mine:
                continue
            if training.is_sharded:
                largest = _bucket_size(training, group_size) if pp_rank == 0 and chunk == 0 else None
                numel, of_rank = _sharded(mine, group_size, largest)
            else:
                numel = of_rank = sum(parameter.numel for parameter in mine)
            parameters += numel * training.dtype_bytes
            gradients += numel * training.gradient_bytes
            shard += of_rank
    return StateBytes(
        parameters=parameters,
        gradients=gradients + round(shard * optimizer.gradient_copy),
        optimizer=round(shard * (optimizer.master + optimizer.moments)),
    )


def num_parameters(training: Training, pp_rank: int) -> int:
    """Of one rank, without padding."""
    chunks = range(training.layout.vpp)
    return sum(p.numel for chunk in chunks for p in chunk_parameters(training, pp_rank, chunk))


def largest_layer_parameter(training: Training) -> int:
    """Elements of the largest parameter of a layer on one rank."""
    return max(parameter.numel for parameter in _layer_parameters(training))


def chunk_parameters(training: Training, pp_rank: int, chunk: int) -> Iterator[Parameter]:
    """A chunk's parameters on one tensor-parallel rank, in Megatron's order of modules."""
    arch, layout = training.arch, training.layout
    is_first = pp_rank == 0 and chunk == 0
    is_last = pp_rank == layout.pp - 1 and chunk == layout.vpp - 1
    vocabulary = training.padded_vocab // layout.tp * arch.hidden_size
    is_shared = arch.tied and layout.pp > 1
    if is_first:
        yield Parameter(vocabulary, has_own_bucket=is_shared)
    of_a_layer = list(_layer_parameters(training))
    for _ in range(training.layers_per_chunk):
        yield from of_a_layer
    if is_last:
        yield Parameter(arch.hidden_size)
        if not arch.tied or is_shared:
            yield Parameter(vocabulary, has_own_bucket=is_shared)


def _layer_parameters(training: Training) -> Iterator[Parameter]:
    arch, layout = training.arch, training.layout
    hidden, dim = arch.hidden_size, arch.kv_channels
    query_rows = arch.num_attention_heads * dim // layout.tp
    qkv_rows = query_rows + 2 * arch.num_query_groups * dim // layout.tp
    yield Parameter(hidden)
    yield Parameter(query_rows * hidden)
    yield Parameter(qkv_rows * hidden)
    if arch.qkv_bias:
        yield Parameter(qkv_rows)
    if arch.qk_layernorm:
        yield from (Parameter(dim), Parameter(dim))
    yield Parameter(hidden)
    if not arch.num_moe_experts:
        ffn = arch.ffn_hidden_size // layout.tp
        yield from (Parameter(2 * ffn * hidden), Parameter(ffn * hidden))
        return
    assert arch.moe_ffn_hidden_size is not None, arch
    yield Parameter(arch.num_moe_experts * hidden)
    ffn, is_expert = arch.moe_ffn_hidden_size // layout.etp, layout.ep > 1
    for _ in range(arch.num_moe_experts // layout.ep):
        yield Parameter(2 * ffn * hidden, is_expert)
        yield Parameter(ffn * hidden, is_expert)


def _expert_group_size(layout: ParallelLayout) -> int:
    """Ranks that hold the same experts."""
    return max(1, layout.world_size // (layout.etp * layout.ep * layout.pp))


def _bucket_size(training: Training, group_size: int) -> int | None:
    """Elements after which Megatron begins a new bucket; None: one bucket."""
    if not training.overlaps_gradients:
        return None
    return max(_LEAST_BUCKET, _BUCKET_PER_RANK * training.layout.dp * training.layout.cp)


def _sharded(parameters: Sequence[Parameter], num_ranks: int, bucket_size: int | None) -> tuple[int, int]:
    """(elements of the flat buffer, parameters' elements in the fullest of its `num_ranks` shards).

    Buckets are filled from the last parameter on; each is cut evenly, padding included.
    """
    spans: list[tuple[int, int]] = []  # of the current bucket
    start = bucket_start = 0
    held = [0] * num_ranks

    def close(end: int) -> int:
        multiple = math.lcm(num_ranks, _BUCKET_ALIGNMENT)
        padded = -(-end // multiple) * multiple
        share = (padded - bucket_start) // num_ranks
        for low, high in spans:
            for rank in range((low - bucket_start) // share, (high - 1 - bucket_start) // share + 1):
                first = bucket_start + rank * share
                held[rank] += min(high, first + share) - max(low, first)
        spans.clear()
        return padded

    for parameter in reversed(parameters):
        start = -(-start // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
        if parameter.has_own_bucket and spans:
            start = bucket_start = close(start)
        spans.append((start, start + parameter.numel))
        start += parameter.numel
        is_full = bucket_size is not None and start - bucket_start >= bucket_size
        if is_full or parameter.has_own_bucket:
            start = bucket_start = close(start)
    if spans:
        start = close(start)
    return start, max(held)
