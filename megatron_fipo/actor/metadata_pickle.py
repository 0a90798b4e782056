"""torch_dist's `.metadata` is a pickle. It is read here by a machine that knows only what such a file is made of.

Python's unpickler would call any callable the file names, set attributes on classes, and fill memory or overflow the
stack at the wish of a few bytes. This one builds tensor descriptions and nothing else; its memory is bounded by the
file's size.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fipo.actor.checkpoint_reading import CheckpointError, reason

SHARD_NAME = re.compile(r"__\d{1,9}_\d{1,9}\.distcp", re.ASCII)
_MAX_TUPLE = 64  # sizes and offsets have as many entries as a tensor has dimensions


def parse_metadata(content: bytes, name: str) -> Metadata:
    """The description of tensors in `content`. Nothing in it is called, and no attribute of a class is set.

    Raises CheckpointError beginning with `name`, the file's, for a class that does not belong there, by that class's
    name, and for anything else that such a file does not hold.
    """
    try:
        return _checked(_Machine(name).run(content), name)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{name} is not a checkpoint's metadata: {reason(error)}") from error


class _Mark:
    """Where a run of values on the stack begins."""


class _Inert:
    """What a checkpoint may hold but nobody needs: the plans of the ranks that wrote it, and where it was written."""


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_memoized = 0

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        (result,) = self.stack
        return result

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _LITERALS:
            stack.append(_LITERALS[opcode] if argument is None else argument)
        elif opcode in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[self.num_memoized if opcode == "MEMOIZE" else argument] = stack[-1]
            self.num_memoized += 1
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in _CONTAINERS:
            stack.append(_CONTAINERS[opcode]())
        elif opcode in _TUPLES:
            num = _TUPLES[opcode]
            values = self._popped_to_mark() if num is None else [stack.pop() for _ in range(num)][::-1]
            if len(values) > _MAX_TUPLE:
                raise ValueError(f"a tuple of {len(values)} entries")
            stack.append(tuple(values))
        elif opcode in ("SETITEM", "SETITEMS", "DICT"):
            self._set_items(opcode)
        elif opcode in ("APPEND", "APPENDS", "LIST"):
            values = [stack.pop()] if opcode == "APPEND" else self._popped_to_mark()
            if opcode == "LIST":
                stack.append([])
            if type(stack[-1]) is not list:
                raise ValueError("an entry for what is no list")
            stack[-1].extend(values)
        elif opcode == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._known(module, attribute))
        elif opcode in ("GLOBAL", "INST"):
            stack.append(self._known(*argument.split(" ", 1)))
        elif opcode in ("NEWOBJ", "REDUCE"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_made(function, arguments, is_call=opcode == "REDUCE"))
        elif opcode == "BUILD":
            state = stack.pop()
            _fill(stack[-1], state)
        elif opcode not in ("PROTO", "FRAME"):
            raise ValueError(f"pickle's {opcode} has no place in it")

    def _popped_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while type(value := self.stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def _set_items(self, opcode: str) -> None:
        if opcode == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            flat = [key, value]
        else:
            flat = self._popped_to_mark()
        if opcode == "DICT":
            self.stack.append({})
        target = self.stack[-1]
        if type(target) is not dict or len(flat) % 2:
            raise ValueError("an item for what is no dictionary")
        for key, value in zip(flat[::2], flat[1::2]):
            if type(key) is MetadataIndex:
                _require(vars(key).keys() == {"fqn", "offset", "index"}, "an unfinished index as a key")
            elif type(key) is not str:
                raise ValueError(f"a key of type {type(key).__name__}")
            target[key] = value

    def _known(self, module: Any, attribute: Any) -> Any:
        known = _KNOWN.get((module, attribute)) if type(module) is str and type(attribute) is str else None
        if known is None and module == "torch" and type(attribute) is str and attribute.isidentifier():
            found = vars(torch).get(attribute)
            known = found if isinstance(found, torch.dtype) else None
        if known is None:
            what = ascii(f"{module}.{attribute}")[1:-1][:200]
            raise CheckpointError(f"{self.name} holds {what}, which is no part of a checkpoint's metadata")
        return known


def _made(function: Any, arguments: Any, *, is_call: bool) -> Any:
    """What pickle's NEWOBJ (an empty instance) and REDUCE (a call) make of the few names that may be used so."""
    _require(type(arguments) is tuple, "arguments that are no tuple")
    if function is _Inert:
        return _Inert()
    if not is_call and isinstance(function, type) and function in _FIELDS and arguments == ():
        return object.__new__(function)
    if is_call and function in _CALLS and len(arguments) == 1:
        return _CALLS[function](arguments[0])
    raise ValueError(f"a use of {getattr(function, '__name__', type(function).__name__)} that it does not have")


def _fill(instance: Any, state: Any) -> None:
    """Give an empty instance its fields, each of the type it has in every such file."""
    if type(instance) is _Inert:
        return
    fields = _FIELDS.get(type(instance))
    _require(fields is not None and vars(instance) == {}, "a state for what takes none")
    assert fields is not None
    if type(instance) is TensorProperties:
        _require(type(state) is tuple and len(state) == 5, "the properties of a tensor")
        state = dict(zip(("dtype", "layout", "requires_grad", "memory_format", "pin_memory"), state))
    _require(type(state) is dict and state.keys() <= fields.keys(), f"the fields of {type(instance).__name__}")
    for name, is_fit in fields.items():
        value = state.get(name)
        _require(is_fit(value), f"{type(instance).__name__}.{name}")
        vars(instance)[name] = value


