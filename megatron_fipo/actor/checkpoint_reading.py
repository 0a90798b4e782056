"""Reading files that anyone may have written: nothing but regular files, no link followed, nothing unpickled freely."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

import torch

MAX_JSON_BYTES = 2**33
MAX_SMALL_TENSORS_BYTES = 2**28  # common.pt and random states: numbers and a few kilobytes of state


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or of another model, or cannot be written. Names the file."""


def shown(path: str | os.PathLike[str]) -> str:
    """The path on one line, whatever characters it holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def reason(error: BaseException) -> str:
    """What an error says, on one line and of bounded length. A message without words becomes its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises FileNotFoundError when there is none, and CheckpointError naming the path for a link, a directory, a pipe or
    a device, none of which is opened for reading or waited for, and for whatever else keeps it from being read.
    """
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reason(error)}") from error
    raise CheckpointError(f"{shown(path)} is {kind_of(mode)}, not a regular file")


def kind_of(mode: int) -> str:
    """What a file that is not a regular one is, by its mode."""
    kinds: list[tuple[Callable[[int], bool], str]] = [
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ]
    return next((name for test, name in kinds if test(mode)), "a device")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes. Raises CheckpointError naming it."""
    try:
        with open_file(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{shown(path)} has {size} bytes, but at most {limit} belong into such a file")
            return handle.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown(path)} is missing") from error
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reason(error)}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises CheckpointError naming it."""
    try:
        with open_file(path) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown(path)} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reason(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; no name may occur twice in an object. Raises CheckpointError naming it."""
    try:
        value = json.loads(read_bytes(path, MAX_JSON_BYTES).decode("utf-8"), object_pairs_hook=_without_doubles)
    except CheckpointError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown(path)} cannot be read: it holds no JSON object")
    return value


def read_tensors(path: Path) -> Any:
    """A small file that torch.save wrote: tensors and plain data. Raises CheckpointError naming it."""
    content = read_bytes(path, MAX_SMALL_TENSORS_BYTES)
    return load_tensors(io.BytesIO(content), len(content), shown(path))


def load_tensors(stream: IO[bytes] | FilePart, size_bytes: int, name: str, *, check_sums: bool = False) -> Any:
    """What torch.save wrote to `stream`, admitting tensors and plain data only, whatever the environment says.

    The archive must be as torch writes it, uncompressed, so that what comes out is no larger than the `size_bytes` that
    go in. With `check_sums` every byte is compared with the archive's CRC-32, which torch itself does not look at; an
    archive written without them (torch's set_crc32_options) has zeros there. Raises CheckpointError beginning with
    `name`.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], stream)) as archive:
            members = archive.infolist()
            if check_sums and all(member.compress_type == zipfile.ZIP_STORED for member in members):
                _check_sums(archive, name)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{name} is compressed, which torch never does: it is not read")
        if sum(member.file_size for member in members) > size_bytes:
            raise CheckpointError(f"{name} claims to hold more than its {size_bytes} bytes: it is not read")
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # torch goes on to advise to load it without its guard
        refused = str(error).partition("WeightsUnpickler error:")[2] or "it holds more than tensors and plain data"
        raise CheckpointError(f"{name} cannot be read: {refused.strip().splitlines()[0][:300]}") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)}") from error


def _check_sums(archive: zipfile.ZipFile, name: str) -> None:
    for member in archive.infolist():
        if not member.CRC:
            continue
        try:
            with archive.open(member) as content:
                while content.read(2**20):
                    pass
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{name} was changed: {reason(error)}") from error


class FilePart:
    """The `length` bytes of an open file from `offset` on, read as a file of their own."""

    def __init__(self, file: BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"a seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._position, 0)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        self._file.seek(self._offset + self._position)
        num = self._file.readinto(view)
        self._position += num
        return num

    def readline(self, size: int = -1) -> bytes:
        raise ValueError("it is no archive")  # torch would read a format without an archive line by line


def require_no_object(content: bytes, name: str) -> None:
    """A layer's extra state must be empty: what it could hold, its owner would read by unpickling. CheckpointError."""
    values = load_tensors(io.BytesIO(content), len(content), name)
    for value in values if isinstance(values, list) else [values]:
        if value is not None and not (isinstance(value, torch.Tensor) and value.numel() == 0):
            raise CheckpointError(f"{name} is an object that only unpickling could read: that is not done")


# What zipfile, torch's archive reader and its restricted unpickler raise over content that is not theirs.
_UNREADABLE = (
    zipfile.BadZipFile,
    NotImplementedError,
    OSError,
    EOFError,
    RuntimeError,
    RecursionError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found
