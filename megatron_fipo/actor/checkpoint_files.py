"""The files of a checkpoint: how a directory becomes one, how it is found again, and how damage is noticed.

A checkpoint is a directory `root/step_NNNNNNN` with a manifest of sizes and SHA-256; `root/latest` names the newest.
Nothing here knows what the files hold, except that torch_dist's `.metadata` is a pickle. All ranks see one file system.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from megatron_fipo.actor.checkpoint_reading import (
    CheckpointError,
    kind_of,
    read_bytes,
    read_json,
    reason,
    sha256_of,
    shown,
)
from megatron_fipo.actor.metadata_pickle import SHARD_NAME, parse_metadata
from megatron_fipo.actor.saved_shapes import OBJECT, POSITIVE, TEXT, TRUTH, WHOLE, Check, require_shape

T = TypeVar("T")

LATEST = "latest"
MANIFEST = "manifest.json"
METADATA = ".metadata"
RUN_STATE = "run_state.json"
COMMON = "common.pt"
FORMAT = "metadata.json"
MAX_METADATA_BYTES = 2**31
_ASIDE = ".writing_"
_RETIRED = ".removing_"
_CHECKPOINT = re.compile(r"step_(\d{7,15})(?:\.(\d{1,9}))?", re.ASCII)
_RANDOM_STATE = re.compile(r"rng_\d{1,9}\.pt", re.ASCII)
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
_LAYOUT: dict[str, Check] = {"sequence_parallel": TRUTH, "params_dtype": TEXT, "device": TEXT}  # all else are sizes


def find_checkpoint(root: str | Path) -> Path:
    """The directory `root/latest` points at. Raises CheckpointError naming --load and what is missing."""
    pointer = Path(root) / LATEST
    if not os.path.lexists(pointer):
        raise CheckpointError(f"--load is {str(root)!r}, but holds no checkpoint: {shown(pointer)} does not exist")
    name = read_bytes(pointer, 4096).decode("utf-8", errors="replace").strip()
    directory = Path(root) / name
    if not _CHECKPOINT.fullmatch(name) or directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{shown(pointer)} says {name!a}, which is not a checkpoint directory in {root}")
    return directory


def checkpoints_in(root: Path) -> list[Path]:
    """The directories in `root` that are named as checkpoints are, those of later steps first. They may be damaged."""
    try:
        names = [entry.name for entry in os.scandir(root) if not entry.is_symlink() and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{shown(root)} cannot be read: {reason(error)}") from error
    numbered = [(int(match[1]), int(match[2] or 0), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return [root / name for _, _, name in sorted(numbered, reverse=True)]


def nameless_in(root: Path) -> list[Path]:
    """What is left in `root` of checkpoints that lost their names."""
    return sorted(root.glob(f"{_RETIRED}*"))


def step_of(directory: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _CHECKPOINT.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def find_valid_checkpoint(root: str | Path, *, say: Callable[[str], None]) -> Path:
    """The verified checkpoint to resume from: the one `latest` names or, where that one is missing or damaged, the
    newest other one that is whole. `say` is then told, on rank 0, what is wrong and what is used instead.

    Raises CheckpointError on every rank when there is none, saying why each was refused. Collective over the default
    group, whose ranks share the hashing.
    """
    rank_zero = dist.get_rank() == 0
    found = _from_rank_zero(lambda: _candidates(Path(root)))
    named, others, complaint = found
    complaints = [] if complaint is None else [complaint]
    for directory in ([named] if named is not None else []) + others:
        try:
            verify_checkpoint_together(directory)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        if directory != named and rank_zero:
            say(f"WARNING: NOT the latest checkpoint: {'; '.join(complaints)}; {directory}, which is whole, is used")
        return directory
    if not others and len(complaints) == 1:
        raise CheckpointError(complaints[0])
    raise CheckpointError(f"--load is {str(root)!r}, but no checkpoint in it is whole: {'; '.join(complaints)}")


def verify_checkpoint(
    directory: Path,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Check the files against the manifest, and the metadata against all that does not belong there.

    Every rank checks names, kinds and sizes of all files and the SHA-256 of its share; `advance` is told how many of
    how many of these it has read. Raises CheckpointError naming the first file that is missing, truncated, changed, not
    in the manifest, or no regular file.
    """
    if directory.is_symlink():
        raise CheckpointError(f"{shown(directory)} is a symbolic link, not a checkpoint's directory")
    listed = _read_manifest(directory)
    found = _files_in(directory)
    for name, entry in listed.items():
        path = directory / name
        if name not in found:
            raise CheckpointError(f"{path} is missing, but the checkpoint's manifest lists it")
        if found[name] != entry["size_bytes"]:
            raise CheckpointError(
                f"{path} has {found[name]} bytes, but the checkpoint's manifest says {entry['size_bytes']}"
            )
    for name in sorted(found.keys() - listed.keys()):
        raise CheckpointError(f"{shown(directory / name)} is not in the checkpoint's manifest")
    share = _share(listed, rank, num_ranks)
    for done, name in enumerate(share, start=1):
        if sha256_of(directory / name) != listed[name]["sha256"]:
            raise CheckpointError(f"{directory / name} was changed: its SHA-256 is not the one in the manifest")
        advance(done, len(share))
    for name in (METADATA, RUN_STATE, COMMON, FORMAT):
        if name not in listed:
            raise CheckpointError(f"{directory / MANIFEST} lists no {name}: this is not a checkpoint of a run")
    for name in sorted({place.relative_path for place in check_metadata(directory / METADATA).storage_data.values()}):
        if name not in listed:
            raise CheckpointError(f"{directory / MANIFEST} lists no {name}, but {METADATA} says that tensors lie there")
    _check_run_state(directory, listed)


