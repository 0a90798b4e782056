"""Which signals ask a run to end, and how the processes that it starts are spared them.

A batch system signals every process of a job. The ranks decide what follows: they may want to finish a stage and save
first, with engines and graders that are there.
"""

from __future__ import annotations

import contextlib
import os
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


def spare_only_this_process() -> None:
    """In the main thread of a process that was born sheltered: it stays deaf, what it starts from now on is not.

    A user's program may end its own children by a signal, as `terminate()` and timeout(1) do.
    """
    for number in ASKING:
        signal.signal(number, _do_nothing)  # unlike SIG_IGN this ends with exec
        signal.siginterrupt(number, False)
    os.register_at_fork(after_in_child=_hear_again)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def _do_nothing(number: int, frame: object) -> None:
    pass


def _hear_again() -> None:
    for number in ASKING:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.SIG_DFL)
