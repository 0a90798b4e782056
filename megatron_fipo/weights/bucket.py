"""Flat buckets of named tensors on their way into an engine: shared memory on CPU, CUDA IPC on a GPU.

A bucket travels as what SGLang calls named tensors: a pickled list of one pair, a header in JSON and the bytes, which
rollout/weight_loader.py takes apart inside the engine. It is written here without importing sglang, which would patch
transformers in the trainer's process.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor

from megatron_fipo.weights.buffers import BucketBuffers, shared_by_file_name
from megatron_fipo.weights.checksum import RunningChecksum, checksum

ENGINE_LOADER = "megatron_fipo.rollout.weight_loader.load_bucket"
"""The function that opens a bucket in the engine: SGLang's `custom_weight_loader`, and `load_format` of an update."""

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
    """Tensors copied end to end into one buffer. The memory is freed, or written anew for another bucket, once nothing
    here refers to it: a bucket must be kept until every engine has answered, and does not change as long as it, or a
    view of it, is kept. An engine that reads it later all the same finds another checksum."""

    flat: Tensor  # [size_bytes] uint8
    entries: tuple[BucketEntry, ...]
    checksum: int  # of the bytes, the names and the places
    home: Tensor | None = None  # the shared memory that `flat` is a window on, where it is one

    @property
    def size_bytes(self) -> int:
        return self.flat.numel()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view of the buffer) of every tensor."""
        for entry in self.entries:
            yield entry.name, self._view(entry)

    def verified_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`tensors`, reading every byte for the checksum shortly before it is handed out. Raises ValueError after the
        last tensor if the checksum is not the bucket's: what was handed out is then not what was sent."""
        running = RunningChecksum(self.flat)
        for entry in self.entries:
            running.advance_past(entry.end)
            yield entry.name, self._view(entry)
        self._compare(running.finish(_label(self.entries)))

    def verify(self) -> None:
        """ValueError if the bytes, names or places are not those the checksum was made of."""
        self._compare(checksum(self.flat, _label(self.entries)))

    def handle(self) -> str:
        """A new handle for one receiving process (a handle can be opened once), in base64."""
        buffer = io.BytesIO()
        with shared_by_file_name():
            ForkingPickler(buffer).dump([(self.header(), self.flat if self.home is None else self.home)])
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def header(self) -> str:
        """Names, shapes, dtypes, places and checksum as JSON, and whether later buckets may lie in the same memory."""
        is_reused = self.home is not None and self.home is not self.flat
        checked = {"checksum": f"{self.checksum:016x}", "entries": _plain(self.entries)}
        return json.dumps({**checked, "is_reused": is_reused})

    def _view(self, entry: BucketEntry) -> Tensor:
        return self.flat[entry.start : entry.end].view(entry.dtype).view(entry.shape)

    def _compare(self, found: int) -> None:
        if found != self.checksum:
            names = f"{self.entries[0].name} .. {self.entries[-1].name}"
            raise ValueError(f"weight bucket refused: its checksum is {found:016x}, not {self.checksum:016x} ({names})")


def received_bucket(header: str, flat: Tensor) -> WeightBucket:
    """The bucket that arrived as `header` and `flat`, its checksum yet to be verified. ValueError if it is cut short or
    the header is not one. `home` is set where later buckets may lie in the same memory."""
    try:
        found = json.loads(header)
        entries = tuple(
            BucketEntry(str(name), tuple(map(int, shape)), _DTYPES[dtype], int(start), int(end))
            for name, shape, dtype, start, end in found["entries"]
        )
        bucket = WeightBucket(flat, entries, int(found["checksum"], 16), flat if found["is_reused"] else None)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weight bucket refused: its header is not one ({error!r}): {header[:200]}") from None
    for entry in entries:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if not 0 <= entry.start < entry.end <= flat.numel() or entry.end - entry.start != size:
            raise ValueError(f"weight bucket refused: {entry} does not lie in its {flat.numel()} bytes")
    return bucket


