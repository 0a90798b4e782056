"""What a test may leave behind and must not: processes that carry its mark, and shared memory nobody uses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "FAULT_TEST"  # in the environment of every process that a test starts, and of theirs
SHARED_MEMORY = Path("/dev/shm")
SEGMENT = re.compile(r"torch_|sgl|psm_|sem\.|nccl")  # how torch, SGLang, Python and NCCL begin names there
FORKED_SESSIONS: set[int] = set()  # leaders of sessions whose processes were forked, so that they carry another mark
ON_THEIR_WAY_OUT_S = 10.0  # torch_shm_manager waits 2 s for new clients when its last one is gone


@contextlib.contextmanager
def nothing_left_behind(name: str) -> Iterator[None]:
    """Raises AssertionError if what was started inside still runs afterwards, or left shared memory; ends it, too."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}-{name}"
    segments = set(os.listdir(SHARED_MEMORY))
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before
        deadline = time.monotonic() + ON_THEIR_WAY_OUT_S
        while (left := marked(mark) | of_forked_sessions()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        FORKED_SESSIONS.clear()
        while (unused := unused_segments(segments)) and time.monotonic() < deadline:
            time.sleep(0.2)  # another program's may lie unmapped for a moment
    assert not left, f"left running: {left}"
    assert not unused, f"left in {SHARED_MEMORY}: {sorted(unused)}"


def marked(mark: str) -> dict[int, str]:
    """Ids of the living processes with this mark in the environment they were started in, with their command lines."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def of_forked_sessions() -> dict[int, str]:
    """Ids of the living processes in one of FORKED_SESSIONS, with their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*") if FORKED_SESSIONS else ():
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in FORKED_SESSIONS and fields[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def unused_segments(known: set[str]) -> set[str]:
    """Names in /dev/shm besides the `known` ones that no living process has made, mapped or open.

    A name may tell who made it: torch and SGLang hand segments on by name, unmapped in between.
    """
    new = set(os.listdir(SHARED_MEMORY)) - known
    names = {name for name in new if SEGMENT.match(name) and not _maker_lives(name)}
    if not names:
        return names
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held = [line.partition("/")[2] for line in (process / "maps").read_text(errors="replace").splitlines()]
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    held.append(os.readlink(descriptor).removeprefix("/"))
            for path in held:
                if f"/{path}".startswith(f"{SHARED_MEMORY}/"):
                    names.discard(path.removeprefix(f"{SHARED_MEMORY}/"[1:]).split(" ")[0])
    return names & set(os.listdir(SHARED_MEMORY))


def _maker_lives(name: str) -> bool:
    found = re.match(r"(torch|sgl_shm_mq)_(\d+)_", name)
    return found is not None and Path("/proc", found[2]).exists()
