"""Which layouts there are to choose from, and a rough order of those that fit.

The order is by the time of a token's training, all of it added up and nothing overlapped: computation (twice the
parameters forward, four times backward, once more forward under full recomputation; plus attention's own), stretched by
the pipeline's bubble (Narayanan et al. 2021), then tensor-, context- and expert-parallel traffic, then gradients and
parameters over the data-parallel ranks. The rates are nominal; they only rank layouts and predict no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.planning.states import num_parameters
from megatron_fipo.planning.training import Training
from megatron_fipo.weights.architecture import Architecture

_FLOPS_PER_S = 4e14
_BYTES_PER_S_IN_NODE = 2e11
_BYTES_PER_S_BETWEEN_NODES = 4e10
_CONTEXT_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """The layout flags that are searched."""

    tp: int
    pp: int
    cp: int
    ep: int


@dataclass(frozen=True)
class Cost:
    """Seconds of training a token on one rank, times the ranks; `bubble` is the pipeline's share of waiting."""

    seconds_per_token: float
    bubble: float
    communication: float  # its share of the time


def candidate_sizes(arch: Architecture, num_gpus: int, gpus_per_node: int) -> Iterator[Sizes]:
    """Every combination that divides the GPUs: TP inside a node, CP to 8, EP by whole experts.

    What does not divide the model is among them, for the checks to say so.
    """
    num_experts = arch.num_moe_experts or 1
    for tp in _divisors(min(gpus_per_node, num_gpus)):
        for pp in _divisors(num_gpus):
            for cp in _CONTEXT_SIZES:
                if pp > arch.num_layers or num_gpus % (tp * pp * cp):
                    continue
                for ep in _divisors(num_experts):
                    if num_gpus % (ep * pp) == 0:
                        yield Sizes(tp, pp, cp, ep)


def cost(training: Training, gpus_per_node: int, samples_per_update: int, mean_length: float) -> Cost:
    """Of an update over `samples_per_update` sequences of `mean_length` tokens."""
    arch, layout, width = training.arch, training.layout, training.dtype_bytes
    tokens = samples_per_update * mean_length / layout.dp  # of a data-parallel rank, over its model-parallel ranks
    passes = 8 if training.recompute.granularity == "full" else 6
    worked_on = _active_parameters(arch) + arch.num_layers * arch.num_attention_heads * arch.kv_channels * mean_length
    compute = passes * worked_on * tokens / (layout.tp * layout.pp * layout.cp) / _FLOPS_PER_S
    micro_batches = max(1.0, tokens / (training.rows * layout.cp))
    bubble = (layout.pp - 1) / (micro_batches * layout.vpp)
    layers, rows = arch.num_layers / layout.pp, tokens / layout.cp
    times = passes / 3  # forward, backward, and forward again
    tensor = times * 2 * rows * arch.hidden_size * width * (layout.tp - 1) / layout.tp
    keys = times * 2 * rows * arch.num_query_groups * arch.kv_channels / layout.tp * width * (layout.cp - 1)
    experts = times * 2 * (arch.moe_router_topk or 0) * rows / layout.tp * arch.hidden_size * width
    experts *= (layout.ep - 1) / layout.ep
    in_node = _BYTES_PER_S_IN_NODE
    cp_rate = in_node if layout.tp * layout.cp <= gpus_per_node else _BYTES_PER_S_BETWEEN_NODES
    ep_rate = in_node if layout.etp * layout.ep <= gpus_per_node else _BYTES_PER_S_BETWEEN_NODES
    between_layers = layers * (tensor / in_node + keys / cp_rate + experts / ep_rate)
    group = layout.dp * layout.cp
    synced = num_parameters(training, 0) * (training.gradient_bytes + width) * (group - 1) / group
    dp_rate = in_node if layout.world_size // layout.pp <= gpus_per_node else _BYTES_PER_S_BETWEEN_NODES
    moved = between_layers * (1 + bubble) + synced / dp_rate
    total = compute * (1 + bubble) + moved
    return Cost(total / tokens * layout.tp * layout.pp * layout.cp, bubble / (1 + bubble), moved / total)


def _active_parameters(arch: Architecture) -> int:
    """Parameters that a token meets, without the embedding's lookup."""
    hidden, dim = arch.hidden_size, arch.kv_channels
    attention = 2 * hidden * dim * (arch.num_attention_heads + arch.num_query_groups)
    channels = arch.ffn_hidden_size
    if arch.num_moe_experts:
        assert arch.moe_ffn_hidden_size is not None, arch
        channels = arch.moe_ffn_hidden_size * (arch.moe_router_topk or 0)
    return arch.num_layers * (attention + 3 * hidden * channels) + arch.vocab_size * hidden


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
