"""End an engine's process group and remove what its processes leave behind when killed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil

_SHM = "/dev/shm/"
# What SGLang and multiprocessing create in /dev/shm and do not remove when they are killed. torch's segments are not
# here: torch_shm_manager removes them, and the trainer may still be using them.
_LEFT_BEHIND = ("sglang_loads_", "sgl_shm_", "sem.mp-", "psm_")


def stop_process_group(group_id: int, scratch_dir: str, *, timeout_s: float = 10.0) -> None:
    """Kill every process of the group except the caller, wait for their end, remove their shared memory and scratch.

    Raises TimeoutError if a process outlives SIGKILL by `timeout_s` (it hangs in the kernel).
    """
    members = group_members(group_id)
    segments = _segments_of(members)
    for member in members:
        _kill(member)
    _, alive = psutil.wait_procs(members, timeout=timeout_s)
    for segment in segments:
        segment.unlink(missing_ok=True)
    shutil.rmtree(scratch_dir, ignore_errors=True)
    if alive:
        raise TimeoutError(f"processes {[member.pid for member in alive]} of the engine outlived SIGKILL")


def group_members(group_id: int) -> list[psutil.Process]:
    """The living processes of a process group, without the caller."""
    members = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and os.getpgid(process.pid) == group_id:
                members.append(process)
        except ProcessLookupError:
            continue  # ended meanwhile
    return members


def _segments_of(members: list[psutil.Process]) -> set[Path]:
    """The files of /dev/shm that only this engine's processes use, found in their memory maps."""
    segments = set()
    for member in members:
        try:
            maps = Path(f"/proc/{member.pid}/maps").read_text()
        except OSError:
            continue  # ended meanwhile
        for line in maps.splitlines():
            path = line[line.find(_SHM) :] if _SHM in line else ""
            if path.removeprefix(_SHM).startswith(_LEFT_BEHIND):
                segments.add(Path(path.removesuffix(" (deleted)")))
    return segments


def _kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return  # ended meanwhile


def wait_for_exit(process: psutil.Process, timeout_s: float) -> bool:
    """Whether the process has ended within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
