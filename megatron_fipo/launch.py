"""torchrun with a quiet end: `python -m megatron_fipo.launch --nproc-per-node 2 -m megatron_fipo.train ...`.

Takes torchrun's arguments and is torchrun, but for two things. When a rank fails, torchrun prints a report and a
traceback of its own, some fifty lines below the one line in which the rank said why: here only a rank that a signal
ended is reported. And a signal is passed on to the ranks, which may take their time to save; torchrun would kill them
after 30 s.

With `--slurm` first it submits the same program as a Slurm job instead (slurm_submit.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import psutil

from megatron_fipo.interruption import LAUNCHER_PID
from megatron_fipo.sheltered import ASKING

FIRST_SIGNAL_STATUS = 128
LEFT_TO_TORCHRUN = "SIGQUIT"
PROGRAM = "megatron_fipo.train"
HANDLER_S = 1.0
"""In which Python's own handler has run, unless the main thread is elsewhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns 0, the status of the rank that failed first, or 128 + the signal that ended it or us.

    With `--slurm`: submit a job.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--slurm"]:
        from megatron_fipo.slurm_submit import main as submit_job

        return submit_job(words[1:])
    program = words.index(PROGRAM) if PROGRAM in words else len(words)
    if "--print-config" in words[program:]:
        return _preview(words)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # what torchrun says about each rank it ends; its own failures are exceptions
    os.environ[LAUNCHER_PID] = str(os.getpid())
    for number in ASKING:
        signal.signal(number, _pass_on)
    _listen_while_waiting()
    try:
        run.main(["--signals-to-handle", LEFT_TO_TORCHRUN, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            said = [other.error_file_data for other in error.failures.values() if "said_aloud" in other.error_file_data]
            if said and not any(data["said_aloud"] for data in said):  # the rank that speaks was ended before it could
                print(f"error: {said[0]['message']['message']}", file=sys.stderr, flush=True)
            return failure.exitcode
        print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr, flush=True)
        return FIRST_SIGNAL_STATUS - failure.exitcode
    except SignalException as error:
        return FIRST_SIGNAL_STATUS + error.sigval
    return 0


def _preview(words: Sequence[str]) -> int:
    """`--print-config`: the program once, in this process, told of as many ranks as the start would have."""
    from torch.distributed.run import determine_local_world_size, parse_args

    from megatron_fipo.train import main as train

    arguments = parse_args(list(words))
    try:
        per_node = determine_local_world_size(arguments.nproc_per_node)
    except ValueError:  # "gpu", and there is none here
        return train(arguments.training_script_args)
    most_nodes = int(str(arguments.nnodes).rpartition(":")[2])
    ranks = {"RANK": 0, "WORLD_SIZE": most_nodes * per_node, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": per_node}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    return train(arguments.training_script_args)


def _listen_while_waiting() -> None:
    """End at a signal while other nodes are waited for. That is in C++, where no handler runs: a thread looks."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=_end_without_ranks, args=(source,), daemon=True).start()


def _end_without_ranks(source: int) -> None:
    while not _ranks():  # once there are some, the handler is enough
        number = os.read(source, 1)[0]
        if number in ASKING and not _ranks():
            time.sleep(HANDLER_S)
            if not _ranks():
                os._exit(FIRST_SIGNAL_STATUS + number)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """To every rank of this node; where there is none yet, there is nothing to wait for."""
    ranks = _ranks()
    if not ranks:
        raise SystemExit(FIRST_SIGNAL_STATUS + number)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if _is_rank(child)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ() and process.pid != os.getpid()
    except psutil.Error:  # it has ended meanwhile
        return False


if __name__ == "__main__":
    sys.exit(main())
