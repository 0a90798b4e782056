"""The program: `torchrun --nproc-per-node N -m megatron_fipo.train ...`, one process per rank, every rank the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.interruption import LAUNCHER_PID, REQUEUE, Signals, end_with_parent
from megatron_fipo.shared_segments import remove_own_segments

if TYPE_CHECKING:
    from megatron_fipo.arguments import Settings

USER_ERROR = 2
RUN_FAILED = 1
LOST_RANK = "another rank ended, or cannot be reached any more"
# what gloo and NCCL say when a rank is gone
LOST_CONNECTION = (
    "closed by peer",
    "reset by peer",
    "closed by remote peer",
    "Broken pipe",
    "remote process exit",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "Timed out waiting",
)
_PEER = re.compile(r"\[([0-9a-f.:]+)\]:\d+")  # as gloo names an address


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Parse, check, run. Errors the user can act on, and signals, become one line on stderr and a non-zero status.

    What needs no Megatron is checked before Megatron is imported, which takes seconds; and all that needs no engine
    before one starts. `ends_process`: nothing comes after this, and no signal is to disturb that.
    """
    from megatron_fipo.slurm_options import flag_value

    is_rank_zero = _is_zero("RANK", "SLURM_PROCID")
    save = flag_value(sys.argv[1:] if arguments is None else arguments, "--save")  # for a signal that comes early
    with Signals(ends_process=ends_process) as signals, contextlib.ExitStack() as last:
        last.callback(remove_own_segments)
        try:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # or else, should the launcher be killed, ranks would write beside those of the next run
                launcher = os.environ.get(LAUNCHER_PID, "")
                end_with_parent(launcher=int(launcher) if launcher.isdecimal() else None)
            from megatron_fipo.arguments import parse_arguments

            try:
                settings = parse_arguments(arguments, _preview)
                _check_started(os.environ)
            except ValueError as error:
                signals.ending()
                return _fail(error, USER_ERROR, is_rank_zero)
            save = settings.run.save
            from megatron_fipo.checks import holds_checkpoints

            signals.set_grace(
                settings.run.exit_grace_s,
                lambda number: _status_at_once(number, save, holds_checkpoints, signals.has_begun, speaks=is_rank_zero),
            )
            return _checked_run(settings, signals, is_rank_zero)
        except KeyboardInterrupt:
            signals.ending()
            number = signals.first or signal.SIGINT  # a user's function may raise it by itself
            return _interrupted(number, save, is_rank_zero)
        except Exception as error:
            signals.ending()
            failure = _rendezvous_failure(error)
            is_lost = failure is None and _is_lost_rank(error)
            others_end = is_lost or failure is not None  # rank 0 takes the ranks' store along
            if signals.received and (others_end or not signals.defers):
                # other ranks end at the same signal, and this one noticed that first; or what it broke off says so: C++
                # code may answer with any error, a ValueError too
                return _interrupted(signals.first, save, is_rank_zero)
            if isinstance(error, ValueError):
                return _fail(
                    error, USER_ERROR, _is_zero("LOCAL_RANK", "SLURM_LOCALID")
                )  # a file may be amiss on a node
            if isinstance(error, OSError) and error.filename is not None:
                return _fail(error, RUN_FAILED, True)  # a full disk, a directory that cannot be written
            if is_lost:
                return _fail(_lost(error), RUN_FAILED, True)
            if failure is not None:
                return _fail(failure, RUN_FAILED, _is_zero("LOCAL_RANK", "SLURM_LOCALID"))
            raise


