"""The program: `torchrun --nproc-per-node N -m megatron_fipo.train ...`, one process per rank, every rank the same."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_fipo.arguments import Settings

USER_ERROR = 2
RUN_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, run. Errors the user can act on, and signals, become one line on stderr and a non-zero status.

    What needs no Megatron is checked before Megatron is imported, which takes seconds; and all that needs no engine
    before one starts.
    """
    from megatron_fipo.arguments import parse_arguments

    is_rank_zero = _is_zero("RANK", "SLURM_PROCID")
    with _signals() as received:
        try:
            settings = parse_arguments(arguments)
        except ValueError as error:
            return _fail(error, USER_ERROR, is_rank_zero)
        try:
            return _checked_run(settings, is_rank_zero)
        except ValueError as error:
            if received:
                return _interrupted(received, is_rank_zero)
            return _fail(error, USER_ERROR, _is_zero("LOCAL_RANK", "SLURM_LOCALID"))  # a file may be amiss on one node
        except Exception:
            # other ranks end at the same signal, and this one may notice that first
            if received:
                return _interrupted(received, is_rank_zero)
            raise
        except KeyboardInterrupt:
            return _interrupted(received, is_rank_zero)


def _checked_run(settings: Settings, is_rank_zero: bool) -> int:
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.checks import check_run
    from megatron_fipo.problems import open_problems

    checked = check_run(settings, os.environ)
    with contextlib.ExitStack() as stack:
        problems = None
        if checked.layout.rank == 0 and settings.rollout.replay_rollouts is None:
            problems = stack.enter_context(open_problems(settings))
        from megatron_fipo.actor.pipeline import NonFiniteUpdate
        from megatron_fipo.rollout.engine import EngineError
        from megatron_fipo.run import run
        from megatron_fipo.trainer.agreement import EngineDisagrees
        from megatron_fipo.trainer.exchange import RankZeroFailed

        try:
            run(settings, checked, problems)
        except (EngineError, EngineDisagrees, NonFiniteUpdate) as error:
            return _fail(error, RUN_FAILED, is_rank_zero)
        except RankZeroFailed:
            return RUN_FAILED  # rank 0 says why
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that engines and graders are ended on
    the way out; later ones do nothing: a terminal and torchrun may both send one. Yields the list of what came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(received: Sequence[int], is_rank_zero: bool) -> int:
    number = received[0] if received else signal.SIGINT
    if is_rank_zero:
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number


def _is_zero(*variables: str) -> bool:
    """Whether the first of these variables that is set says 0; True when it says nothing that can be read."""
    value = next((os.environ[name] for name in variables if name in os.environ), "0")
    return not value.isdecimal() or int(value) == 0


def _fail(error: Exception, status: int, speaks: bool) -> int:
    if speaks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
