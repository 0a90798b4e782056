"""Let experts' token counts that already lie on the CPU become numpy arrays too.

Why: the all-to-all between expert-parallel ranks wants plain numbers for its split sizes; a tensor's counts are turned
    into numpy on their way from the GPU, and only then: TypeError.
Upstream: megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu, imported by name into
    megatron.core.transformer.moe.token_dispatcher.
Drop-when: `as_numpy` holds for CPU tensors.
Test: tests/distributed/test_patch_experts.py::test_splits_as_numpy_is_needed
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher

REPLACES: Final = {
    "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu": "6bf630c5d18155cc",
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": "2d2844d9006679e5",
}


def apply() -> None:
    """Wrap the function where it is used."""
    move = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(move)
    def move_or_view(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = move_or_view