def _preview(settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    from megatron_fipo.preview import preview

    return preview(settings, os.environ)


def _checked_run(settings: Settings, signals: Signals, is_rank_zero: bool) -> int:
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")  # upstream's notes to its own developers
    from megatron_fipo.checks import check_run
    from megatron_fipo.cuda_environment import settle_cuda_environment
    from megatron_fipo.problems import open_problems

    settle_cuda_environment(settings, os.environ)  # before anything touches a device
    checked = check_run(settings, os.environ)
    with contextlib.ExitStack() as stack:
        problems = None
        if checked.layout.rank == 0 and settings.rollout.replay_rollouts is None:
            problems = stack.enter_context(open_problems(settings))
        stack.callback(signals.ending)  # comes first on the way out
        from megatron_fipo.actor.finite_weights import BrokenWeights
        from megatron_fipo.hybrid.turns import AnotherRankFailed
        from megatron_fipo.rollout.engine import EngineError
        from megatron_fipo.run import run
        from megatron_fipo.trainer.agreement import EngineDisagrees
        from megatron_fipo.trainer.exchange import RankZeroFailed
        from megatron_fipo.trainer.guards import GuardStopped

        try:
            is_finished = run(settings, checked, problems, signals)
        except (EngineError, EngineDisagrees, GuardStopped, BrokenWeights, AnotherRankFailed, RankZeroFailed) as error:
            if signals.received and not signals.defers:  # which broke off what says so
                return _interrupted(signals.first, settings.run.save, is_rank_zero)
            if isinstance(error, RankZeroFailed):
                return RUN_FAILED  # rank 0 says why
            return _fail(error, RUN_FAILED, is_rank_zero)
    return 0 if is_finished else REQUEUE


def _check_started(environment: Mapping[str, str]) -> None:
    """What a batch script can forget; torchrun does not. Raises ValueError."""
    if "RANK" in environment:
        num_ranks, num_tasks = environment.get("WORLD_SIZE", ""), environment.get("SLURM_STEP_NUM_TASKS", "")
        counts = num_ranks.isdecimal() and num_tasks.isdecimal() and "TORCHELASTIC_RUN_ID" not in environment
        if counts and int(num_ranks) < int(num_tasks):
            raise ValueError(
                f"WORLD_SIZE is {num_ranks}, but srun started {num_tasks} tasks: unset RANK, WORLD_SIZE, LOCAL_RANK "
                "and their like in the batch script, or start with torchrun"
            )
        return
    if "SLURM_PROCID" not in environment:
        return
    if "SLURM_STEP_ID" not in environment:  # the variables of a batch script are those of a rank 0
        raise ValueError("this is a Slurm job, but no task of srun: start with srun, or with torchrun")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be set in the batch script: export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        )


def _rendezvous_failure(error: Exception) -> RuntimeError | None:
    """What became of the ranks' first meeting, in a line; None for other errors."""
    from torch.distributed import DistNetworkError, DistStoreError

    if not isinstance(error, DistNetworkError | DistStoreError):
        return None
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    said = str(error).partition("\n")[0]
    if "EADDRINUSE" in said:
        return RuntimeError(
            f"MASTER_PORT is {os.environ['MASTER_PORT']}, where another program listens: choose another"
        )
    if joined := re.search(r"(\d+)/(\d+) clients joined", said):
        return RuntimeError(
            f"only {joined[1]} of {joined[2]} ranks came to {address} (MASTER_ADDR, MASTER_PORT) in time"
        )
    return RuntimeError(f"rank 0 cannot be reached at {address} (MASTER_ADDR, MASTER_PORT): {said}")


def _is_lost_rank(error: Exception) -> bool:
    """Whether this is gloo's or NCCL's word that a rank is gone; others, which Python words alike, are OSErrors."""
    from torch.distributed import DistError

    is_torch_s = type(error) is RuntimeError or isinstance(error, DistError)
    return is_torch_s and any(text in str(error) for text in LOST_CONNECTION)


def _lost(error: Exception) -> RuntimeError:
    """The one line about a rank that is gone, with its machine's address where that is another one."""
    peer = _PEER.search(str(error))
    elsewhere = peer is not None and not peer[1].startswith(("127.", "::1", "0.0.0.0"))
    return RuntimeError(f"{LOST_RANK} (at {peer[1]})" if peer is not None and elsewhere else LOST_RANK)


def _interrupted(number: int, save: str | None, speaks: bool) -> int:
    """A signal ended what could be abandoned without loss: the run has not begun its first step here."""
    if speaks and not _another_rank_failed():
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number if save is None else REQUEUE


def _status_at_once(
    number: int, save: str | None, holds_checkpoints: Callable[[str], bool], has_begun: bool, *, speaks: bool
) -> tuple[int, str]:
    """The status of a run that ends in the middle of something, and what to say of it: the last that it does."""
    remove_own_segments()
    if save is not None and not has_begun:  # as `_interrupted` has it
        return REQUEUE, f"interrupted by {signal.Signals(number).name}, nothing was begun" if speaks else ""
    if save is None or not holds_checkpoints(save):
        return 128 + number, f"interrupted by {signal.Signals(number).name}, nothing was saved" if speaks else ""
    return REQUEUE, f"the run can go on from the last checkpoint in {save}" if speaks else ""


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
    sys.exit(main(ends_process=True))
