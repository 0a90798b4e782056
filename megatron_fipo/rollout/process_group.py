"""End an engine's process group and remove what its processes leave behind when killed."""

from __future__ import annotations

import contextlib
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

_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def stop_process_group(
    group_id: int, scratch_dir: str, known_segments: frozenset[Path] = frozenset(), *, timeout_s: float = 10.0
) -> None:
    """Kill every process of the group except the caller, wait for their end, remove their shared memory and scratch.

    `known_segments`: what `shared_memory_of` found earlier, for a group that has already lost processes. Raises
    TimeoutError if a process outlives SIGKILL by `timeout_s` (it hangs in the kernel).
    """
    members = _stopped_members(group_id)
    own = [psutil.Process()] if os.getpgid(0) == group_id else []
    for segment in known_segments | _segments_of([*members, *own]):  # first: whoever ends us may not wait
        segment.unlink(missing_ok=True)
    for member in members:
        _send(member, signal.SIGKILL)
    _, alive = psutil.wait_procs(members, timeout=timeout_s)
    shutil.rmtree(scratch_dir, ignore_errors=True)
    if alive:
        raise TimeoutError(f"processes {[member.pid for member in alive]} of the engine outlived SIGKILL")


def shared_memory_of(group_id: int) -> frozenset[Path]:
    """The files of /dev/shm that the group's processes will leave behind if they are killed."""
    return _segments_of(group_members(group_id))


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


def _stopped_members(group_id: int) -> list[psutil.Process]:
    """The group's processes, stopped, so that none of them makes another segment or process before it is killed."""
    stopped: dict[int, psutil.Process] = {}
    while new := [member for member in group_members(group_id) if member.pid not in stopped]:
        for member in new:
            _send(member, signal.SIGSTOP)
            stopped[member.pid] = member
        _await_stop(new)
    return list(stopped.values())


def _await_stop(members: list[psutil.Process], *, timeout_s: float = 1.0) -> None:
    """Return when none of them runs any more: a signal takes effect a moment after it was sent."""
    deadline = time.monotonic() + timeout_s
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            while member.status() not in _STILL and time.monotonic() < deadline:
                time.sleep(0.001)


def _segments_of(members: list[psutil.Process]) -> frozenset[Path]:
    """Found among the processes' memory maps and open files (a file is open shortly before it is mapped)."""
    segments = set()
    for member in members:
        lines: list[str] = []
        with contextlib.suppress(OSError):  # ended meanwhile
            lines += Path(f"/proc/{member.pid}/maps").read_text().splitlines()
            for entry in os.listdir(f"/proc/{member.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    lines.append(os.readlink(f"/proc/{member.pid}/fd/{entry}"))
        for line in lines:
            path = line[line.find(_SHM) :] if _SHM in line else ""
            if path.removeprefix(_SHM).startswith(_LEFT_BEHIND):
                segments.add(Path(path.removesuffix(" (deleted)")))
    return frozenset(segments)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # ended meanwhile
