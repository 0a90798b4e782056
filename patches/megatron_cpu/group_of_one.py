"""Leave gradients and parameters alone where there is nobody to share them with.

Why: with one data-parallel rank, gloo still copies the whole gradient buffer (reduce-scatter) and the whole parameter
    buffer (all-gather) to fresh memory and back, a fifth of an update of the quickstart; NCCL does not.
Upstream: megatron.core.distributed.param_and_grad_buffer.dist_reduce_scatter_func and dist_all_gather_func.
Drop-when: the bucket groups skip collectives over a group of one, or gloo works in place.
Test: tests/distributed/test_patch_megatron.py::test_group_of_one_is_needed
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

REPLACES: Final = {
    "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func": "89a98f0d2d0524fa",
    "megatron.core.distributed.param_and_grad_buffer:dist_reduce_scatter_func": "257d729e57719621",
}


def apply() -> None:
    """Wrap the two collectives."""
    buffer: Any = param_and_grad_buffer
    buffer.dist_reduce_scatter_func = _unless_alone(buffer.dist_reduce_scatter_func)
    buffer.dist_all_gather_func = _unless_alone(buffer.dist_all_gather_func)


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, input: torch.Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
        in_place = output.data_ptr() == input.data_ptr() and output.numel() == input.numel()
        if in_place and group.size() == 1 and not kwargs.get("async_op", False):
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return wrapped
