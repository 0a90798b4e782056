"""Every tensor that a rank's actor keeps from one update to the next, and whether it has memory on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class ActorAway(RuntimeError):
    """The actor was asked for something while its tensors were off the device (offload.py)."""


def require_on_device(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer | None = None) -> None:
    """ActorAway when parameters, or with `optimizer` also gradients or optimizer state, are off the device: the tensors
    have no memory then, and reading one could end the process."""
    tensors = parameters_of(chunks)
    if optimizer is not None:
        tensors = chain(tensors, gradients_of(chunks, optimizer), optimizer_state(optimizer))
    if any(tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0 for tensor in tensors):
        raise ActorAway(
            "the actor's tensors are in main memory while engines generate: HybridEngine.start_training or "
            "actor_at_work brings them back"
        )


def parameters_of(chunks: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    """Megatron's flat buffers, which most parameters are views of, then the others, and the modules' buffers."""
    for chunk in chunks:
        for buffer in _flat_buffers(chunk):
            if buffer.param_data is not None:
                yield buffer.param_data
        yield from chunk.module.parameters()
        yield from chunk.module.buffers()  # to Megatron's wrapper itself the word means something else


def gradients_of(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """The flat buffers, and what an optimizer's step made of them."""
    for chunk in chunks:
        for buffer in _flat_buffers(chunk):
            yield buffer.grad_data
    for parameter in (*(p for chunk in chunks for p in chunk.parameters()), *_main_parameters(optimizer)):
        # of what is no leaf, an fp32 parameter's shard, the gradient is a shard too, and asking for it a warning
        for name in ("grad", "decoupled_grad") if parameter.is_leaf else ("decoupled_grad",):
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                yield gradient


def optimizer_state(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """fp32 masters and moments; counters, which are scalars, stay."""
    yield from _main_parameters(optimizer)
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)


def _main_parameters(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron-core keeps an optimizer of its own for experts; one without parameters on this rank is a stub."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if getattr(part, "optimizer", None) is not None]


def _flat_buffers(chunk: DistributedDataParallel) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]
