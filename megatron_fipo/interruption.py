"""Signals that ask a run to end: what they interrupt, what they let finish, and the moment at which it is over anyway.

SIGTERM, SIGUSR1, SIGINT and SIGHUP all ask for the same. Where nothing is lost by it (start-up, generation, evaluation)
they raise KeyboardInterrupt; elsewhere they are noted, and the training loop looks at the note between its stages.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from megatron_fipo.sheltered import ASKING

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the run can go on from where it was saved
RAISED_FIRST_AFTER_S = 0.05
RAISED_AGAIN_AFTER_S = 1.0
HEEDED_WITHIN_S = 10.0  # by a start, where nothing is lost
SAME_REQUEST_S = 1.0  # a terminal and a launcher may both pass on what was asked once
LAUNCHER_PID = "MEGATRON_FIPO_LAUNCHER_PID"  # variable in which launch.py says who it is
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST = 0  # no signal has this number


def end_with_parent(number: signal.Signals = signal.SIGTERM, *, launcher: int | None = None) -> None:
    """Have this process sent `number` when its parent ends, however that ends. Linux.

    At once where `launcher`, the process id by which the parent goes (None: unknown), has ended already. That the
    parent is process 1 says nothing by itself: in a container the launcher may be that.
    """
    parent = os.getppid()
    failed = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    assert not failed, os.strerror(ctypes.get_errno())
    is_orphan = launcher not in (None, 1) and (parent == 1 or not os.path.exists(f"/proc/{launcher}"))
    if os.getppid() != parent or is_orphan:
        os.kill(os.getpid(), number)


class Signals:
    """A context manager for the main thread. Inside, the signals above ask the run to end.

    The first one starts the grace time (`set_grace`): when it is over, or when a second one arrives more than a second
    after the first, the process ends at once, whatever it is doing, with what `status_at_once` says. Engines and
    graders notice that and end too. So does a start that waits in C++, where no handler runs, for ranks that may be
    gone. With `ends_process` the signals are ignored afterwards: launchers signal the ranks that are not as quick to
    end as the first.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self.received: list[int] = []
        self._grace_s: float | None = None
        self._status_at_once: Callable[[int], tuple[int, str]] | None = None
        self._is_ending = False
        self._is_entering = True
        self._is_deferring = False
        self.has_begun = False  # there is something to lose
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        self._pipe = (-1, -1)
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Signals:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watch = threading.Thread(target=self._watch_pipe, daemon=True)
        self._watch.start()
        for number in (signal.SIGALRM, *ASKING):
            self._before[number] = signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)  # written to even while C code holds on
        self._hook, sys.unraisablehook = sys.unraisablehook, self._show_unraisable
        self._is_entering = False
        return self

    def __exit__(self, *error: object) -> None:
        self.ending()
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._ends_process else handler)
        os.write(self._pipe[1], bytes([_LAST]))  # ends the watch: a child that was forked may hold the pipe open
        os.close(self._pipe[1])
        assert self._watch is not None
        self._watch.join()
        os.close(self._pipe[0])

    def set_grace(self, seconds: float, status_at_once: Callable[[int], tuple[int, str]]) -> None:
        """From now on the process lives at most `seconds` after the first signal.

        `status_at_once(signal number)` gives the exit status of an end at once, and what to print with it or "", on
        ranks that do not speak; it is called in another thread.
        """
        self._grace_s, self._status_at_once = seconds, status_at_once

    @property
    def defers(self) -> bool:
        """Whether signals are noted and raise nothing: what goes wrong now was not a signal's doing."""
        return self._is_deferring

    def ending(self) -> None:
        """From now on the clean-up is not interrupted, except by the end of the grace time: torchrun signals the ranks
        that are not as quick to end as the first."""
        self._is_ending = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def defer(self) -> None:
        """From now on signals are noted and raise nothing, but inside `interruptible`."""
        self._is_deferring = self.has_begun = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, also one that was noted before."""
        before, self._is_deferring = self._is_deferring, False
        try:
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_deferring = before
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals are noted only; on leaving, one that was noted raises where it would have outside."""
        before, self._is_deferring = self._is_deferring, True
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            yield
        finally:
            self._is_deferring = before
        if self.received and not before and not self._is_ending:
            raise KeyboardInterrupt

    @property
    def first(self) -> int:
        """The signal that asked first, 0 where none did."""
        return self.received[0] if self.received else 0

    def hear_of(self, number: int) -> None:
        """Another rank was sent this signal (0: none): it counts as received here, and raises nothing.

        Launchers signal one rank after the other, and some only one: what follows is the same on all of them.
        """
        if number and not self.received:
            self.received.append(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_ending:
            return
        if number != signal.SIGALRM:
            self.received.append(number)
        if self._is_deferring:
            return
        if self._is_entering:  # nobody would catch it yet
            signal.setitimer(signal.ITIMER_REAL, RAISED_FIRST_AFTER_S)
            return
        # Python drops what is raised inside a destructor: it is raised again until somebody acts on it
        signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_AFTER_S)
        raise KeyboardInterrupt

    def _show_unraisable(self, unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            self._hook(unraisable)

    def _watch_pipe(self) -> None:
        """In a thread of its own: the main one may sit in a collective that never returns."""
        first, began = 0, 0.0  # the signal that asked, and when
        while True:
            left = None
            if first and self._grace_s is not None:
                left = max(0.0, began + self._lives_s() - time.monotonic())
            readable, _, _ = select.select([self._pipe[0]], [], [], left)
            if not readable:
                seconds = self._lives_s()
                if time.monotonic() < began + seconds:
                    continue  # the signal has been heeded meanwhile
                if seconds == self._grace_s:
                    self._end_at_once(first, f"the run did not end within {seconds:g} s (--exit-grace-s)")
                self._end_at_once(first, f"the start did not heed a signal within {seconds:g} s")
            numbers = os.read(self._pipe[0], 64)
            if _LAST in numbers:
                return
            asking = [number for number in numbers if number in ASKING]
            if asking and not first:
                first, began = asking[0], time.monotonic()
            elif asking and time.monotonic() - began > SAME_REQUEST_S and not self._is_ending:
                self._end_at_once(first, f"a second signal ({signal.Signals(asking[0]).name}) ended the run at once")

    def _lives_s(self) -> float:
        assert self._grace_s is not None
        is_heeded = self.received or self.has_begun or self._is_ending
        return self._grace_s if is_heeded else min(self._grace_s, HEEDED_WITHIN_S)

    def _end_at_once(self, number: int, why: str) -> NoReturn:
        status, words = 128 + number, ""
        if self._status_at_once is not None:
            status, words = self._status_at_once(number)
        if words:
            os.write(2, f"{why}: {words}\n".encode())
        os._exit(status)
