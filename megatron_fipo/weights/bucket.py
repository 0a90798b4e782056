"""Flat buckets of named tensors on their way into an engine: shared memory on CPU, CUDA IPC on a GPU.

The wire format is SGLang's `flattened_bucket`: a pickled dict of one uint8 tensor and a list of where each named tensor
lies in it. It is written here without importing sglang, which would patch transformers in the trainer's process.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch import Tensor

_ALIGNMENT_BYTES = 64  # a tensor's view must start at a multiple of its element size; 64 suits every dtype


@dataclass(frozen=True)
class BucketEntry:
    """Where a tensor lies in its bucket, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class WeightBucket:
    """Tensors copied end to end into one buffer of their own. The memory is freed with the last reference to it, here
    or in an engine, so a bucket must be kept until every engine has answered, and is never written to again."""

    flat: Tensor  # [size_bytes] uint8
    entries: tuple[BucketEntry, ...]

    @property
    def size_bytes(self) -> int:
        return self.flat.numel()

    def handle(self) -> str:
        """A new handle for one receiving process (a handle can be opened once), in base64."""
        metadata = [
            SimpleNamespace(
                name=entry.name,
                shape=torch.Size(entry.shape),
                dtype=entry.dtype,
                start_idx=entry.start,
                end_idx=entry.end,
                numel=entry.end - entry.start,
            )
            for entry in self.entries
        ]
        buffer = io.BytesIO()
        with _shared_by_file_name():
            ForkingPickler(buffer).dump({"flattened_tensor": self.flat, "metadata": metadata})
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def make_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Cut a stream of (name, tensor) into buckets of at most `bucket_bytes`, each holding whole tensors in order; a
    larger tensor gets a bucket of its own. Tensors are read when their bucket is made, one bucket at a time.

    Raises ValueError on a repeated name, on an empty tensor and on tensors of one bucket on different devices.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, but must be at least 1")
    seen: set[str] = set()
    pending: list[tuple[str, Tensor]] = []
    pending_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"the weight {name} was sent twice")
        if tensor.numel() == 0:
            raise ValueError(f"the weight {name} is empty: shape {tuple(tensor.shape)}")
        seen.add(name)
        size = _aligned(tensor.numel() * tensor.element_size())
        if pending and pending_bytes + size > bucket_bytes:
            yield _fill_bucket(pending)
            pending, pending_bytes = [], 0
        pending.append((name, tensor))
        pending_bytes += size
    if pending:
        yield _fill_bucket(pending)


def _fill_bucket(tensors: list[tuple[str, Tensor]]) -> WeightBucket:
    device = tensors[0][1].device
    entries: list[BucketEntry] = []
    end = 0
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"the weight {name} is on {tensor.device}, others of its bucket on {device}")
        start = _aligned(end)
        end = start + tensor.numel() * tensor.element_size()
        entries.append(BucketEntry(name, tuple(tensor.shape), tensor.dtype, start, end))
    flat = _new_buffer(end, device)
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        flat[entry.start : entry.end].view(entry.dtype).view(entry.shape).copy_(tensor.detach())
    return WeightBucket(flat, tuple(entries))


def _new_buffer(size_bytes: int, device: torch.device) -> Tensor:
    """An uninitialised [size_bytes] uint8 tensor that another process can open."""
    if device.type != "cpu":
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    with _shared_by_file_name():
        storage = torch.UntypedStorage._new_shared(size_bytes)
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (size_bytes,), (1,))


@contextmanager
def _shared_by_file_name() -> Iterator[None]:
    """torch's file_system sharing: a handle is a name, which a process outside the trainer's family can open. torch
    removes the file when its last user, in whatever process, lets go or dies."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _aligned(size_bytes: int) -> int:
    return math.ceil(size_bytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
