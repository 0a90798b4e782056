"""Checkpoints from one form to the other: Hugging Face's safetensors, Megatron-LM's torch_dist. One process, no ranks.

A stream of parameters each way: what is held at a time is one parameter and, of safetensors, one shard.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.checkpoint_files import FORMAT, METADATA, RUN_STATE, verify_checkpoint
from megatron_fipo.actor.checkpoint_reading import CheckpointError, reason, shown
from megatron_fipo.actor.megatron_weights import RELEASE, MegatronWeights, place_in_model
from megatron_fipo.actor.torch_dist_files import TorchDistWriter
from megatron_fipo.config import require
from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import (
    Architecture,
    check_layout,
    hf_shapes,
    padded_vocab_size,
    read_architecture,
)
from megatron_fipo.weights.hf_files import HFWeights, check_hf_shapes, sync_to_disk, write_hf_checkpoint
from megatron_fipo.weights.mapping import checked_stream, expected_megatron_names, shard_from_hf
from megatron_fipo.weights.megatron_arguments import to_arguments
from megatron_fipo.weights.source import is_finite
from megatron_fipo.weights.stored_names import TRACKER, extra_states, places_to_write

CHECKPOINT_VERSION = 3.0  # Megatron-LM's, since 2020
LARGEST_MULTIPLE = 2**20  # rows that padding the vocabulary may cost

Advance = Callable[[int, int], None]
"""Called with how many tensors are done, and of how many."""


def hf_to_megatron(
    hf_dir: str | Path,
    save_dir: str | Path,
    *,
    tp_size: int = 1,
    vocab_divisible_by: int = 128,
    dtype: torch.dtype | None = None,
    advance: Advance = lambda done, total: None,
) -> Path:
    """Write the model in `hf_dir` as a Megatron-LM checkpoint, `save_dir`/release; its directory.

    `tp_size` and `vocab_divisible_by` decide how far the vocabulary is padded, and nothing else: any layout loads the
    result. `dtype` None: the files' own. Raises ValueError, naming file and field, for what cannot be converted, and
    for a `save_dir` that holds anything; nothing is left there then.
    """
    arch, weights = read_architecture(hf_dir), HFWeights(hf_dir)
    require(tp_size >= 1, "--tensor-model-parallel-size", tp_size, ">= 1")
    check_layout(arch, ParallelLayout(tp=tp_size, etp=tp_size, sequence_parallel=True))
    flag = "--make-vocab-size-divisible-by"
    require(1 <= vocab_divisible_by <= LARGEST_MULTIPLE, flag, vocab_divisible_by, f">= 1 and <= {LARGEST_MULTIPLE}")
    _require_outside(Path(save_dir))
    check_hf_shapes(arch, weights)
    dtype = dtype or single_dtype(weights, hf_shapes(arch))
    padded_vocab = padded_vocab_size(arch.vocab_size, tp_size, vocab_divisible_by)
    names = expected_megatron_names(arch, range(arch.num_layers), first_stage=True, last_stage=True)
    ordered = sorted(names, key=place_in_model)

    def write(aside: Path) -> None:
        writer = TorchDistWriter(aside / RELEASE)
        try:
            for done, name in enumerate(ordered, start=1):
                tensor = shard_from_hf(name, arch, weights, tp_rank=0, tp_size=1, padded_vocab=padded_vocab)
                tensor = _converted(f"{shown(weights.directory)}: {name}", tensor, dtype)
                for place in places_to_write(name, arch):
                    writer.add(place.key, tensor, place.index, place.stack)
                advance(done, len(ordered))
            for key in extra_states(arch):
                writer.add_object(key, None)
            writer.finish(_common_state(arch, dtype, tp_size, padded_vocab, vocab_divisible_by))
        finally:
            writer.close()
        (aside / TRACKER).write_text(RELEASE)

    _write_aside(Path(save_dir).absolute(), write)
    return Path(save_dir) / RELEASE


def megatron_to_hf(
    checkpoint: Path,
    hf_dir: str | Path,
    save_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 * 2**30,
    advance: Advance = lambda done, total: None,
) -> str | None:
    """Write the model in the torch_dist directory `checkpoint` as the Hugging Face directory `save_dir`. Returns what
    the user should know of it.

    Configuration and tokenizer are those of `hf_dir`, whose weights are not looked at. `dtype` None: the checkpoint's
    own. Raises ValueError listing what the checkpoint and `hf_dir`/config.json do not agree on, and as
    `write_hf_checkpoint` does.
    """
    arch = read_architecture(hf_dir)
    _require_outside(Path(save_dir))
    weights = MegatronWeights(checkpoint, arch)
    wanted = dtype or single_dtype(weights, hf_shapes(arch))

    def stream() -> Iterator[tuple[str, Tensor]]:
        total = len(weights.names)
        for done, (name, tensor) in enumerate(weights.hf_tensors(), start=1):
            yield name, _converted(f"{shown(checkpoint)}: {name}", tensor, wanted)
            advance(done, total)

    write_hf_checkpoint(save_dir, hf_dir, checked_stream(arch, stream()), max_shard_bytes=max_shard_bytes)
    return weights.note


def verify_run(checkpoint: Path, advance: Advance = lambda done, total: None) -> None:
    """Compare a run's checkpoint with its manifest, a file at a time; elsewhere there is none.

    Raises CheckpointError naming a file that is not as it was written.
    """
    if (checkpoint / RUN_STATE).is_file():
        verify_checkpoint(checkpoint, advance=advance)


def single_dtype(weights: HFWeights | MegatronWeights, names: Any) -> torch.dtype:
    """The dtype that all of these tensors have. Raises ValueError naming two that differ."""
    found: dict[torch.dtype, str] = {}
    for name in names:
        found.setdefault(weights.dtype(name), name)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise ValueError(
            f"{shown(weights.directory)} holds tensors of several dtypes ({first} {one}, {second} {other}): "
            "choose one with --dtype"
        )
    return next(iter(found))


def _common_state(
    arch: Architecture, dtype: torch.dtype, tp_size: int, padded_vocab: int, vocab_divisible_by: int
) -> dict[str, Any]:
    """What Megatron-LM looks for besides tensors, as its `generate_state_dict` has it."""
    arguments = to_arguments(arch) | {
        "max_position_embeddings": arch.max_position_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": 1,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": vocab_divisible_by,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_finite(tensor):
        raise CheckpointError(f"{name} holds a number that is not finite: a model with it answers nothing")
    converted = tensor.to(dtype)
    if not is_finite(converted):
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        short = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} holds {largest:g}, but --dtype {short} ends at {torch.finfo(dtype).max:g}")
    return converted


def _require_outside(save_dir: Path) -> None:
    """Raise ValueError where `save_dir` lies in a checkpoint, which would no longer be whole."""
    for directory in save_dir.resolve().parents:
        if (directory / FORMAT).is_file() and (directory / METADATA).is_file():
            raise ValueError(
                f"--save {shown(save_dir)} lies inside the checkpoint {shown(directory)}, but must lie outside of it"
            )


def _write_aside(save_dir: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a directory beside `save_dir`, then give it that name. Raises ValueError naming `save_dir`."""
    if os.path.lexists(save_dir) and (not save_dir.is_dir() or save_dir.is_symlink() or any(save_dir.iterdir())):
        raise ValueError(f"--save {shown(save_dir)} is there already, but must be absent or an empty directory")
    aside = save_dir.with_name(f".{save_dir.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed and had the same number
        (aside / RELEASE).mkdir(parents=True)
        write(aside)
        for path in (*(aside / RELEASE).iterdir(), aside / TRACKER, aside / RELEASE, aside):
            sync_to_disk(path)
        aside.rename(save_dir)
        sync_to_disk(save_dir.parent)
    except OSError as error:
        raise ValueError(f"--save {shown(save_dir)} cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
