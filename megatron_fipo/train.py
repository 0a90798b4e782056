"""The program: `torchrun --nproc-per-node N -m megatron_fipo.train ...`, one process per rank, every rank the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fipo.arguments import Settings

USER_ERROR = 2
RUN_FAILED = 1
RAISED_AGAIN_AFTER_S = 1.0
LOST_CONNECTION = ("closed by peer", "reset by peer")  # what gloo and NCCL say when a rank is gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, run. Errors the user can act on, and signals, become one line on stderr and a non-zero status.

    What needs no Megatron is checked before Megatron is imported, which takes seconds; and all that needs no engine
    before one starts.
    """
    from megatron_fipo.arguments import parse_arguments

    is_rank_zero = _is_zero("RANK", "SLURM_PROCID")
    with Signals() as signals:
        try:
            try:
                settings = parse_arguments(arguments)
            except ValueError as error:
                signals.ending()
                return _fail(error, USER_ERROR, is_rank_zero)
            return _checked_run(settings, signals.ending, is_rank_zero)
        except KeyboardInterrupt:
            signals.ending()
            return _interrupted(signals.received, is_rank_zero)
        except Exception as error:
            signals.ending()
            if signals.received:  # other ranks end at the same signal, and this one noticed that first
                return _interrupted(signals.received, is_rank_zero)
            if isinstance(error, ValueError):
                return _fail(
                    error, USER_ERROR, _is_zero("LOCAL_RANK", "SLURM_LOCALID")
                )  # a file may be amiss on a node
            if isinstance(error, OSError) and error.filename is not None:
                return _fail(error, RUN_FAILED, True)  # a full disk, a directory that cannot be written
            if any(text in str(error) for text in LOST_CONNECTION):
                return _fail(RuntimeError("another rank ended, or cannot be reached any more"), RUN_FAILED, True)
            raise


def _checked_run(settings: Settings, ending: Callable[[], None], is_rank_zero: bool) -> int:
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.checks import check_run
    from megatron_fipo.problems import open_problems

    checked = check_run(settings, os.environ)
    with contextlib.ExitStack() as stack:
        problems = None
        if checked.layout.rank == 0 and settings.rollout.replay_rollouts is None:
            problems = stack.enter_context(open_problems(settings))
        stack.callback(ending)  # comes first on the way out
        from megatron_fipo.rollout.engine import EngineError
        from megatron_fipo.run import run
        from megatron_fipo.trainer.agreement import EngineDisagrees
        from megatron_fipo.trainer.exchange import RankZeroFailed
        from megatron_fipo.trainer.guards import GuardStopped

        try:
            run(settings, checked, problems, ending)
        except (EngineError, EngineDisagrees, GuardStopped) as error:
            return _fail(error, RUN_FAILED, is_rank_zero)
        except RankZeroFailed:
            return RUN_FAILED  # rank 0 says why
    return 0


class Signals:
    """Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that engines and graders are ended on the way out.

    Python drops what is raised inside a destructor: it is raised again until the run is `ending`. From then on signals
    do nothing: torchrun sends one to the ranks that are not as quick to end as the first.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._is_ending = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            self._before[number] = signal.signal(number, self._handle)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._show_unraisable
        return self

    def __exit__(self, *error: object) -> None:
        self.ending()
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ending(self) -> None:
        """From now on the clean-up is not to be interrupted."""
        self._is_ending = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_ending:
            return
        if number != signal.SIGALRM:
            self.received.append(number)
        signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_AFTER_S)
        raise KeyboardInterrupt

    def _show_unraisable(self, unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            self._hook(unraisable)


def _interrupted(received: Sequence[int], is_rank_zero: bool) -> int:
    number = received[0]
    if is_rank_zero and not _another_rank_failed():
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number


def _another_rank_failed() -> bool:
    """Whether a rank of this node has left word of its error: torchrun's signal then only follows from that."""
    mine = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return any(path != mine for path in mine.parent.parent.glob(f"*/{mine.name}")) if mine.name else False


def _is_zero(*variables: str) -> bool:
    """Whether the first of these variables that is set says 0; True when it says nothing that can be read."""
    value = next((os.environ[name] for name in variables if name in os.environ), "0")
    return not value.isdecimal() or int(value) == 0


def _fail(error: Exception, status: int, speaks: bool) -> int:
    """Say it on one rank, and leave it for torchrun on all: the one that speaks may be ended before it gets here."""
    if speaks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps({"message": message, "said_aloud": speaks}), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
