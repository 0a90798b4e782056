"""The files of a checkpoint: how a directory becomes one, how it is found again, and how damage is noticed.

A checkpoint is a directory `root/step_NNNNNNN` with a manifest of sizes and SHA-256; `root/latest` names the newest.
Nothing here knows what the files hold, except that torch_dist's `.metadata` is a pickle. All ranks see one file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

LATEST = "latest"
MANIFEST = "manifest.json"
METADATA = ".metadata"
RUN_STATE = "run_state.json"
_ASIDE = ".writing_"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or of another model, or cannot be written. Names the file."""


def find_checkpoint(root: str | Path) -> Path:
    """The directory `root/latest` points at. Raises CheckpointError naming --load and what is missing."""
    pointer = Path(root) / LATEST
    if not pointer.is_file():
        raise CheckpointError(f"--load is {str(root)!r}, but holds no checkpoint: {pointer} does not exist")
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    directory = Path(root) / name
    if Path(name).name != name or name in ("", ".", "..") or directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{pointer} says {name!r}, which is not a checkpoint directory in {root}")
    return directory


def verify_checkpoint(directory: Path, *, rank: int = 0, num_ranks: int = 1) -> None:
    """Check the files against the manifest, and the metadata against foreign classes.

    Every rank checks names and sizes of all files and the SHA-256 of its share. Raises CheckpointError naming the first
    file that is missing, truncated, changed, or not in the manifest.
    """
    listed = _read_manifest(directory)
    found = set(_files_in(directory))
    for name, entry in listed.items():
        path = directory / name
        if name not in found:
            raise CheckpointError(f"{path} is missing, but the checkpoint's manifest lists it")
        size = path.stat().st_size
        if size != entry["size_bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, but the checkpoint's manifest says {entry['size_bytes']}")
    for name in sorted(found - listed.keys()):
        raise CheckpointError(f"{directory / name} is not in the checkpoint's manifest")
    for name in _share(listed, rank, num_ranks):
        if _sha256(directory / name) != listed[name]["sha256"]:
            raise CheckpointError(f"{directory / name} was changed: its SHA-256 is not the one in the manifest")
    for name in (METADATA, RUN_STATE):
        if name not in listed:
            raise CheckpointError(f"{directory / MANIFEST} lists no {name}: this is not a checkpoint of a run")
    check_metadata(directory / METADATA)


def verify_checkpoint_together(directory: Path) -> None:
    """`verify_checkpoint` shared by all ranks of the job: each hashes its part, and every one raises what one found."""
    error: CheckpointError | None = None
    try:
        verify_checkpoint(directory, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    except CheckpointError as found:
        error = found
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    for message in messages:
        if message is not None:
            raise CheckpointError(message) from error


def read_run_state(directory: Path) -> dict[str, Any]:
    """What a verified checkpoint holds in JSON: `step`, `model`, `layout`, `trainer`."""
    return json.loads((directory / RUN_STATE).read_text(encoding="utf-8"))


def begin_aside(root: Path, step: int) -> Path:
    """An empty directory in `root` to write into. What interrupted saves left there is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(left_over)
    aside = root / f"{_ASIDE}step_{step:07d}"
    aside.mkdir()
    return aside


def seal(aside: Path, control: dist.ProcessGroup | None = None) -> None:
    """Flush every file in `aside` and write the manifest, last. Collective over `control`: the ranks share the hashing.

    Raises CheckpointError on every rank when it fails on one.
    """
    rank, num_ranks = (0, 1) if control is None else (control.rank(), control.size())
    entries = agreed(
        lambda: {name: _describe(aside / name) for name in _share(_files_in(aside), rank, num_ranks)}, control
    )

    def write_manifest() -> None:
        if rank == 0:
            files = {name: entry for part in entries for name, entry in part.items()}
            with (aside / MANIFEST).open("w", encoding="utf-8") as handle:
                json.dump({"files": dict(sorted(files.items()))}, handle, indent=1)
                handle.flush()
                os.fsync(handle.fileno())
            _sync_directory(aside)

    agreed(write_manifest, control)


def commit(aside: Path) -> Path:
    """Rename a sealed directory to its final name and point `latest` at it; return that name.

    At every moment `latest` names a whole checkpoint: one of the same step is replaced under a new name, then removed.
    """
    root, name = aside.parent, aside.name.removeprefix(_ASIDE)
    final, number = root / name, 1
    while final.exists():
        final = root / f"{name}.{number}"
        number += 1
    aside.rename(final)
    _sync_directory(root)
    pointer = root / f".{LATEST}"
    with pointer.open("w", encoding="utf-8") as handle:
        handle.write(final.name)
        handle.flush()
        os.fsync(handle.fileno())
    pointer.rename(root / LATEST)
    _sync_directory(root)
    for replaced in (root / name, *root.glob(f"{name}.*")):
        if replaced != final and replaced.is_dir():
            shutil.rmtree(replaced)
    return final


def agreed(function: Callable[[], T], control: dist.ProcessGroup | None) -> list[T]:
    """Run `function` on every rank of `control`; every rank's result, or CheckpointError on all when one failed with an
    OSError or a CheckpointError. With None: this process alone."""
    result, message = None, None
    try:
        result = function()
    except (OSError, CheckpointError) as error:
        message = str(error)
    outcomes: list[Any] = [(result, message)]
    if control is not None:
        outcomes = [None] * control.size()
        dist.all_gather_object(outcomes, (result, message), group=control)
    for _, failure in outcomes:
        if failure is not None:
            raise CheckpointError(failure)
    return [value for value, _ in outcomes]


def check_metadata(path: Path) -> None:
    """Read torch_dist's `.metadata` admitting only the classes it is made of; megatron-core unpickles it freely later.

    Raises CheckpointError naming the file and the foreign class.
    """
    with path.open("rb") as handle:
        try:
            _MetadataUnpickler(path, handle).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is not a checkpoint's metadata: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, *args: Any) -> None:
        super().__init__(*args)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_CLASSES and not (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            raise CheckpointError(f"{self.path} holds {module}.{name}, which is no part of a checkpoint's metadata")
        return super().find_class(module, name)


_METADATA_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {"size_bytes": e["size_bytes"], "sha256": e["sha256"]} for name, e in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {directory} is not a whole checkpoint") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _files_in(directory: Path) -> list[str]:
    """All files below a directory but the manifest, by relative name, sorted."""
    names = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _share(names: Sequence[str] | dict[str, Any], rank: int, num_ranks: int) -> list[str]:
    return sorted(names)[rank::num_ranks]


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
