"""The actor's weights as flat buckets, on the ranks that hand them to engines: planned, moved and packed in pieces.

Every rank makes the same plan. A piece is consecutive parameters of one pipeline stage that fill a bucket. For each
piece every rank sends what a receiver lacks of it as one flat tensor, and a receiver writes what arrives, and its own
shards, into the bucket under Hugging Face's names. Meanwhile, and while the engines load, the next piece is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fipo.actor.weights import TableEntry, WeightTable, global_parameters, holders
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights import fp8
from megatron_fipo.weights.architecture import Architecture
from megatron_fipo.weights.bucket import BucketWriter, WeightBucket, aligned_bytes
from megatron_fipo.weights.buffers import BucketBuffers
from megatron_fipo.weights.mapping import OUTPUT, hf_parts, hf_shapes_of, write_hf

_LEAST_BUCKETS = 4
_SMALLEST_BYTES = 16 << 20  # below it the calls cost more than the overlap gains


@dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor of the plan: the `index`-th in the Megatron parameter of `entry`."""

    entry: TableEntry
    index: int
    name: str
    shape: tuple[int, ...]
    size_bytes: int  # in a bucket


@dataclass(frozen=True)
class Piece:
    """What moves together. Its tensors fit into one bucket, unless they are those of one parameter that does not."""

    stage: int
    tensors: tuple[HFTensor, ...]

    @property
    def entries(self) -> list[TableEntry]:
        return list(dict.fromkeys(tensor.entry for tensor in self.tensors))


@dataclass(frozen=True, eq=False)
class _Transfer:
    """A piece on its way. `shares` are, on a receiver, the other ranks' flat contributions; `sent` keeps ours alive."""

    piece: Piece
    works: list[dist.Work]
    shares: dict[int, Tensor]
    sent: list[Tensor]


def export_buckets(
    chunks: Sequence[nn.Module],
    arch: Architecture,
    layout: ParallelLayout,
    table: WeightTable,
    buffers: BucketBuffers,
    bucket_bytes: int,
    *,
    receivers: Sequence[int],
    quantise: bool,
) -> Iterator[WeightBucket]:
    """Yield the same buckets on every rank of `receivers`, nothing elsewhere; every rank must exhaust the iterator.

    A bucket holds at most `bucket_bytes`, or one tensor that is larger, and a small model's less (`bucket_size`). On
    the way is at most the next piece: beside its own shards a receiver holds the bucket it packs, those that the
    caller keeps, and two pieces; a sender its shares of two pieces. One point-to-point transfer for each piece,
    receiver and rank that has what it lacks, over the default group's one communicator. All parameters have one dtype;
    with `quantise` the tensors of `fp8.is_quantised` become two (weights/fp8.py).
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, but must be at least 1")
    assert set(receivers) <= set(range(layout.world_size)), (receivers, layout)
    named = {name: parameter.detach() for name, parameter in global_parameters(chunks, arch, layout).items()}
    dtype = next(iter(named.values())).dtype
    assert all(tensor.dtype == dtype for tensor in named.values()), f"parameters are not all {dtype}"
    sizes = [tensor.size_bytes for piece in plan(arch, layout, table, 1, dtype) for tensor in piece.tensors]
    bucket_bytes = bucket_size(sum(sizes), bucket_bytes)
    pieces = plan(arch, layout, table, bucket_bytes, dtype)
    capacity = max(bucket_bytes, *sizes)  # memory that is not written is not taken
    under_way: deque[_Transfer] = deque()
    if layout.world_size > 1:
        # NCCL makes its communicator of all ranks in the first collective; not every rank takes part in a batch
        dist.all_reduce(torch.zeros(1, device=next(iter(named.values())).device))

    def finish() -> Iterator[WeightBucket]:
        transfer = under_way.popleft()
        for work in transfer.works:
            work.wait()
        if layout.rank in receivers:
            shards = _shards(transfer, named, layout)
            transfer.shares.clear()
            for tensors in _buckets(transfer.piece.tensors, bucket_bytes):
                yield _packed(tensors, arch, shards, dtype, buffers, capacity, quantise)

    for number, piece in enumerate(pieces):
        under_way.append(_start(number, piece, named, layout, sorted(set(receivers))))
        if len(under_way) == 2:
            yield from finish()
    yield from finish()


def bucket_size(total_bytes: int, bucket_bytes: int) -> int:
    """What buckets hold at most: `bucket_bytes`, or less for a model that would be so few of them that packing one does
    not overlap with loading the one before: a little over the fourth part, as tensors are not cut."""
    return min(bucket_bytes, max(_SMALLEST_BYTES, total_bytes // _LEAST_BUCKETS * 17 // 16))


def plan(
    arch: Architecture, layout: ParallelLayout, table: WeightTable, bucket_bytes: int, dtype: torch.dtype
) -> list[Piece]:
    """The model's tensors, in order of export and without a tied output layer, in pieces of at most `bucket_bytes`."""
    pieces: list[Piece] = []
    for stage, entries in enumerate(table.stages):
        pending: list[HFTensor] = []
        for entry in entries:
            if arch.tied and entry.name == OUTPUT:
                continue  # the last stage's copy of the embedding
            shapes = hf_shapes_of(entry.name, arch, entry.shape, len(holders(entry, stage, layout)))
            tensors = [
                HFTensor(entry, index, name, shape, aligned_bytes(torch.Size(shape).numel() * dtype.itemsize))
                for index, (name, shape) in enumerate(shapes)
            ]
            if pending and sum(tensor.size_bytes for tensor in pending + tensors) > bucket_bytes:
                pieces.append(Piece(stage, tuple(pending)))
                pending = []
            pending += tensors
        if pending:
            pieces.append(Piece(stage, tuple(pending)))
    return pieces


