"""What the programs in tools/ share: how they end, and how they show progress."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_fipo.train import RUN_FAILED, USER_ERROR

SECONDS_BETWEEN_LINES = 10.0
ENDING = (signal.SIGTERM, signal.SIGHUP)


def ended(program: Callable[[], int]) -> int:
    """Run `program`; its status, or that of the error the user can act on, said in one line on stderr."""
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        if before[number] is not signal.SIG_IGN:  # nohup's
            signal.signal(number, _interrupt)
    try:
        return program()
    except KeyboardInterrupt:
        print(
            "error: interrupted: what was not finished is removed, what was written before is whole",
            file=sys.stderr,
            flush=True,
        )
        return 130
    except ValueError as error:
        return _fail(error, USER_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(error, RUN_FAILED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(what: str, unit: str = "tensors") -> Iterator[Callable[[int, int], None]]:
    """A function to call with how many of how many are done: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    said = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{what}: {done} of {total} {unit}", file=sys.stderr, flush=True)

        yield advance


def _interrupt(number: int, frame: object) -> None:
    for other in ENDING:  # the clean-up is under way
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
