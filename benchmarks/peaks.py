"""The clock and the peak of memory, on the CPU and on a GPU: what several benchmarks read."""

from __future__ import annotations

import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> float:
    """Reset the peak; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to the current resident size
    return _status_bytes("VmRSS")


def peak(device: torch.device) -> float:
    """Most bytes in use since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024.0 * int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")