def make_buckets(
    tensors: Iterable[tuple[str, Tensor]],
    bucket_bytes: int,
    buffers: BucketBuffers | None = None,
    *,
    largest_bytes: int = 0,
) -> Iterator[WeightBucket]:
    """Cut a stream of (name, tensor) into buckets of at most `bucket_bytes`, each holding whole tensors in order; a
    larger tensor gets a bucket of its own. Tensors are read when their bucket is made, one bucket at a time. With
    `buffers`, buckets no larger than `bucket_bytes` and `largest_bytes` have their memory from there.

    Raises ValueError on a repeated name, on an empty tensor and on tensors of one bucket on different devices.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, but must be at least 1")
    capacity_bytes = 0 if buffers is None else max(bucket_bytes, aligned_bytes(largest_bytes))
    seen: set[str] = set()
    pending: list[tuple[str, Tensor]] = []
    pending_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"the weight {name} was sent twice")
        if tensor.numel() == 0:
            raise ValueError(f"the weight {name} is empty: shape {tuple(tensor.shape)}")
        seen.add(name)
        size = aligned_bytes(tensor.nbytes)
        if pending and pending_bytes + size > bucket_bytes:
            yield _fill_bucket(pending, capacity_bytes, buffers)
            pending, pending_bytes = [], 0
        pending.append((name, tensor))
        pending_bytes += size
    if pending:
        yield _fill_bucket(pending, capacity_bytes, buffers)


class BucketWriter:
    """A new bucket that is filled in place, tensor by tensor in order: `write` what the next one is made of.

    `tensors` are (name, shape, dtype). A bucket of up to `capacity_bytes` may use memory of `buffers` again.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        device: torch.device,
        buffers: BucketBuffers,
        *,
        capacity_bytes: int = 0,
    ) -> None:
        entries: list[BucketEntry] = []
        end = 0
        for name, shape, dtype in tensors:
            start = aligned_bytes(end)
            end = start + math.prod(shape) * dtype.itemsize
            entries.append(BucketEntry(name, shape, dtype, start, end))
        self._entries = tuple(entries)
        self._flat, self._home = buffers.take(aligned_bytes(end), capacity_bytes, device)
        self._running = RunningChecksum(self._flat)
        self._num_written = 0

    def write(self, parts: Sequence[Tensor], dim: int = 0) -> None:
        """The next tensor: `parts` one after another along `dim`. Along dimension 0 only the elements' order counts."""
        entry = self._entries[self._num_written]
        self._num_written += 1
        if dim == 0:
            start = entry.start
            for part in parts:
                self._running.copy(part, start)
                start += part.nbytes
            assert start == entry.end, f"{entry.name} was written up to {start} of {entry}"
        else:
            view = self._flat[entry.start : entry.end].view(entry.dtype).view(entry.shape)
            for part, place in zip(parts, view.split([part.size(dim) for part in parts], dim), strict=True):
                place.copy_(part)
        aligned = aligned_bytes(entry.end)
        if aligned > entry.end:
            self._flat[entry.end : aligned].zero_()
        self._running.advance(aligned)

    def finish(self) -> WeightBucket:
        assert self._num_written == len(self._entries), (self._num_written, len(self._entries))
        return WeightBucket(self._flat, self._entries, self._running.finish(_label(self._entries)), self._home)


def aligned_bytes(size_bytes: int) -> int:
    """What a tensor of `size_bytes` takes up in a bucket."""
    return math.ceil(size_bytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _fill_bucket(tensors: list[tuple[str, Tensor]], capacity_bytes: int, buffers: BucketBuffers | None) -> WeightBucket:
    device = tensors[0][1].device
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"the weight {name} is on {tensor.device}, others of its bucket on {device}")
    wanted = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    writer = BucketWriter(wanted, device, buffers or BucketBuffers(), capacity_bytes=capacity_bytes)
    for _, tensor in tensors:
        writer.write([tensor.detach()])
    return writer.finish()


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}


def _plain(entries: tuple[BucketEntry, ...]) -> list[list[object]]:
    return [
        [entry.name, list(entry.shape), str(entry.dtype).removeprefix("torch."), entry.start, entry.end]
        for entry in entries
    ]


def _label(entries: tuple[BucketEntry, ...]) -> bytes:
    return json.dumps(_plain(entries)).encode()
