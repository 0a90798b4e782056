"""What the tests of failing saves and incomplete checkpoints run on every rank."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from actor_on_ranks import make_actor, make_groups
from checkpoint_on_disk import reseal
from checkpoint_on_ranks import error_of, train_steps
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.checkpoint import load_checkpoint
from megatron_fipo.actor.checkpoint_files import (
    CheckpointError,
    find_checkpoint,
    find_valid_checkpoint,
    read_run_state,
    verify_checkpoint_together,
)
from megatron_fipo.actor.checkpoint_saver import CheckpointSaver


def run_fault_checks(model_dir: str, root: str) -> dict[str, Any]:
    """Every check of this file on the ranks of one launch."""
    actor = make_actor(model_dir, *make_groups(tp=2))
    train_steps(actor, range(1))
    saver = CheckpointSaver(actor, f"{root}/whole", say=print)
    saver.save(1, {"position": 7})
    assert saver.poll() is None
    saver.close()
    source = find_checkpoint(f"{root}/whole")
    found = {"missing": {name: missing(actor, source, Path(root) / name, edit) for name, edit in EDITS.items()}}
    found["full"] = {
        "sync": full_disk(actor, f"{root}/full", is_async=False),
        "async": full_disk(actor, f"{root}/full_async", is_async=True),
    }
    found["fallback"] = fallback(source, Path(root) / "fallback")
    found["closed"] = closed(actor, f"{root}/closed")
    found["overlapping"] = overlapping(actor, f"{root}/overlapping")
    return found


def missing(actor: Actor, source: Path, root: Path, edit: Callable[[Path], object]) -> str:
    """Why an edited checkpoint with a true manifest is refused, on this rank."""
    directory = root / source.name
    if dist.get_rank() == 0:
        shutil.copytree(source, directory)
        edit(directory)
        reseal(directory)
    dist.barrier()

    def load() -> None:
        verify_checkpoint_together(directory)
        read_run_state(directory)
        load_checkpoint(actor, directory)

    return error_of(load)


def without(name: str, *keys: Any) -> Callable[[Path], None]:
    """The edit that takes an entry out of nested JSON or of what torch.save wrote."""

    def edit(directory: Path) -> None:
        path = directory / name
        is_json = path.suffix == ".json"
        value = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
        inner = value
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        if is_json:
            path.write_text(json.dumps(value))
        else:
            torch.save(value, path)

    return edit


def metadata_edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """An edit of torch_dist's description of the tensors."""

    def edit(directory: Path) -> None:
        path = directory / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return edit


def without_tensor(metadata: Any) -> None:
    del metadata.state_dict_metadata["optimizer.state.exp_avg.decoder.final_layernorm.weight"]


