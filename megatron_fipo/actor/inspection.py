"""What a directory of weights is, what it holds, and whether it is whole: told without loading a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_fipo.actor.checkpoint_files import (
    FORMAT,
    LATEST,
    MANIFEST,
    RUN_STATE,
    checkpoints_in,
    find_checkpoint,
    read_run_state,
    verify_checkpoint,
)
from megatron_fipo.actor.checkpoint_reading import CheckpointError, kind_of, shown
from megatron_fipo.actor.megatron_weights import find_megatron_checkpoint
from megatron_fipo.actor.torch_dist_files import StoredTensors, read_common
from megatron_fipo.weights.architecture import read_architecture, read_config
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes
from megatron_fipo.weights.shard_writing import INDEX_NAME, SAFETENSORS_DTYPES, SINGLE_NAME
from megatron_fipo.weights.source import is_finite
from megatron_fipo.weights.stored_names import EXTRA_STATE, OPTIMIZER_KEY, TRACKER

Kind = Literal["checkpoint of a run", "Megatron-LM checkpoint", "Hugging Face model"]
SAFETENSORS = SAFETENSORS_DTYPES | {
    "F64": torch.float64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Dtypes by safetensors' names: a quantised model holds more of them than a run can start from."""
SHOWN_ARGUMENTS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels padded_vocab_size "
    "untie_embeddings_and_output_weights add_qkv_bias qk_layernorm rotary_base num_experts moe_router_topk "
    "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size consumed_train_samples"
).split()


@dataclass
class Inspection:
    """What was found. `problems` says what is missing or damaged, one text for each; `verified` what --verify did."""

    kind: Kind
    directory: str
    iteration: int | str | None = None
    others: list[str] = field(default_factory=list)  # checkpoints beside it
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the model: name -> shape, dtype, size_bytes
    num_parameters: int = 0
    model_bytes: int = 0
    total_bytes: int = 0
    holds: dict[str, Any] = field(default_factory=dict)
    verified: str | None = None
    problems: list[str] = field(default_factory=list)


def find_any_checkpoint(path: str | Path) -> Path:
    """The torch_dist directory that `path` is or leads to: a run's --save directory, Megatron-LM's, or one in them.

    Raises CheckpointError saying what is there instead.
    """
    path = Path(path)
    if (path / FORMAT).is_file() or os.path.lexists(path / TRACKER):
        return find_megatron_checkpoint(path)
    if os.path.lexists(path / LATEST) or (path.is_dir() and checkpoints_in(path)):
        return find_checkpoint(path)
    return find_megatron_checkpoint(path)


