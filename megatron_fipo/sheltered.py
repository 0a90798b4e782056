"""Which signals ask a run to end, and how the processes that it starts are spared them.

A batch system signals every process of a job. The ranks decide what follows: they may want to finish a stage and save
first, with engines and graders that are there.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def sheltered_children() -> Iterator[None]:
    """What this thread starts inside is born with these signals blocked, and so is all that it starts; it is to notice
    by other means that its parent is gone. A signal to this thread waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
