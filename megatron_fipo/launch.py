"""torchrun with a quiet end: `python -m megatron_fipo.launch --nproc-per-node 2 -m megatron_fipo.train ...`.

Takes torchrun's arguments and is torchrun, but for three things. When a rank fails, or the nodes do not meet, torchrun
prints a report and a traceback of its own, some fifty lines below the one line in which the rank said why: here it is
a line. A signal is passed on to the ranks, which may take their time to save; torchrun would kill them after 30 s. And
the directory that torchrun makes for every start is removed, unless logs were asked for.

With `--slurm` first it submits the same program as a Slurm job instead (slurm_submit.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

import psutil

from megatron_fipo.config import require
from megatron_fipo.interruption import LAUNCHER_PID, REQUEUE
from megatron_fipo.sheltered import ASKING
from megatron_fipo.train import LOST_RANK, RUN_FAILED, USER_ERROR

FIRST_SIGNAL_STATUS = 128
LEFT_TO_TORCHRUN = "SIGQUIT"
TORCH_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
PROGRAM = "megatron_fipo.train"
SLURM_HINT = "python -m megatron_fipo.launch --slurm ... submits a Slurm job (--slurm --help). Otherwise:"
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
    run = _quiet_torchrun()
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    os.environ[LAUNCHER_PID] = str(os.getpid())
    for number in ASKING:
        signal.signal(number, _pass_on)
    parsed = _parsed(run, words)
    try:
        _check(parsed)
        with _own_logs(parsed) as options:
            return _run(run, ["--signals-to-handle", LEFT_TO_TORCHRUN, *options, *words])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except (DistNetworkError, DistStoreError, RendezvousError) as error:
        print(f"error: {_why_not_met(error, parsed)}", file=sys.stderr)
        return RUN_FAILED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_FAILED


def _run(run: ModuleType, words: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(words)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=_weight)
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


def _weight(ended: tuple[int, Any]) -> tuple[int, int]:
    """Of ranks that ended between two looks the smallest counts: before those that a signal ended one that failed, last
    one that only lost another; then the first."""
    _, failure = ended
    message = failure.error_file_data.get("message", {})
    is_lost = isinstance(message, dict) and message.get("message", "").startswith(LOST_RANK)
    number = -failure.exitcode if failure.exitcode < 0 else failure.exitcode - FIRST_SIGNAL_STATUS
    is_asked = failure.exitcode == REQUEUE or number in ASKING
    return 2 if is_lost else int(is_asked), failure.timestamp


def _parsed(run: ModuleType, words: Sequence[str]) -> Namespace:
    """torchrun's arguments; ends with status 2 where it does not take them."""
    if words[:1] in (["-h"], ["--help"]):
        print(f"{SLURM_HINT}\n", flush=True)
    return run.parse_args(words)


def _quiet_torchrun() -> ModuleType:
    """torch.distributed.run, whose failures are exceptions: what it and its C++ part log about them is dropped."""
    said = os.environ.get(TORCH_LOG_LEVEL)
    os.environ[TORCH_LOG_LEVEL] = "FATAL"  # read at the import; not for the ranks
    from torch.distributed import run

    del os.environ[TORCH_LOG_LEVEL]
    if said is not None:
        os.environ[TORCH_LOG_LEVEL] = said
    logging.disable(logging.ERROR)
    return run


def _check(arguments: Namespace) -> None:
    """What torchrun would answer with a traceback, or with no end. Raises ValueError."""
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    found = re.fullmatch(r"\d+(:\d+)?", arguments.nnodes)
    least, most = parse_min_max_nnodes(arguments.nnodes) if found else (0, 0)
    require(0 < least <= most, "--nnodes", arguments.nnodes, "a number of nodes, or the least and the most as in 1:4")
    try:
        num_ranks = determine_local_world_size(arguments.nproc_per_node)
    except ValueError as error:
        raise ValueError(f"--nproc-per-node is {arguments.nproc_per_node!r}: {error}") from error
    require(num_ranks > 0, "--nproc-per-node", arguments.nproc_per_node, "at least 1")
    if arguments.rdzv_backend == "static":
        require(0 <= arguments.node_rank < most, "--node-rank", arguments.node_rank, f"in [0, {most}), see --nnodes")


@contextlib.contextmanager
def _own_logs(arguments: Namespace) -> Iterator[list[str]]:
    """torchrun's option for a directory that goes with this process; none where the user wants logs of the ranks.

    Ranks leave word of their errors there.
    """
    if arguments.log_dir is not None or (arguments.redirects, arguments.tee) != ("0", "0"):
        _listen_while_waiting(None)
        yield []
        return
    directory = tempfile.mkdtemp(prefix="megatron_fipo_launch_")
    _listen_while_waiting(directory)
    try:
        yield ["--log-dir", directory]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _why_not_met(error: Exception, arguments: Namespace) -> str:
    """What became of the nodes' meeting, in a line."""
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or 29500}"
    said = " ".join(str(error).partition("\n")[0].split())
    if "EADDRINUSE" in said:
        return f"another program listens at {endpoint}: choose another --master-port, or --rdzv-endpoint"
    where = f"{endpoint} (--master-addr and --master-port, or --rdzv-endpoint)"
    if joined := re.search(r"(\d+)/(\d+) clients joined", said):
        return f"only {joined[1]} of {joined[2]} nodes came to {where} in time"
    return f"the {arguments.nnodes} nodes (--nnodes) did not meet at {where}: {said or type(error).__name__}"


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


def _listen_while_waiting(directory: str | None) -> None:
    """End at a signal while other nodes are waited for, and take `directory` along. That is in C++, where no handler
    runs: a thread looks."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=_end_without_ranks, args=(source, directory), daemon=True).start()


def _end_without_ranks(source: int, directory: str | None) -> None:
    while not _ranks():  # once there are some, the handler is enough
        number = os.read(source, 1)[0]
        if number in ASKING and not _ranks():
            time.sleep(HANDLER_S)
            if not _ranks():
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)
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
