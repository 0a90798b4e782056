"""Ways to damage a file, and where."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

NUM_OFFSETS = 64
HEADER_BYTES = 16


def truncations(size: int) -> dict[str, int]:
    """Four sizes that a file of `size` bytes may be cut off at."""
    return {"empty": 0, "header only": min(HEADER_BYTES, size // 4), "half": size // 2, "last byte": size - 1}


def flips(size: int, num: int = NUM_OFFSETS) -> list[tuple[int, int]]:
    """(offset, bit) spread over all of a file, its first and its last byte among them; all bits occur."""
    count = min(num, size)
    return [(i * (size - 1) // max(count - 1, 1), i % 8) for i in range(count)]


@contextlib.contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """`path` holding `content`, or not there at all; afterwards it is as it was."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, offset: int, bit: int) -> bytes:
    """`content` with one bit turned over."""
    damaged = bytearray(content)
    damaged[offset] ^= 1 << bit
    return bytes(damaged)


def remake_manifest(directory: Path) -> None:
    """A manifest that is right about whatever the directory now holds: what a hostile author would write."""
    files = {
        str(path.relative_to(directory)): {
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "files": files}, indent=1))
