"""The initial weights beside the current ones: kept in main memory, and lent to the model for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_fipo.actor.model import gather_parameters, unwrapped


@dataclass(frozen=True, eq=False)
class ReferenceWeights:
    """This rank's parameters and buffers as they were when the copy was made, in main memory.

    Costs each rank as much main memory as its share of the model takes on the device.
    """

    values: tuple[Tensor, ...]  # in the order of _tensors_of


def copy_weights(chunks: Sequence[DistributedDataParallel]) -> ReferenceWeights:
    """A copy of what the chunks hold now."""
    return ReferenceWeights(tuple(_copy(tensor) for tensor in _tensors_of(chunks)))


@contextmanager
def weights_lent(chunks: Sequence[DistributedDataParallel], reference: ReferenceWeights) -> Iterator[None]:
    """Inside, the chunks compute with the reference's weights; afterwards they hold their own again, bit for bit.

    Values change places with the copy in main memory; every tensor stays where it is, so that views on it, such as
    those into Megatron's parameter buffers and the optimizer's shards, stay valid. The optimizer must not step inside.
    Collective where Megatron overlaps the gathering of parameters: it is waited for.
    """
    _exchange(chunks, reference)
    try:
        yield
    finally:
        _exchange(chunks, reference)


def _exchange(chunks: Sequence[DistributedDataParallel], reference: ReferenceWeights) -> None:
    gather_parameters(chunks)
    tensors = _tensors_of(chunks)
    assert len(tensors) == len(reference.values), (len(tensors), len(reference.values))
    with torch.no_grad():
        for tensor, kept in zip(tensors, reference.values):
            own = tensor.detach().clone()
            tensor.copy_(kept)
            kept.copy_(own)


def _tensors_of(chunks: Sequence[DistributedDataParallel]) -> list[Tensor]:
    models = [unwrapped(chunk) for chunk in chunks]  # to Megatron's wrapper `buffers` means something else
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def _copy(tensor: Tensor) -> Tensor:
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return kept.copy_(tensor.detach())
