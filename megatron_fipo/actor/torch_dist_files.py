"""torch_dist checkpoints read and written tensor by tensor in one plain process: no ranks, no megatron-core, no model.

Reading trusts no file: `.metadata` goes through our own parser, tensors through torch's restricted unpickler, what is
not a tensor through the list of classes below, none of which is ever called.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fipo.actor.checkpoint_files import COMMON, FORMAT, METADATA
from megatron_fipo.actor.checkpoint_reading import (
    CheckpointError,
    FilePart,
    load_tensors,
    open_file,
    read_bytes,
    read_json,
    reason,
    shown,
)
from megatron_fipo.actor.metadata_pickle import parse_metadata

COMMON_STATE = "common_state/shard_0_1"  # newer writers' common.pt, an object among the tensors
MAX_METADATA_BYTES = 2**31
MAX_FILE_BYTES = 2**32

INERT_CLASSES = re.compile(
    r"megatron\.(core|training|legacy)(\.\w+)*\.enums\.\w+"
    r"|megatron\.core\.optimizer(\.optimizer_config)?\.\w+Config"
    r"|megatron\.core\.rerun_state_machine\.Rerun\w+"
    r"|megatron\.core\.transformer\.pipeline_parallel_layer_layout\.PipelineParallelLayerLayout"
    r"|signal\.(Signals|Handlers)|pathlib\.(Posix|Pure|PurePosix)?Path|datetime\.timedelta"
)
"""Classes that Megatron-LM's arguments hold values of. What is read in their place is an `Inert`."""


