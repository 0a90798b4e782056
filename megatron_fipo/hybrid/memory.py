"""How much memory the trainer and the engines of one node hold, in GiB: cheap enough to be asked at every turn."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import psutil
import torch

GIB = 2.0**30


def memory_of_both(device: torch.device, engine_groups: Collection[int]) -> dict[str, float]:
    """`trainer`, `trainer_peak` and `engines`, in GiB; on a GPU also `device`, what is in use of it by anyone.

    On a GPU they are device memory: what torch has reserved for this rank, the most that its tensors had at once since
    the last call, and what others have in use of this rank's device, the drivers' own included. On the CPU they are
    resident memory: of this process, the most of it so far, and of the process groups `engine_groups`, in which shared
    pages count once per process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        used = total - free
        figures = {"trainer": reserved, "trainer_peak": peak, "engines": max(0, used - reserved), "device": used}
    else:
        figures = {
            "trainer": psutil.Process().memory_info().rss,
            "trainer_peak": _peak_resident_bytes(),
            "engines": _resident_bytes_of(engine_groups),
        }
    return {name: size_bytes / GIB for name, size_bytes in figures.items()}


def _peak_resident_bytes() -> int:
    """VmHWM; `ru_maxrss` would begin with the parent's, from before this program was its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")


def _resident_bytes_of(groups: Collection[int]) -> int:
    total = 0
    for process in psutil.process_iter() if groups else ():
        try:
            if os.getpgid(process.pid) in groups:
                total += process.memory_info().rss
        except (ProcessLookupError, psutil.Error):
            continue  # ended meanwhile
    return total
