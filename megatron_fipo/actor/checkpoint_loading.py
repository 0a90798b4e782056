"""How megatron-core's loading reads a checkpoint here: through a reader that trusts no file.

torch's own reader unpickles `.metadata` freely, opens whatever path is written in it, and unpickles, as freely, what
is called bytes there. The sharded state names what is wanted; all of it must be there, in the shapes wanted.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_fipo.actor.checkpoint_files import COMMON, FORMAT, MAX_METADATA_BYTES, METADATA, CheckpointError, agreed
from megatron_fipo.actor.checkpoint_reading import (
    FilePart,
    load_tensors,
    open_file,
    read_bytes,
    read_json,
    read_tensors,
    reason,
    require_no_object,
    shown,
)
from megatron_fipo.actor.metadata_pickle import parse_metadata


def load_sharded(
    state: dict[str, Any], directory: Path, group: dist.ProcessGroup, *, is_foreign: bool = False
) -> dict[str, Any]:
    """Load what `state` (megatron-core's sharded state) names from `directory`.

    A foreign checkpoint, Megatron-LM's own, may hold more than tensors and numbers, which is left alone. Raises
    CheckpointError on every rank: for what is missing, by its name, for what does not fit, and for files that are not
    as this program writes them. Collective over `group` (all ranks).
    """

    def prepare() -> _ShardReader:
        form = read_json(directory / FORMAT)
        known = asdict(CheckpointingConfig("torch_dist"))
        if form != known and not (is_foreign and form.get("sharded_backend") == known["sharded_backend"]):
            raise CheckpointError(
                f"{directory / FORMAT} says {ascii(form)[:200]}, which is not how checkpoints are saved"
            )
        path = directory / METADATA
        metadata = parse_metadata(read_bytes(path, MAX_METADATA_BYTES), shown(path))
        _require_all(state, metadata, directory)
        return _ShardReader(directory, metadata)

    reader: list[_ShardReader] = []
    agreed(lambda: reader.append(prepare()), group)
    common: list[dict[str, Any]] = []
    agreed(lambda: common.append({} if is_foreign else _common_state(directory)), group)
    try:
        with _reading_through(reader[0]):
            return dist_checkpointing.load(state, str(directory), common_strategy=_CommonState(common[0]))
    except CheckpointException as error:  # raised on every rank, with what each one's error was
        cause = next(iter(error.failures.values()))[0]
        known = isinstance(cause, CheckpointError)
        raise CheckpointError(
            str(cause) if known else f"{directory} does not fit this model: {reason(cause)}"
        ) from error
    except (CheckpointingException, RuntimeError, LookupError, ValueError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {reason(error)}") from error


def _common_state(directory: Path) -> dict[str, Any]:
    value = read_tensors(directory / COMMON)
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory / COMMON} holds no dictionary of settings")
    return value


def _require_all(state: dict[str, Any], metadata: Metadata, directory: Path) -> None:
    """Every tensor and object that `state` names must be in the checkpoint, and in the shape it has here."""
    wanted, _, _ = load_preprocess(state)
    for item in nested_values(wanted):
        if isinstance(item, ShardedTensor):
            found = metadata.state_dict_metadata.get(item.key)
            if not isinstance(found, TensorStorageMetadata):
                raise CheckpointError(f"{directory} holds no tensor {item.key}, which this run needs")
            if found.size != tuple(item.global_shape) and not item.allow_shape_mismatch:
                raise CheckpointError(
                    f"{directory} holds {item.key} of shape {list(found.size)}, but this run needs "
                    f"{list(item.global_shape)}"
                )
        elif isinstance(item, ShardedObject):
            found = metadata.state_dict_metadata.get(item.unique_key)
            if not isinstance(found, BytesStorageMetadata):
                raise CheckpointError(f"{directory} holds no object {item.unique_key}, which this run needs")


@contextmanager
def _reading_through(reader: _ShardReader) -> Iterator[None]:
    """megatron-core makes its reader itself."""
    assert hasattr(torch_strategy, "_get_filesystem_reader"), "megatron-core's torch_dist strategy has changed"
    before = torch_strategy._get_filesystem_reader
    torch_strategy._get_filesystem_reader = lambda *args, **kwargs: reader
    try:
        yield
    finally:
        torch_strategy._get_filesystem_reader = before


class _CommonState:
    """What megatron-core asks of a strategy for what is not sharded."""

    can_handle_sharded_objects = True

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def load_common(self, checkpoint_dir: str) -> dict[str, Any]:
        return self._state

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        pass

    def check_version_compatibility(self, loaded_version: int) -> None:
        pass


class _ShardReader:
    """What torch's distributed loading asks of a storage reader. `metadata` has come through `parse_metadata`."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self._directory = directory
        self._metadata = metadata

    def reset(self, checkpoint_id: str | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        """Read every item of the plan into the planner's tensors."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._metadata.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = self._directory / name
            try:
                with open_file(path) as stream:
                    for item in items:
                        self._read(item, path, stream, planner)
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is missing") from error
        done: Future = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, path: Path, stream: BufferedReader, planner: LoadPlanner) -> None:
        place = self._metadata.storage_data[item.storage_index]
        name = f"{item.storage_index.fqn} in {path}"
        if place.offset + place.length > os.fstat(stream.fileno()).st_size:
            raise CheckpointError(f"{path} ends before {item.storage_index.fqn} does")
        piece = FilePart(stream, place.offset, place.length)
        if item.type == LoadItemType.BYTE_IO:
            content = piece.read(-1)
            require_no_object(content, name)
            planner.load_bytes(item, io.BytesIO(content))  # unpickles freely, hence the look before
            return
        tensor = load_tensors(piece, place.length, name)
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{name} is no plain tensor")
        target = planner.resolve_tensor(item).detach()
        try:
            part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}: {reason(error)}") from error
        if part.shape != target.shape:
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, which is not the one in {METADATA}")
        target.copy_(part)
        planner.commit_tensor(item, target)