def _start(
    number: int, piece: Piece, named: Mapping[str, Tensor], layout: ParallelLayout, receivers: Sequence[int]
) -> _Transfer:
    """Post this rank's sends and receives of a piece, as one batch: NCCL makes a communicator for every pair of ranks
    that sends outside of one. Every rank goes through all pieces in the same order, so that no batch waits in a circle.
    """
    shares: dict[int, Tensor] = {}
    posted: list[dist.P2POp] = []
    flat_of: dict[tuple[str, ...], Tensor] = {}
    example = next(iter(named.values()))
    for receiver in receivers:
        for source, entries in _contributions(piece, layout, receiver).items():
            if source == receiver or layout.rank not in (source, receiver):
                continue
            if layout.rank == source:
                names = tuple(entry.name for entry in entries)
                if names not in flat_of:
                    flat_of[names] = torch.cat([named[name].reshape(-1) for name in names])
                posted.append(dist.P2POp(dist.isend, flat_of[names], receiver, tag=number))
            else:
                shares[source] = example.new_empty(sum(torch.Size(entry.shape).numel() for entry in entries))
                posted.append(dist.P2POp(dist.irecv, shares[source], source, tag=number))
    works = dist.batch_isend_irecv(posted) if posted else []
    return _Transfer(piece, works, shares, [*flat_of.values()])


def _contributions(piece: Piece, layout: ParallelLayout, receiver: int) -> dict[int, list[TableEntry]]:
    """Which shards each rank has for a receiver: the parameters, in the piece's order, by rank."""
    found: dict[int, list[TableEntry]] = {}
    for entry in piece.entries:
        for rank in holders(entry, piece.stage, layout, receiver):
            found.setdefault(rank, []).append(entry)
    return found


def _shards(transfer: _Transfer, named: Mapping[str, Tensor], layout: ParallelLayout) -> dict[str, list[Tensor]]:
    """On a receiver: every parameter's shards, views of what arrived and of this rank's own parameters."""
    shards: dict[str, list[Tensor]] = {}
    for source, entries in sorted(_contributions(transfer.piece, layout, layout.rank).items()):
        if source == layout.rank:
            parts = [named[entry.name] for entry in entries]
        else:
            sizes = [torch.Size(entry.shape).numel() for entry in entries]
            flat = transfer.shares[source].split(sizes)
            parts = [part.view(entry.shape) for part, entry in zip(flat, entries, strict=True)]
        for entry, part in zip(entries, parts, strict=True):
            shards.setdefault(entry.name, []).append(part)
    return shards


def _buckets(tensors: Sequence[HFTensor], bucket_bytes: int) -> Iterator[list[HFTensor]]:
    """A piece's tensors, cut further where it is one parameter that does not fit."""
    pending: list[HFTensor] = []
    for tensor in tensors:
        if pending and sum(other.size_bytes for other in pending) + tensor.size_bytes > bucket_bytes:
            yield pending
            pending = []
        pending.append(tensor)
    yield pending


def _packed(
    tensors: Sequence[HFTensor],
    arch: Architecture,
    shards: Mapping[str, Sequence[Tensor]],
    dtype: torch.dtype,
    buffers: BucketBuffers,
    capacity_bytes: int,
    quantise: bool,
) -> WeightBucket:
    """A bucket of these tensors, written straight from the shards."""
    device = next(iter(shards.values()))[0].device
    wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for tensor in tensors:
        if quantise and fp8.is_quantised(tensor.name):
            wanted += fp8.quantised_tensors(tensor.name, tensor.shape)
        else:
            wanted.append((tensor.name, tensor.shape, dtype))
    writer = BucketWriter(wanted, device, buffers, capacity_bytes=capacity_bytes)
    for tensor in tensors:
        parts = shards[tensor.entry.name]
        if quantise and fp8.is_quantised(tensor.name):
            whole = torch.empty(tensor.shape, dtype=dtype, device=device)
            write_hf(tensor.entry.name, arch, parts, tensor.index, whole)
            for result in fp8.quantise(whole):
                writer.write([result])
        else:
            writer.write(*hf_parts(tensor.entry.name, arch, parts, tensor.index))
    return writer.finish()