def inspect(
    path: str | Path, *, verify: bool, advance: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Look at `path`; with `verify` read every byte of it. Raises ValueError where nothing of the kind is there."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist")
    if not path.is_dir():
        raise ValueError(f"{shown(path)} is {kind_of(path.stat().st_mode)}, but must be a directory")
    if (path / "config.json").is_file() or (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file():
        return _inspect_hf(path, verify, advance)
    return _inspect_torch_dist(path, find_any_checkpoint(path), verify, advance)


def _inspect_hf(path: Path, verify: bool, advance: Callable[[int, int], None]) -> Inspection:
    found = Inspection("Hugging Face model", shown(path), total_bytes=_size_of(path))
    arch = None
    try:
        quantization = read_config(path).get("quantization_config")
        if quantization is None:
            arch = read_architecture(path)
            found.holds["architecture"] = {
                name: str(value) if isinstance(value, torch.dtype) else value for name, value in vars(arch).items()
            }
        else:  # its tensors are not those of the architecture
            found.holds["quantization"] = quantization
    except ValueError as error:
        found.problems.append(str(error))
    found.holds["tokenizer"] = any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
    try:
        weights = HFWeights(path)
        if arch is not None:
            check_hf_shapes(arch, weights)
    except ValueError as error:
        found.problems.append(str(error))
        return found
    for name in weights.names:
        if weights.dtype_name(name) not in SAFETENSORS:
            found.problems.append(f"{name} has dtype {weights.dtype_name(name)}, which is not known here")
            continue
        found.tensors[name] = _described(weights.shape(name), SAFETENSORS[weights.dtype_name(name)])
    _count(found)
    if verify:
        _read_all(found, weights.read_stored, advance)
    return found


def _inspect_torch_dist(path: Path, directory: Path, verify: bool, advance: Callable[[int, int], None]) -> Inspection:
    is_run = (directory / RUN_STATE).is_file()
    found = Inspection(
        "checkpoint of a run" if is_run else "Megatron-LM checkpoint", shown(directory), total_bytes=_size_of(directory)
    )
    siblings = checkpoints_in(path) if is_run else sorted(path.glob("iter_*"))
    found.others = sorted(other.name for other in siblings if other != directory)
    stored = StoredTensors(directory)
    for key in sorted(stored.tensors):
        if not OPTIMIZER_KEY.match(key):
            found.tensors[key] = _described(stored.shape(key), stored.dtype(key))
    _count(found)
    moments = [key for key in stored.tensors if OPTIMIZER_KEY.match(key)]
    optimizer_bytes = sum(stored.num_bytes(key) for key in moments)
    found.holds["optimizer"] = {"tensors": len(moments), "bytes": optimizer_bytes} if moments else None
    for name, least in sorted(stored.files().items()):
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size is None:
            found.problems.append(f"{shown(directory / name)} is missing")
        elif size < least:
            found.problems.append(f"{shown(directory / name)} has {size} bytes, but must have {least}")
    objects = {key.partition("/")[0] for key in stored.objects}
    found.holds["random states"] = "rng_state" in objects or any(directory.glob("rng_*.pt"))
    found.holds["other objects"] = sorted(key for key in objects if not key.endswith((EXTRA_STATE, "rng_state")))
    _look_at_settings(found, directory, stored, is_run)
    if not verify:
        return found
    if (directory / MANIFEST).is_file() or is_run:
        try:
            verify_checkpoint(directory, advance=advance)
            found.verified = "every file has the size and the SHA-256 of the manifest"
        except CheckpointError as error:
            found.problems.append(str(error))
    else:
        _read_all(found, stored.read, advance)
        for key in moments:
            try:
                stored.check(key)
            except CheckpointError as error:
                found.problems.append(str(error))
    return found


def _look_at_settings(found: Inspection, directory: Path, stored: StoredTensors, is_run: bool) -> None:
    try:
        common = read_common(stored)
    except CheckpointError as error:
        found.problems.append(str(error))
        return
    found.iteration = common.get("iteration")
    found.holds["scheduler"] = any(name in common for name in ("scheduler", "opt_param_scheduler"))
    args = common.get("args")
    if isinstance(args, argparse.Namespace):
        found.holds["arguments"] = {
            name: getattr(args, name) for name in SHOWN_ARGUMENTS if getattr(args, name, None) is not None
        }
    if not is_run:
        return
    try:
        state = read_run_state(directory)
    except CheckpointError as error:
        found.problems.append(str(error))
        return
    found.iteration = state["step"]
    trainer = state["trainer"] if isinstance(state["trainer"], dict) else {}
    collector = trainer.get("collector")
    waiting = collector.get("waiting") if isinstance(collector, dict) else None
    found.holds["run state"] = {
        "layout": state["layout"],
        "score": state.get("score"),
        "updates": trainer.get("num_updates"),
        "groups waiting": len(waiting) if isinstance(waiting, list) else None,
    }


def _read_all(found: Inspection, read: Callable[[str], torch.Tensor], advance: Callable[[int, int], None]) -> None:
    """Read every tensor of the model: what cannot be read, and what is not finite, is a problem."""
    broken = 0
    for done, name in enumerate(found.tensors, start=1):
        try:
            tensor = read(name)
            if not is_finite(tensor):
                found.problems.append(f"{name} holds numbers that are not finite")
        except ValueError as error:
            broken += 1
            found.problems.append(str(error))
        advance(done, len(found.tensors))
    if not broken:
        found.verified = "every tensor of the model can be read; there is no manifest of hashes to compare with"


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    size = torch.Size(shape).numel() * dtype.itemsize
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "size_bytes": size}


def _count(found: Inspection) -> None:
    for tensor in found.tensors.values():
        found.num_parameters += torch.Size(tensor["shape"]).numel()
        found.model_bytes += tensor["size_bytes"]


def _size_of(directory: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(directory) if entry.is_file())