class Inert:
    """A value of a class of Megatron-LM's: what it was made from, and nothing that could run."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"<{', '.join(map(str, self.values)) or 'object'}>"


class StoredTensors:
    """The tensors of one torch_dist directory, by the keys they are saved under, each whole whatever layout saved it.

    Raises CheckpointError naming the file when a piece of it is missing, damaged or not as torch writes it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        form = read_json(directory / FORMAT)
        if form.get("sharded_backend") != "torch_dist":
            found = ascii(form.get("sharded_backend"))[:100]
            raise CheckpointError(
                f"{shown(directory / FORMAT)} says sharded_backend {found}, but must say 'torch_dist'"
            )
        path = directory / METADATA
        self._metadata = parse_metadata(read_bytes(path, MAX_METADATA_BYTES), shown(path))
        described = self._metadata.state_dict_metadata
        self.tensors = {key: v for key, v in described.items() if isinstance(v, TensorStorageMetadata)}
        self.objects = sorted(key for key, v in described.items() if isinstance(v, BytesStorageMetadata))
        self._checked: set[tuple[Path, int]] = set()  # the pieces whose sums were compared
        self._pieces: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def num_bytes(self, key: str) -> int:
        """In the files, without their frames."""
        return self.tensors[key].size.numel() * self.dtype(key).itemsize

    def files(self) -> dict[str, int]:
        """The files that hold tensors and objects, with the sizes they must at least have."""
        ends: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return ends

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """The tensor `key`, or what of it lies at `index` of its first dimensions, in memory of its own."""
        shape, lead = self.shape(key), tuple(index)
        if torch.Size(shape).numel() == 0:
            return torch.empty(shape[len(lead) :], dtype=self.dtype(key))
        whole: Tensor | None = None
        for piece in self._pieces_at(key, lead):
            content = self._read_piece(key, piece)
            offsets, sizes = tuple(piece.offsets), tuple(piece.sizes)
            for position, start in zip(lead, offsets):
                content = content[position - start]
            if sizes[len(lead) :] == shape[len(lead) :]:
                return content.clone() if content.untyped_storage().nbytes() > content.nbytes else content
            if whole is None:
                whole = torch.empty(shape[len(lead) :], dtype=content.dtype)
            places = zip(offsets[len(lead) :], sizes[len(lead) :])
            whole[tuple(slice(start, start + size) for start, size in places)] = content
        assert whole is not None, f"{key} at {lead}: the metadata was checked to have all pieces"
        return whole

    def check(self, key: str) -> None:
        """Read the tensor `key` piece by piece, and keep none."""
        for piece in self.tensors[key].chunks:
            self._read_piece(key, piece)

    def read_object(self, key: str) -> Any:
        """An object that lies among the tensors: plain data, tensors and `Inert` values."""
        place = self._metadata.storage_data[MetadataIndex(key)]
        path = self.directory / place.relative_path
        with self._opened(path, key, place.offset + place.length) as stream:
            content = FilePart(stream, place.offset, place.length).read()
        return read_plain(content, f"{key} in {shown(path)}")

    def _pieces_at(self, key: str, lead: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The pieces that hold a part of what lies at `lead`. A stacked tensor may have thousands of others."""
        table = self._pieces.get((key, len(lead)))
        if table is None:
            table = self._pieces[key, len(lead)] = {}
            for piece in self.tensors[key].chunks:
                spans = [range(o, o + s) for o, s in zip(piece.offsets[: len(lead)], piece.sizes[: len(lead)])]
                for place in _product(spans):
                    table.setdefault(place, []).append(piece)
        return table[lead]

    def _read_piece(self, key: str, piece: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(key, piece.offsets)]
        path = self.directory / place.relative_path
        name = f"{key} in {shown(path)}"
        with self._opened(path, key, place.offset + place.length) as stream:
            part = FilePart(stream, place.offset, place.length)
            tensor = load_tensors(part, place.length, name, check_sums=(path, place.offset) not in self._checked)
            self._checked.add((path, place.offset))
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{name} is no plain tensor")
        if tuple(tensor.shape) != tuple(piece.sizes) or tensor.dtype != self.dtype(key):
            raise CheckpointError(f"{name} is {list(tensor.shape)} {tensor.dtype}, which is not what {METADATA} says")
        return tensor

    def _opened(self, path: Path, key: str, end: int) -> Any:
        try:
            stream = open_file(path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{shown(path)} is missing") from error
        if end > os.fstat(stream.fileno()).st_size:
            stream.close()
            raise CheckpointError(f"{shown(path)} ends before {key} does")
        return stream


def read_common(stored: StoredTensors) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, the same for all ranks: `args`, `iteration` ... Raises CheckpointError
    naming the file, and a class that does not belong there."""
    path = stored.directory / COMMON
    if not path.exists() and COMMON_STATE in stored.objects:
        found = stored.read_object(COMMON_STATE)
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
    else:
        found = read_plain(read_bytes(path, 2**28), shown(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{shown(path)} holds no dictionary of settings")
    return found


def read_plain(content: bytes, name: str) -> Any:
    """What torch.save wrote, of plain data, tensors, argparse's Namespace and `INERT_CLASSES` alone.

    Raises CheckpointError beginning with `name` and naming any other class.
    """
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except (RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)}") from error
    known: list[Any] = []
    for found in asked:
        if found in ("argparse.Namespace", "types.SimpleNamespace"):
            known.append(argparse.Namespace if found.startswith("argparse") else types.SimpleNamespace)
        elif INERT_CLASSES.fullmatch(found):
            known.append((Inert, found))
        else:
            raise CheckpointError(
                f"{name} holds {ascii(found)[1:-1][:200]}, which is no part of a checkpoint's settings"
            )
    with torch.serialization.safe_globals(known):
        return load_tensors(io.BytesIO(content), len(content), name, check_sums=True)


class TorchDistWriter:
    """Writes a torch_dist directory one piece after the other; `finish` makes it a checkpoint.

    OSErrors (a full disk) are the caller's: what is there without `finish` is no checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata = Metadata({}, storage_data={})
        self._file: BinaryIO | None = None
        self._num_files = 0

    def add(self, key: str, tensor: Tensor, index: Sequence[int] = (), stack: Sequence[int] = ()) -> None:
        """Write `tensor` as the part at `index` of the leading dimensions `stack` of the whole tensor `key`."""
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes all the memory that a view is part of
        piece = tensor.view(*(1 for _ in index), *tensor.shape)
        offsets = torch.Size((*index, *(0 for _ in tensor.shape)))
        known = self._metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size((*stack, *tensor.shape)), [])
        )
        assert isinstance(known, TensorStorageMetadata), key
        assert known.size == (*stack, *tensor.shape), (key, known.size, stack, tensor.shape)
        known.chunks.append(ChunkStorageMetadata(offsets, piece.shape))
        self._write(piece, MetadataIndex(key, offsets))

    def add_object(self, key: str, value: Any) -> None:
        """Write an object, as megatron-core does: in a list."""
        self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
        self._write([value], MetadataIndex(key))

    def finish(self, common: dict[str, Any]) -> None:
        """Write what is no tensor, and the description, last."""
        self._close()
        with (self.directory / COMMON).open("xb") as file:
            _save(common, file)
        (self.directory / FORMAT).write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        (self.directory / METADATA).write_bytes(pickle.dumps(self._metadata, protocol=4))

    def close(self) -> None:
        """Close what is open. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, value: Any, index: MetadataIndex) -> None:
        if self._file is None or self._file.tell() > MAX_FILE_BYTES:
            self._close()
            self._file = (self.directory / f"__0_{self._num_files}.distcp").open("xb")
            self._num_files += 1
        start = self._file.tell()
        _save(value, self._file)
        length = self._file.tell() - start
        name = Path(self._file.name).name
        self._metadata.storage_data[index] = _StorageInfo(name, start, length)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()


def _save(value: Any, file: BinaryIO) -> None:
    watched = _FirstError(file)
    try:
        torch.save(value, watched)
    except RuntimeError:
        if watched.error is not None:
            raise watched.error from None  # torch says of a failed write only that it failed
        raise


class _FirstError(io.RawIOBase):
    """A file that remembers why a write to it failed: an OSError, or the user's interruption."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | KeyboardInterrupt | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except (OSError, KeyboardInterrupt) as error:
            self.error = self.error or error
            raise


def _product(spans: Sequence[range]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for span in spans:
        places = [(*place, number) for place in places for number in span]
    return places