def verify_checkpoint_together(directory: Path) -> None:
    """`verify_checkpoint` shared by all ranks of the job: each hashes its part, and every one raises what one found."""
    agreed(
        lambda: verify_checkpoint(directory, rank=dist.get_rank(), num_ranks=dist.get_world_size()),
        dist.distributed_c10d._get_default_group(),
    )


def read_run_state(directory: Path) -> dict[str, Any]:
    """What a verified checkpoint holds in JSON: `step`, `model`, `layout`, `trainer`, `score`. Raises CheckpointError
    naming what is missing, or of another kind: the last two are whose they are to look at."""
    path = directory / RUN_STATE
    state = read_json(path)
    for name in ("step", "model", "layout", "trainer"):
        if name not in state:
            raise CheckpointError(f"{path} holds no {name!r}: a piece of the run's state is missing")
    for name, check in (("step", WHOLE), ("model", OBJECT), ("layout", OBJECT)):
        require_shape(state[name], check, key=name, path=path)
    for name, value in state["layout"].items():
        require_shape(value, _LAYOUT.get(name, POSITIVE), key=f"layout.{name}", path=path)
    return state


def saved_dtype(directory: Path) -> torch.dtype:
    """The precision of the parameters in a verified checkpoint. Raises CheckpointError when it names none."""
    found = read_run_state(directory)["layout"].get("params_dtype")
    if found not in _DTYPES:
        raise CheckpointError(
            f"{directory / RUN_STATE} says layout.params_dtype {ascii(found)[:100]}, but must say one of "
            f"{', '.join(_DTYPES)}"
        )
    return _DTYPES[found]


def check_metadata(path: Path) -> Metadata:
    """Read torch_dist's `.metadata` admitting only what it is made of. Raises CheckpointError naming the file and the
    foreign class."""
    return parse_metadata(read_bytes(path, MAX_METADATA_BYTES), shown(path))


def begin_aside(root: Path, step: int) -> Path:
    """An empty directory in `root` to write into. What interrupted saves and removals left there is removed; what
    cannot be is in nobody's way if it is a removal's, and `retire` names it again."""
    new = [directory for directory in (root, *root.parents) if not directory.exists()]
    with written(root):
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob(f"{_ASIDE}*"):
            remove(left_over)
    for left_over in nameless_in(root):
        with suppress(OSError):
            remove(left_over)
    for directory in new:
        _sync_directory(directory.parent)  # a checkpoint is as durable as the way to it
    aside = root / f"{_ASIDE}step_{step:07d}"
    with written(aside):
        aside.mkdir()
    return aside


