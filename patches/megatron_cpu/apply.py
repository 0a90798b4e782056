"""The list of patches and the one call that applies them, in order, once."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import torch
from megatron.core import jit

from megatron_fipo.patches.megatron_cpu import (
    embedding_stays_on_cpu,
    group_of_one,
    p2p_directions,
    rng_on_cpu,
    router_without_te,
    splits_as_numpy,
    tensor_type_names,
    torch_on_cpu,
    uneven_gather,
)

SUPPORTED = "0.16."

PATCHES: dict[str, Callable[[], None]] = {
    "torch_on_cpu": torch_on_cpu.apply,
    "rng_on_cpu": rng_on_cpu.apply,
    "tensor_type_names": tensor_type_names.apply,
    "embedding_stays_on_cpu": embedding_stays_on_cpu.apply,
    "group_of_one": group_of_one.apply,
    "router_without_te": router_without_te.apply,
    "splits_as_numpy": splits_as_numpy.apply,
    "uneven_gather": uneven_gather.apply,
    "p2p_directions": p2p_directions.apply,
}

_applied: list[str] = []


def apply_patches() -> tuple[str, ...]:
    """Make megatron-core run on the CPU of this process and return the names of the patches in force.

    A second call changes nothing. Raises RuntimeError on a machine with CUDA, where none is needed, and for a
    megatron-core these patches were not written for.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU patches for megatron-core must not be applied where CUDA is available")
    found = version("megatron-core")
    if not found.startswith(SUPPORTED):
        raise RuntimeError(f"megatron-core is {found}, but its CPU patches are written for {SUPPORTED}x")
    if not _applied:
        jit.disable_jit_fuser()  # torch.compile brings nothing to these small CPU operations but start-up time
        for name, apply in PATCHES.items():
            apply()
            _applied.append(name)
    return tuple(_applied)
