"""Let megatron-core's random-state tracker keep the CPU generator's state.

Why: the tracker reads and sets the default generator of a CUDA device.
Upstream: megatron.core.tensor_parallel.random._get_cuda_rng_state and _set_cuda_rng_state.
Drop-when: the tracker takes the device whose generator it keeps.
Test: tests/distributed/test_patch_megatron.py::test_rng_on_cpu_is_needed
"""

from __future__ import annotations

from typing import Final

import torch
from megatron.core.tensor_parallel import random

REPLACES: Final = {
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state": "2509183eb3c0f0b5",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": "519f7aaa452f0702",
}


def apply() -> None:
    """Replace the two functions through which the tracker reaches the generator."""
    random._get_cuda_rng_state = _get_state
    random._set_cuda_rng_state = _set_state


def _get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    assert not graph_safe, "CUDA graphs do not exist on the CPU"
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    assert not graph_safe, "CUDA graphs do not exist on the CPU"
    torch.set_rng_state(new_state)