def seal(aside: Path, entries: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the manifest of the files in `aside`, last. `entries` (name -> size_bytes, sha256) says what was written
    and is on disk; None: every file is read and flushed here. Raises OSError or CheckpointError naming the file."""
    found = _files_in(aside)
    if entries is None:
        entries = {name: _flushed(aside / name) for name in found}
    for name, size in found.items():
        if name not in entries or entries[name]["size_bytes"] != size:
            raise CheckpointError(f"{shown(aside / name)} was not written by this save, or changed under it")
    for name in sorted(entries.keys() - found.keys()):
        raise CheckpointError(f"{aside / name} was written, but is not there: do all ranks see one file system?")
    with written(aside / MANIFEST), (aside / MANIFEST).open("x", encoding="utf-8") as handle:
        json.dump({"files": dict(sorted(entries.items()))}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    _sync_directory(aside)


def commit(aside: Path) -> Path:
    """Rename a sealed directory to its final name and point `latest` at it; return that name.

    At every moment `latest` names a whole checkpoint. One of the same step stays beside it under its own name:
    `retire` takes it away.
    """
    root, name = aside.parent, aside.name.removeprefix(_ASIDE)
    final, number = root / name, 1
    while os.path.lexists(final):
        final = root / f"{name}.{number}"
        number += 1
    with written(final):
        aside.rename(final)
    _sync_directory(root)
    pointer = root / f".{LATEST}"
    with written(pointer):
        pointer.unlink(missing_ok=True)  # a link there is not followed
        with pointer.open("x", encoding="utf-8") as handle:
            handle.write(final.name)
            handle.flush()
            os.fsync(handle.fileno())
    with written(root / LATEST):
        pointer.rename(root / LATEST)
    _sync_directory(root)
    return final


def set_aside(directory: Path) -> Path:
    """Take a checkpoint's name from it, in one step, so that what is left of an interrupted removal is not one."""
    retired, number = directory.with_name(f"{_RETIRED}{directory.name}"), 1
    while os.path.lexists(retired):
        retired = directory.with_name(f"{_RETIRED}{directory.name}_{number}")
        number += 1
    with written(retired):
        directory.rename(retired)
    return retired


def remove(path: Path) -> None:
    """Remove a directory with all it holds, or whatever else is there, following no link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def agreed(function: Callable[[], T], control: dist.ProcessGroup | None) -> list[T]:
    """Run `function` on every rank of `control`; every rank's result, or CheckpointError on all when one failed.

    A rank whose failure was neither an OSError nor a CheckpointError raises that itself. With None: this process alone.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:  # no rank may leave the others waiting
        error = raised
    message = None if error is None else _told(error)
    outcomes: list[Any] = [(result, message)]
    if control is not None:
        outcomes = [None] * control.size()
        dist.all_gather_object(outcomes, (result, message), group=control)
    if error is not None and not isinstance(error, (OSError, CheckpointError)):
        raise error
    for _, failure in outcomes:
        if failure is not None:
            raise CheckpointError(failure) from error
    return [value for value, _ in outcomes]


@contextmanager
def written(path: Path) -> Iterator[None]:
    """What fails in the operating system inside is a CheckpointError naming `path`: not every OSError says where."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be written: {reason(error)}") from error


def is_checkpoint_file(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name beside its manifest."""
    known = name in (METADATA, RUN_STATE, COMMON, FORMAT)
    return known or bool(SHARD_NAME.fullmatch(name) or _RANDOM_STATE.fullmatch(name))


def _told(error: Exception) -> str:
    text = reason(error)
    return text if isinstance(error, (OSError, CheckpointError)) else f"{type(error).__name__}: {text}"


def _candidates(root: Path) -> tuple[Path | None, list[Path], str | None]:
    """What `latest` names, the other checkpoints, and what is wrong with `latest`."""
    directories = checkpoints_in(root)
    try:
        named = find_checkpoint(root)
    except CheckpointError as error:
        return None, directories, str(error)
    return named, [directory for directory in directories if directory != named], None


def _from_rank_zero(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank, or the CheckpointError it raises. Collective."""
    group = dist.distributed_c10d._get_default_group()
    result = agreed(lambda: function() if dist.get_rank() == 0 else None, group)[0]
    assert result is not None, "rank 0 has a result"
    return result


def _check_run_state(directory: Path, listed: Mapping[str, Any]) -> None:
    """The run's state must be that of the step in the directory's name, and of as many ranks as left a random state."""
    path = directory / RUN_STATE
    state = read_run_state(directory)
    if _CHECKPOINT.fullmatch(directory.name) and state["step"] != step_of(directory):
        raise CheckpointError(f"{path} says step {state['step']}, which is not {directory}'s")
    sizes = [state["layout"].get(axis) for axis in ("tp", "pp", "cp", "dp")]
    if None not in sizes:
        for rank in range(math.prod(sizes)):
            if f"rng_{rank}.pt" not in listed:
                raise CheckpointError(f"{directory / MANIFEST} lists no rng_{rank}.pt, the random state of a rank")


def _read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} is missing: {directory} is not a whole checkpoint")
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} cannot be read: it lists no files")
    for name, entry in files.items():
        if not is_checkpoint_file(name):
            raise CheckpointError(f"{path} lists {ascii(name)[:300]}, which is no file of a checkpoint")
        size, digest = (entry.get("size_bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise CheckpointError(f"{path} cannot be read: it has no size and SHA-256 for {name}")
    return files


def _files_in(directory: Path) -> dict[str, int]:
    """Size of every file in a directory but the manifest, by name. Raises CheckpointError naming what is no file."""
    sizes = {}
    try:
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            found = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(
                    f"{shown(directory / entry.name)} is {kind_of(found.st_mode)}, not a regular file"
                )
            sizes[entry.name] = found.st_size
    except OSError as error:
        raise CheckpointError(f"{shown(directory)} cannot be read: {reason(error)}") from error
    sizes.pop(MANIFEST, None)
    return sizes


def _share(names: Mapping[str, Any], rank: int, num_ranks: int) -> Sequence[str]:
    return sorted(names)[rank::num_ranks]


def _flushed(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sync_directory(directory: Path) -> None:
    with written(directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
