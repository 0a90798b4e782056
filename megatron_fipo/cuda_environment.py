"""Variables that CUDA, NCCL and torch's allocator read when they start: what a run needs of them.

Nothing here touches a device: it has to be done before one is.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from megatron_fipo.arguments import Settings

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
NCCL_MEMORY_VARIABLES = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")


def settle_cuda_environment(settings: Settings, environment: MutableMapping[str, str]) -> None:
    """Set what is not set already. The engines that a rank starts inherit it.

    A communicator over trainer and engines (`--rollout-placement disaggregated`) hangs or fails where they differ in
    how NCCL registers memory: SGLang sets both variables where they are absent, to 0 unless its own flags ask for
    symmetric memory, NCCL itself takes 1. Kernels of one GPU start in the order they were launched in, so that
    tensor- and context-parallel communication overlaps before Blackwell, only over one connection; SGLang sets its own.
    """
    megatron, server = settings.megatron, settings.engine.server_args
    if settings.engine.placement == "disaggregated":
        registers = megatron.ddp.get("nccl_ub") or server.get("enable_symm_mem") or server.get("enable_nccl_nvls")
        for name in NCCL_MEMORY_VARIABLES:
            environment.setdefault(name, "1" if registers else "0")
    if max(megatron.tensor_model_parallel_size, megatron.context_parallel_size) > 1:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def check_allocator(settings: Settings, environment: Mapping[str, str]) -> None:
    """Raise ValueError where torch's expandable segments meet colocated engines: their memory can neither be released
    by tag nor handed to another process over CUDA IPC."""
    if settings.engine.placement != "colocated" or settings.rollout.replay_rollouts is not None:
        return
    for name in ALLOCATOR_VARIABLES:
        value = environment.get(name, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            raise ValueError(
                f"the variable {name} is {value!r}, but must not set expandable_segments with --rollout-placement "
                "colocated: the memory of engines could not be released, nor weights handed to them"
            )
