"""The shared memory that this process made and that torch would remove only after its end.

torch leaves that to a process of its own, torch_shm_manager, which waits for the last user to be gone. A batch system
ends all processes of a job at once, that one too, and the segments would fill the machine's memory for ever.
"""

from __future__ import annotations

import os
from pathlib import Path

_MAPS = Path("/proc/self/maps")


def remove_own_segments() -> None:
    """Unlink what this process made for others and still has mapped. Who has it open keeps it. Linux."""
    own = f"/dev/shm/torch_{os.getpid()}_"
    for line in _MAPS.read_text(errors="replace").splitlines():
        _, found, name = line.partition(own)
        if found and not name.endswith("(deleted)"):
            Path(found + name).unlink(missing_ok=True)