def without_piece(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.pop()


def other_shape(metadata: Any) -> None:
    tensor = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    tensor.size = torch.Size([20])
    tensor.chunks[0].__dict__["sizes"] = torch.Size([20])


def as_bytes(metadata: Any) -> None:
    """A tensor that the description calls bytes, which torch would unpickle freely."""
    (key,) = [name for name in metadata.state_dict_metadata if name == "decoder.final_layernorm.weight"]
    extra = next(v for v in metadata.state_dict_metadata.values() if not isinstance(v, TensorStorageMetadata))
    metadata.state_dict_metadata[key] = extra


def with_object(directory: Path) -> None:
    """A layer's extra state that holds something to unpickle."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if "_extra_state" in index.fqn)
    place = metadata.storage_data[index]
    buffer = io.BytesIO()
    torch.save([torch.ones(3, dtype=torch.uint8)], buffer)
    path = directory / place.relative_path
    place.offset, place.length = path.stat().st_size, len(buffer.getvalue())
    with path.open("ab") as handle:
        handle.write(buffer.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


EDITS: dict[str, Callable[[Path], object]] = {
    "random state": lambda directory: (directory / "rng_1.pt").unlink(),
    "cpu state": without("rng_1.pt", "cpu"),
    "tracker": without("rng_1.pt", "tracker"),
    "optimizer": without("common.pt", "optimizer"),
    "param_groups": without("common.pt", "optimizer", "optimizer", "param_groups"),
    "step": without("common.pt", "optimizer", "optimizer", "param_groups", 0, "step"),
    "scheduler": without("common.pt", "scheduler"),
    "num_steps": without("common.pt", "scheduler", "num_steps"),
    "lr_decay_style": without("common.pt", "scheduler", "lr_decay_style"),
    "common": lambda directory: (directory / "common.pt").unlink(),
    "format": lambda directory: (directory / "metadata.json").unlink(),
    "trainer": without("run_state.json", "trainer"),
    "layout": without("run_state.json", "layout"),
    "tp": without("run_state.json", "layout", "tp"),
    "model": without("run_state.json", "model"),
    "tensor": metadata_edit(without_tensor),
    "piece": metadata_edit(without_piece),
    "shape": metadata_edit(other_shape),
    "bytes": metadata_edit(as_bytes),
    "object": with_object,
}


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Every write beyond so many bytes of a file fails on this rank, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(actor: Actor, root: str, *, is_async: bool) -> dict[str, Any]:
    """Rank 1's disk is full in the second of three saves: what every rank is told, and what is left."""
    saver = CheckpointSaver(actor, root, is_async=is_async, say=print)
    saver.save(1, None)
    saver.finish()
    limit = 20_000 if dist.get_rank() == 1 else resource.RLIM_INFINITY

    def save() -> None:
        with file_size_limit(limit):
            saver.save(2, None)
            while is_async and saver.poll() is None:
                pass

    error = error_of(save)
    left = sorted(os.listdir(root))
    dist.barrier()
    saver.save(3, None)
    committed = saver.finish()
    saver.close()
    verify_checkpoint_together(find_checkpoint(root))
    return {
        "error": error,
        "left": left,
        "after": sorted(os.listdir(root)),
        "committed": None if committed is None else committed.name,
        "threads": [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"],
    }


def fallback(source: Path, root: Path) -> dict[str, Any]:
    """Three checkpoints, the latest damaged, then also the one before, then all: what is used, said and raised."""
    said: list[str] = []
    if dist.get_rank() == 0:
        for step in (1, 2, 3):
            directory = Path(shutil.copytree(source, root / f"step_000000{step}"))
            state = json.loads((directory / "run_state.json").read_text())
            (directory / "run_state.json").write_text(json.dumps({**state, "step": step}))
            reseal(directory)
        (root / "latest").write_text("step_0000003")
    dist.barrier()
    found = []

    def search() -> None:
        dist.barrier()
        found.append(find_valid_checkpoint(root, say=said.append).name)
        dist.barrier()

    def damage(step: int) -> None:
        if dist.get_rank() == 0:
            path = root / f"step_000000{step}" / "__1_0.distcp"
            path.write_bytes(path.read_bytes()[:-1])

    search()
    damage(3)
    search()
    damage(2)
    search()
    if dist.get_rank() == 0:
        (root / "latest").unlink()
    search()
    damage(1)
    return {"found": found, "said": said, "error": error_of(search)}


def closed(actor: Actor, root: str) -> dict[str, Any]:
    """A saver that is closed while it writes: what is left, and that the next one is not troubled."""
    saver = CheckpointSaver(actor, root, is_async=True, say=print)
    saver.save(1, None)
    saver.close()
    threads = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"]
    dist.barrier()
    left = sorted(os.listdir(root))
    dist.barrier()
    saver = CheckpointSaver(actor, root, is_async=True, say=print)
    saver.save(2, None)
    saver.finish()
    saver.close()
    dist.barrier()
    return {"left": left, "threads": threads, "after": sorted(os.listdir(root))}


def overlapping(actor: Actor, root: str) -> list[str]:
    """Saves that follow one another without a poll: each commits the one before. `latest` after every call."""
    saver = CheckpointSaver(actor, root, is_async=True, keep_last=2, keep_best=1, say=print)
    seen = []
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, None)):
        saver.save(step, None, score=score)
        latest = Path(root) / "latest"
        seen.append(latest.read_text() if latest.exists() else "")
        dist.barrier()
    saver.finish()
    saver.close()
    dist.barrier()
    return [*seen, *sorted(os.listdir(root))]


def fail_everywhere(model_dir: str, root: str, *, is_async: bool) -> dict[str, Any]:
    """One rank: every call that changes the file system fails in turn, then the next save must succeed.

    Outcomes by the name and number of the call: the error, and the step of `latest` after it.
    """
    actor = make_actor(model_dir, *make_groups())
    saver = CheckpointSaver(actor, root, is_async=is_async, keep_last=1, say=lambda line: None)
    saver.save(1, None)
    saver.finish()
    outcomes: dict[str, Any] = {}
    step = 1
    for name, function in (("rename", os.rename), ("fsync", os.fsync), ("mkdir", os.mkdir), ("open", io.open)):
        call, reached = 0, True
        while reached:
            call += 1
            before, step = step, step + 1
            with failing_call(name, function, call) as failed:
                error = error_of(lambda step=step: (saver.save(step, None), saver.finish()))  # type: ignore[misc]
            reached = failed != []
            at = read_run_state(find_checkpoint(root))["step"]
            verify_checkpoint_together(find_checkpoint(root))
            outcomes[f"{name} {call}"] = {"error": error, "at": at - before, "reached": reached, "path": failed}
            step = at
            step += 1
            saver.save(step, None)
            saver.finish()
            leftovers = [entry for entry in os.listdir(root) if entry.startswith(".")]
            assert not leftovers, leftovers
    saver.close()
    return outcomes


@contextmanager
def failing_call(name: str, function: Callable[..., Any], number: int) -> Iterator[list[str]]:
    """Make the `number`-th of these calls fail as a broken disk does; what it was called with."""
    failed: list[str] = []
    count = 0

    def call(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        is_write = name != "open" or "x" in str(arguments[1:2]) + str(keywords.get("mode"))
        count += is_write
        if is_write and count == number and not failed:
            failed.append(str(arguments[0]))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*arguments, **keywords)

    module: Any = io if name == "open" else os
    setattr(module, name, call)
    try:
        yield failed
    finally:
        setattr(module, name, function)


def run_failing_calls(model_dir: str, root: str) -> dict[str, Any]:
    """`fail_everywhere` for both ways of saving."""
    found = {"sync": fail_everywhere(model_dir, f"{root}/sync", is_async=False)}
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    return {**found, "async": fail_everywhere(model_dir, f"{root}/async", is_async=True)}


__all__ = ["CheckpointError", "run_failing_calls", "run_fault_checks"]
