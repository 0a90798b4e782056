"""Safetensors files, written one tensor after the other in any order: what is held at a time is a tensor, not a file.

The library writes a file from all of its tensors at once. The format is simple enough to do without: the length of the
header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    max_shard_bytes: int,
) -> torch.dtype:
    """Write the stream as safetensors, with an index if there is more than one file. Returns the tensors' dtype.

    `shapes` are all tensors that will come, in the order of the files; they may come in another one, and all share one
    dtype. A file holds at most `max_shard_bytes`, or one tensor.
    """
    slots: dict[str, tuple[Path, int]] = {}  # where tensors go that have not come yet: the file, from which byte on
    dtype: torch.dtype | None = None
    for name, tensor in tensors:
        if dtype is None:
            dtype = tensor.dtype
            slots = _begin(directory, shapes, dtype, max_shard_bytes)
        assert name in slots, f"{name} exported twice, or not of the model"
        assert tensor.dtype == dtype, f"an export of mixed dtypes: {name} is {tensor.dtype} among {dtype}"
        assert tuple(tensor.shape) == shapes[name], f"{name} is {list(tensor.shape)}, but must be {shapes[name]}"
        path, start = slots.pop(name)
        with path.open("r+b") as file:
            file.seek(start)
            file.write(tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy())
    assert dtype is not None, "an export without tensors"
    assert not slots, f"an export without {sorted(slots)[:8]}"
    return dtype


def _begin(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, tuple[Path, int]]:
    """Write the headers and the index; where each tensor's bytes belong."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _split(sizes, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [SINGLE_NAME]
    else:
        weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    slots: dict[str, tuple[Path, int]] = {}
    for names, file in zip(shards, files, strict=True):
        header, starts = _header({name: shapes[name] for name in names}, sizes, dtype)
        (directory / file).write_bytes(header)
        slots |= {name: (directory / file, len(header) + start) for name, start in starts.items()}
    return slots


def _header(
    shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, int], dtype: torch.dtype
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file with these tensors, and where behind it each begins."""
    code = next(code for code, known in SAFETENSORS_DTYPES.items() if known == dtype)
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + sizes[name]
        described[name] = {"dtype": code, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes, as the library has it
    return len(text).to_bytes(8, "little") + text, starts


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The names, file by file."""
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
