"""Runs a function, or a command, on N fresh processes that form one torch.distributed job on this machine.

Every rank of a command is a clean interpreter; those of a function are forked from one that has everything imported,
unless they are to be fresh. Each is in a session of its own, so that a rank and whatever it started can be ended by the
process group it leads. As torchrun does, the parent serves the rendezvous store on a port the operating system chose
and keeps, so no port is guessed. Run as a script this file is the rank's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rank_server import rank_server

REPO_ROOT = Path(__file__).resolve().parent.parent
TESTS = REPO_ROOT / "tests"
TAIL_CHARS = 4000


@dataclass(frozen=True)
class RankOutput:
    """How one rank ended. `returncode` is negative for a signal, as in subprocess; `output` is stdout and stderr."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Rank(Protocol):
    """A process that was started, as subprocess.Popen is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


StartRank = Callable[[Path, int, Mapping[str, str]], Rank]  # (directory, rank, environment): logs go to `_logs`


@dataclass(frozen=True)
class RunRanks:
    """The `run_ranks` fixture: a directory, and the two ways to use it."""

    directory: Path

    def __call__(
        self,
        num_ranks: int,
        target: str | Callable[..., Any],
        kwargs: Mapping[str, Any] | None = None,
        timeout_s: float = 120.0,
        *,
        init_process_group: bool = True,
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> list[Any]:
        options: dict[str, Any] = {"init_process_group": init_process_group, "env": env, "fresh": fresh}
        return run_ranks(self.directory, num_ranks, target, kwargs, timeout_s, **options)

    def command(
        self,
        num_ranks: int,
        arguments: Sequence[str],
        timeout_s: float = 300.0,
        *,
        env: Mapping[str, str] | None = None,
    ) -> list[RankOutput]:
        return run_command_on_ranks(self.directory, num_ranks, arguments, timeout_s, env=env)


def run_ranks(
    directory: Path,
    num_ranks: int,
    target: str | Callable[..., Any],
    kwargs: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
    *,
    init_process_group: bool = True,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> list[Any]:
    """Call `target(**kwargs)` on every rank; return what each rank returned, in rank order.

    With `fresh` every rank is a new interpreter, for what must happen before megatron-core is imported or used. `env`
    reaches libraries that read it when they are imported only there.
    `target` is "module:function" (tests/ and its folders are on the path) or a module-level function, which is found
    again by its file. Arguments and results are tensors and plain data (what `torch.load(weights_only=True)` reads).
    A gloo process group is up during the call unless `init_process_group` is False. Raises AssertionError with the
    output's tail of every rank when one fails, or when `timeout_s` have passed; no process outlives the call.
    """
    run = Path(directory) / f"ranks-{time.monotonic_ns()}"
    run.mkdir(parents=True)
    name = target if isinstance(target, str) else f"{sys.modules[target.__module__].__file__}:{target.__qualname__}"
    torch.save(dict(kwargs or {}), run / "kwargs.pt")
    arguments = [name, str(run), "gloo" if init_process_group else "none"]
    command = [str(Path(__file__).resolve()), *arguments]
    start = _started(command) if fresh else _forked(arguments)
    outputs = _run_on_ranks(run, num_ranks, start, name, timeout_s, env)
    if any(output.returncode for output in outputs):
        raise AssertionError(f"{name} failed\n{_tails(outputs)}")
    return [torch.load(run / f"result-{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def run_command_on_ranks(
    directory: Path,
    num_ranks: int,
    arguments: Sequence[str],
    timeout_s: float = 300.0,
    *,
    env: Mapping[str, str] | None = None,
) -> list[RankOutput]:
    """Run `python *arguments` on every rank under torchrun's environment variables; return how each rank ended.

    When one rank fails the others get 2 s to fail too and are then killed. Raises AssertionError on time-out.
    """
    return _run_on_ranks(directory, num_ranks, _started(arguments), " ".join(arguments), timeout_s, env)


def _run_on_ranks(
    directory: Path, num_ranks: int, start: StartRank, what: str, timeout_s: float, env: Mapping[str, str] | None
) -> list[RankOutput]:
    Path(directory).mkdir(parents=True, exist_ok=True)
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_s)
    )
    ranks: list[Rank] = []
    try:
        for rank in range(num_ranks):
            ranks.append(start(Path(directory), rank, rank_environment(rank, num_ranks, store.port, env)))
        in_time = _wait(ranks, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            _end_session(process)
        del store
    outputs = [
        RankOutput(process.wait(), *(path.read_text(errors="replace") for path in _logs(directory, rank)))
        for rank, process in enumerate(ranks)
    ]
    if not in_time:
        raise AssertionError(f"{what} on {num_ranks} ranks took over {timeout_s} s\n{_tails(outputs)}")
    return outputs


def _started(arguments: Sequence[str]) -> StartRank:
    """Ranks that are new interpreters, `python *arguments`."""

    def start(directory: Path, rank: int, env: Mapping[str, str]) -> Rank:
        with contextlib.ExitStack() as files:
            stdout, stderr = (files.enter_context(path.open("wb")) for path in _logs(directory, rank))
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=directory,
                env=dict(env),
                start_new_session=True,
            )

    return start


def _forked(arguments: Sequence[str]) -> StartRank:
    """Ranks that are forked, and run this file's `rank_main(*arguments)`."""

    def start(directory: Path, rank: int, env: Mapping[str, str]) -> Rank:
        return rank_server(env["PYTHONPATH"]).start(arguments, directory, env, *_logs(directory, rank))

    return start


