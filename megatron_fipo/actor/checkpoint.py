"""Training state as a Megatron torch_dist checkpoint: written aside, sealed by a manifest, committed by a rename."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.safe_globals import register_safe_globals

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.model import unwrapped

LATEST = "latest"
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
# Adam's state in the parameters' own shapes: readable at any TP, PP and DP
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or of another model. Names the file."""


def save_checkpoint(actor: Actor, root: str, step: int, trainer_state: Mapping[str, Any] | None) -> None:
    """Write `root/step_NNNNNNN` after `step` finished steps and point `root/latest` at it.

    `trainer_state` (rank 0; JSON) is everything outside Megatron: data position, surplus groups, versions. Nothing
    under the final name exists before all of it is on disk. Collective over all ranks.
    """
    control = actor.groups.control
    final = Path(root) / f"step_{step:07d}"
    aside = Path(root) / f".writing_{final.name}"
    if actor.layout.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier(group=control)
    state = _sharded_state(actor, is_loading=False)
    dist_checkpointing.save(state, str(aside), content_metadata=dict(_METADATA))
    torch.save(_rng_state(), aside / f"rng_{actor.layout.rank}.pt")
    dist.barrier(group=control)
    if actor.layout.rank == 0:
        body = {"step": step, "layout": _layout_of(actor), "trainer": trainer_state}
        (aside / TRAINER_STATE).write_text(json.dumps(body), encoding="utf-8")
        _seal(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_directory(Path(root))
        pointer = Path(root) / f".{LATEST}"
        pointer.write_text(final.name, encoding="utf-8")
        pointer.rename(Path(root) / LATEST)
        _sync_directory(Path(root))
    dist.barrier(group=control)


def find_checkpoint(root: str) -> Path:
    """The directory `root/latest` points at. Raises CheckpointError naming --load and what is missing."""
    pointer = Path(root) / LATEST
    if not pointer.is_file():
        raise CheckpointError(f"--load is {root!r}, but there is no checkpoint: {pointer} does not exist")
    name = pointer.read_text(encoding="utf-8").strip()
    directory = Path(root) / name
    if Path(name).name != name or not directory.is_dir():
        raise CheckpointError(f"{pointer} says {name!r}, which is not a checkpoint directory in {root}")
    return directory


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Check every file against the manifest (size and SHA-256) and the metadata against foreign classes.

    Returns the trainer's part. Raises CheckpointError naming the first file that is missing, truncated or changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {MANIFEST}
        for name, entry in manifest.items():
            if name not in found:
                raise CheckpointError(f"{directory / name} is missing, but the checkpoint's manifest lists it")
            size = (directory / name).stat().st_size
            if size != entry["size_bytes"]:
                raise CheckpointError(
                    f"{directory / name} has {size} bytes, but the manifest says {entry['size_bytes']}"
                )
            if _sha256(directory / name) != entry["sha256"]:
                raise CheckpointError(f"{directory / name} does not have the SHA-256 its manifest says: it was changed")
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read: {error!r}") from error
    if found - set(manifest):
        raise CheckpointError(f"{directory / sorted(found - set(manifest))[0]} is not in the checkpoint's manifest")
    _check_metadata(directory / ".metadata")
    return json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))


def load_checkpoint(actor: Actor, directory: Path) -> bool:
    """Load model, optimizer, schedule and, at the layout that saved it, the random states. Call `verify_checkpoint`
    first. Returns whether the layout is the saved one (then the run goes on bit for bit). Collective over all ranks.
    """
    register_safe_globals()
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        # torch's Adam has no state before its first step, so there would be nothing to load into
        part._init_optimizer_states_with_dummy_values()
    try:
        loaded = dist_checkpointing.load(_sharded_state(actor, is_loading=True), str(directory))
    except (RuntimeError, dist_checkpointing.core.CheckpointingException, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    unwrapped(actor.model).load_state_dict(loaded["model"])
    actor.optimizer.load_state_dict(loaded["optimizer"])
    actor.scheduler.load_state_dict(loaded["scheduler"])
    saved_layout = json.loads((directory / TRAINER_STATE).read_text(encoding="utf-8"))["layout"]
    same_layout = saved_layout == _layout_of(actor)
    if same_layout:
        _set_rng_state(torch.load(directory / f"rng_{actor.layout.rank}.pt", weights_only=True))
    return same_layout


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    model = unwrapped(actor.model).sharded_state_dict()
    return {
        "model": model,
        "optimizer": actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA)),
        "scheduler": actor.scheduler.state_dict(),
    }


def _layout_of(actor: Actor) -> dict[str, int]:
    layout = actor.layout
    return {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": layout.dp}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _seal(directory: Path) -> None:
    """Flush every file and write the manifest, last."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        files[str(path.relative_to(directory))] = {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    with (directory / MANIFEST).open("w", encoding="utf-8") as handle:
        json.dump({"files": files}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch_dist's `.metadata`, which is a pickle, admitting only what such a file is made of."""

    def __init__(self, path: Path, *args: Any) -> None:
        super().__init__(*args)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        allowed = (
            module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
            or (module == "torch" and name in ("Size", "device"))
            or (module == "torch._utils" and name in ("_get_dtype",))
            or (module == "torch.serialization" and name == "_get_layout")
            or (module == "collections" and name == "OrderedDict")
            or (module == "pathlib" and name in ("PosixPath", "Path", "PurePosixPath"))
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not allowed:
            raise CheckpointError(f"{self.path} holds {module}.{name}, which no checkpoint of ours contains")
        return super().find_class(module, name)


def _check_metadata(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as handle:
            try:
                _MetadataUnpickler(path, handle).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
                raise CheckpointError(f"{path} is not a checkpoint's metadata: {error}") from error