def _checked(metadata: Any, name: str) -> Metadata:
    """The parts of it that loading uses, after a look at whether they agree."""
    _require(type(metadata) is Metadata and vars(metadata) != {}, "it is another object")
    for index, place in metadata.storage_data.items():
        _require(type(index) is MetadataIndex and type(place) is _StorageInfo and vars(place) != {}, "a storage entry")
        if not SHARD_NAME.fullmatch(place.relative_path):
            raise CheckpointError(f"{name} points at {ascii(place.relative_path)[:200]}, which is no shard beside it")
        _require(not place.transform_descriptors, "a transformed shard")
    for key, description in metadata.state_dict_metadata.items():
        _require(type(key) is str, "the name of a tensor")
        if type(description) is TensorStorageMetadata:
            _check_tensor(key, description, metadata.storage_data, name)
        else:
            _require(type(description) is BytesStorageMetadata, "a description of a tensor")
    return Metadata(metadata.state_dict_metadata, storage_data=metadata.storage_data)


def _check_tensor(key: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, Any], name: str) -> None:
    """The pieces must lie inside the tensor, be stored, and add up to it."""
    _require(vars(tensor).keys() == {"properties", "size", "chunks"}, "an unfinished tensor")
    num_elements, offsets = 0, set()
    for chunk in tensor.chunks:
        _require(type(chunk) is ChunkStorageMetadata and vars(chunk) != {}, "a piece of a tensor")
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.size) and all(
            start + length <= size for start, length, size in zip(chunk.offsets, chunk.sizes, tensor.size)
        )
        _require(inside and chunk.offsets not in offsets, "the place of a tensor's piece")
        offsets.add(chunk.offsets)
        num_elements += chunk.sizes.numel()
        if MetadataIndex(key, chunk.offsets) not in storage:
            raise CheckpointError(f"{name} says nowhere where a piece of {ascii(key)[:200]} is stored")
    if num_elements != tensor.size.numel():
        raise CheckpointError(
            f"{name} has {num_elements} of the {tensor.size.numel()} elements of {ascii(key)[:200]}: pieces are missing"
        )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not as torch writes it")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _size(value: Any) -> torch.Size:
    _require(type(value) is tuple and all(_is_count(entry) for entry in value), "a size")
    return torch.Size(value)


def _optional(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or type(value) is kind


def _exactly(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


_LITERALS: dict[str, Any] = {
    "MARK": _Mark(),
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    **dict.fromkeys(
        (
            "INT",
            "BININT",
            "BININT1",
            "BININT2",
            "LONG1",
            "LONG",
            "BINFLOAT",
            "SHORT_BINUNICODE",
            "BINUNICODE",
            "UNICODE",
        )
    ),
}
_CONTAINERS: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES: dict[str, int | None] = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_MODULE = "torch.distributed.checkpoint."
_KNOWN: dict[tuple[str, str], Any] = {
    (_MODULE + "metadata", "BytesStorageMetadata"): BytesStorageMetadata,
    (_MODULE + "metadata", "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_MODULE + "metadata", "Metadata"): Metadata,
    (_MODULE + "metadata", "MetadataIndex"): MetadataIndex,
    (_MODULE + "metadata", "StorageMeta"): _Inert,
    (_MODULE + "metadata", "TensorProperties"): TensorProperties,
    (_MODULE + "metadata", "TensorStorageMetadata"): TensorStorageMetadata,
    (_MODULE + "metadata", "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    (_MODULE + "filesystem", "_StorageInfo"): _StorageInfo,
    (_MODULE + "filesystem", "_StoragePrefix"): _Inert,
    (_MODULE + "planner", "SavePlan"): _Inert,
    (_MODULE + "planner", "TensorWriteData"): _Inert,
    (_MODULE + "planner", "WriteItem"): _Inert,
    (_MODULE + "planner", "WriteItemType"): _Inert,
    ("pathlib", "PosixPath"): _Inert,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


def _layout(value: Any) -> torch.layout:
    _require(value == "torch.strided", "a tensor's layout")
    return torch.strided


def _memory_format(value: Any) -> torch.memory_format:
    _require(type(value) is int and value == 0, "a tensor's memory format")
    return torch.contiguous_format


_CALLS: dict[Any, Callable[[Any], Any]] = {
    torch.Size: _size,
    torch.serialization._get_layout: _layout,
    _MEM_FORMAT_ENCODING: _memory_format,
}
_FIELDS: dict[type, dict[str, Callable[[Any], bool]]] = {
    Metadata: {
        "state_dict_metadata": _exactly(dict),
        "storage_data": _exactly(dict),
        "planner_data": lambda value: True,
        "storage_meta": lambda value: True,
        "version": _optional(str),
        "all_local_plans": lambda value: True,  # megatron-core's addition
    },
    TensorStorageMetadata: {
        "properties": _exactly(TensorProperties),
        "size": _exactly(torch.Size),
        "chunks": _exactly(list),
    },
    BytesStorageMetadata: {},
    ChunkStorageMetadata: {"offsets": _exactly(torch.Size), "sizes": _exactly(torch.Size)},
    MetadataIndex: {"fqn": _exactly(str), "offset": _optional(torch.Size), "index": _optional(int)},
    TensorProperties: {
        "dtype": _exactly(torch.dtype),
        "layout": _exactly(torch.layout),
        "requires_grad": _exactly(bool),
        "memory_format": _exactly(torch.memory_format),
        "pin_memory": _exactly(bool),
    },
    _StorageInfo: {
        "relative_path": _exactly(str),
        "offset": _is_count,
        "length": _is_count,
        "transform_descriptors": _optional(list),
    },
}
