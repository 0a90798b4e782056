"""Gather shares of different lengths over gloo.

Why: the tensor-parallel ranks of an expert hold different numbers of its tokens; NCCL's all-gather takes a list of
    tensors of different lengths, gloo's does not (its reduce-scatter does): RuntimeError.
Upstream: megatron.core.tensor_parallel.mappings._gather_along_first_dim with split sizes, as the all-to-all token
    dispatcher calls it when --expert-tensor-parallel-size is above 1.
Drop-when: gloo takes such a list.
Test: tests/distributed/test_patch_experts.py::test_uneven_gather_is_needed
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

REPLACES: Final = {
    "megatron.core.tensor_parallel.mappings:_gather_along_first_dim": "96d032e079962ead",
}


def apply() -> None:
    """Wrap the function: what has no split sizes goes its old way."""
    module: Any = mappings
    gather = module._gather_along_first_dim

    @functools.wraps(gather)
    def gather_any(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        return _gather_uneven(input_, group, output_split_sizes)

    module._gather_along_first_dim = gather_any


def _gather_uneven(share: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """[sizes[rank], ...] of every rank, one after the other: [sum(sizes), ...]. All travel at the longest's length."""
    padded = share.new_zeros(max(sizes), *share.shape[1:])
    padded[: len(share)] = share
    shares = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shares, padded, group=group)
    return torch.cat([each[:size] for each, size in zip(shares, sizes)])
