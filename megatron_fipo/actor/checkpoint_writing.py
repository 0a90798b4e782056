"""A rank's part of a checkpoint: taken as a snapshot, planned together with the other ranks, then written alone.

megatron-core shards, plans and describes; files are written in this process, by whatever thread calls `write`. Its own
writers are forked from this many-threaded process and report through a manager process that survives a kill.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageInfo,
    _StoragePrefix,
    _StorageWriterTransforms,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_fipo.actor.checkpoint_files import COMMON, FORMAT, METADATA, CheckpointError
from megatron_fipo.actor.checkpoint_reading import reason, require_no_object

FILES_PER_RANK = 2
_PIECE_BYTES = 2**24  # between looks at whether the save was abandoned


class Abandoned(Exception):
    """The save was given up while a file of it was being written."""


@dataclass(frozen=True)
class Shard:
    """One file of tensors: what goes into it, in order. Tensors lie in main memory of this snapshot's own."""

    name: str
    items: list[tuple[WriteItem, torch.Tensor | io.BytesIO]]


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes. Later changes to the actor do not reach it."""

    shards: list[Shard]
    small_files: dict[str, bytes]
    metadata: Metadata | None  # rank 0: every tensor of every rank, not yet where it is stored


@dataclass(frozen=True)
class Written:
    """What this rank wrote and flushed: size and SHA-256 of each file, and where in it each piece of a tensor lies."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)


def take_snapshot(state: dict[str, Any], small_files: Mapping[str, bytes], control: dist.ProcessGroup) -> Snapshot:
    """Plan the checkpoint of `state` (megatron-core's sharded state) and copy this rank's part of it.

    What is not sharded must be the same on every rank. Collective over `control` (all ranks).
    """
    sharded, common = save_preprocess(state)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = _SnapshotWriter()
    (_, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(by_key, False),
        writer,
        control,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    files = dict(small_files)
    if control.rank() == 0:
        files[COMMON] = saved(common)
        files[FORMAT] = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
    return Snapshot(writer.shards, files, metadata)


def write(snapshot: Snapshot, directory: Path, abandoned: threading.Event) -> Written:
    """Write this rank's files into `directory`, each flushed to the disk; no collective, so any thread may call it.

    Raises CheckpointError naming the file that cannot be written, and Abandoned soon after that event is set.
    """
    written = Written()
    for name, content in snapshot.small_files.items():
        written.entries[name] = write_file(directory / name, content, abandoned)
    for shard in snapshot.shards:
        with _HashedFile(directory / shard.name, abandoned) as stream:
            for item, data in shard.items:
                result = filesystem_async._write_item(
                    _StorageWriterTransforms(), stream, data, item, shard.name, SerializationFormat.TORCH_SAVE
                )
                written.places[result.index] = result.storage_data
        written.entries[shard.name] = stream.entry()
    return written


def write_metadata(directory: Path, metadata: Metadata, everywhere: Sequence[Written]) -> dict[str, Any]:
    """Write `.metadata`, where every rank's tensors lie; its entry for the manifest. Raises CheckpointError."""
    metadata.storage_data = {index: place for written in everywhere for index, place in written.places.items()}
    return write_file(directory / METADATA, pickle.dumps(metadata, protocol=4), threading.Event())


def write_file(path: Path, content: bytes, abandoned: threading.Event) -> dict[str, Any]:
    """Write a new file and flush it to the disk; its entry for the manifest. Raises CheckpointError and Abandoned."""
    with _HashedFile(path, abandoned) as stream:
        stream.write(content)
    return stream.entry()


def saved(value: Any) -> bytes:
    """`value` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _SnapshotWriter:
    """What megatron-core's planning asks of a storage writer: it names this rank's files and copies what is to go in.

    Consumes the live tensors; waits for the device; afterwards training may go on.
    """

    can_run_decentralized_global_plan = True

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        for items in filesystem_async._split_by_size_and_type(FILES_PER_RANK, plan.items):
            if items:
                name = f"{plan.storage_data.prefix}{len(self.shards)}.distcp"
                self.shards.append(Shard(name, [(item, self._copied(item, planner)) for item in items]))

    def _copied(self, item: WriteItem, planner: SavePlanner) -> torch.Tensor | io.BytesIO:
        data = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            require_no_object(data.getvalue(), item.index.fqn)
            return data
        return data.detach().to("cpu", copy=True)


class _HashedFile:
    """A new file that knows the size and the hash of what went into it and, when left, is on the disk."""

    def __init__(self, path: Path, abandoned: threading.Event) -> None:
        self.path = path
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._abandoned = abandoned
        self._file: BinaryIO | None = None
        self._failure: Exception | None = None  # torch.save says of a failed write only that it failed

    def __enter__(self) -> _HashedFile:
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {reason(error)}") from error
        return self

    def write(self, data: bytes | memoryview) -> int:
        assert self._file is not None, "written to before it is opened"
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _PIECE_BYTES):
                if self._abandoned.is_set():
                    raise Abandoned
                piece = view[start : start + _PIECE_BYTES]
                self._digest.update(piece)
                self._file.write(piece)
        except (OSError, Abandoned) as error:
            self._failure = self._failure or error
            raise
        self.size_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        """torch.save calls it after every tensor; what is buffered goes out when the file is left."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as failed:
            self._failure = self._failure or failed
        if isinstance(self._failure, Abandoned):
            raise self._failure from error
        if self._failure is None and isinstance(error, (OSError, RuntimeError, MemoryError)):
            self._failure = error
        if self._failure is not None:
            raise CheckpointError(f"{self.path} cannot be written: {reason(self._failure)}") from self._failure

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        return {"size_bytes": self.size_bytes, "sha256": self._digest.hexdigest()}