def processes_in_session(leader: int) -> list[int]:
    """Ids of the living processes whose session is `leader`'s: what a command started, wherever its parent went."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _logs(directory: Path, rank: int) -> tuple[Path, Path]:
    return Path(directory) / f"stdout-{rank}.log", Path(directory) / f"stderr-{rank}.log"


def rank_environment(rank: int, num_ranks: int, port: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of one rank of a job whose store is served at `port`, as torchrun sets it; `extra` wins."""
    path = [str(TESTS), *(str(folder) for folder in sorted(TESTS.iterdir()) if folder.is_dir()), str(REPO_ROOT)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is already served: rank 0 joins it like the others
        "TORCHELASTIC_RESTART_COUNT": "0",
        **(extra or {}),
    }


def _wait(ranks: Sequence[Rank], deadline: float) -> bool:
    """True when every rank ended in time, or one failed and the others had their grace."""
    failed_at: float | None = None
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if all(code is not None for code in codes):
            return True
        if failed_at is None and any(code for code in codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + 2.0:
            return True
        time.sleep(0.02)
    return False


def _end_session(process: Rank) -> None:
    """Kill what is left of the rank and of everything it started in its session."""
    for pid in processes_in_session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _tails(outputs: Sequence[RankOutput]) -> str:
    return "\n".join(
        f"--- rank {rank} ended with {output.returncode}:\n{output.output[-TAIL_CHARS:]}"
        for rank, output in enumerate(outputs)
    )


# ---- the rank's side


@contextlib.contextmanager
def _process_group(backend: str) -> Iterator[None]:
    if backend == "none":
        yield
        return
    torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        # gloo's threads need the interpreter once more to drop their last tensors, and abort where it is ending
        time.sleep(0.05)
        torch.distributed.destroy_process_group()


def _load(name: str) -> Callable[..., Any]:
    where, _, function = name.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None, where
        assert spec.loader is not None, where
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return getattr(module, function)


def rank_main(name: str, directory: str, backend: str) -> None:
    """Call the function called `name` with the arguments in `directory`, and leave there what it returns."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the test run, however that ends
    torch.set_num_threads(1)
    kwargs = torch.load(Path(directory) / "kwargs.pt", weights_only=True)
    with _process_group(backend):
        result = _load(name)(**kwargs)
    torch.save(result, Path(directory) / f"result-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
