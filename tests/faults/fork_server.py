"""A process that has imported the program and forks a copy for every run: a start costs milliseconds, not seconds.

Nothing that a fork cannot take over exists before it: no second thread, no process group, no random numbers drawn by
the program. Each copy leads a session of its own, its standard streams are files, and it ends as any interpreter does.
Run as a script this file is the server; it dies with whoever started it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from left_behind import FORKED_SESSIONS

ANSWERS_WITHIN_S = 300.0  # the first time it imports everything, on a machine that may be busy
PRELOADED = ("megatron_fipo.train", "megatron_fipo.run", "megatron_fipo.checks", "megatron_fipo.problems")


class ForkServer:
    """The server, started; a context manager, and leaving it ends every run that is still there."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
        )
        self.statuses: dict[int, int] = {}
        self._received = b""

    def start(
        self, arguments: Sequence[str], faults: Sequence[Mapping[str, Any]], directory: Path, env: Mapping[str, str]
    ) -> ForkedRun:
        """Run the program with `arguments` and `faults` in `directory`; its output goes to files there, by rank."""
        rank = env.get("RANK", "0")
        stdout, stderr = directory / f"stdout-{rank}.txt", directory / f"stderr-{rank}.txt"
        wanted = {
            "arguments": list(arguments),
            "faults": list(faults),
            "directory": str(directory),
            "env": dict(env),
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        while (message := self._next_message(ANSWERS_WITHIN_S)) is None or "started" not in message:
            assert message is not None, f"the fork server does not answer within {ANSWERS_WITHIN_S} s"
            self._note(message)
        FORKED_SESSIONS.add(message["started"])
        return ForkedRun(self, message["started"], stdout, stderr)

    def poll(self, pid: int, timeout_s: float) -> int | None:
        """The status of a run once it has ended (negative: the signal), None when it has not after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while pid not in self.statuses:
            message = self._next_message(deadline - time.monotonic())
            if message is None:
                return None
            self._note(message)
        return self.statuses[pid]

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def _note(self, message: Mapping[str, Any]) -> None:
        self.statuses[message["ended"]] = message["status"]

    def _next_message(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                return None
            received = os.read(descriptor, 1 << 16)
            assert received, f"the fork server ended with {self._process.wait()}"
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


@dataclass(frozen=True)
class ForkedRun:
    """One run of the program, as one rank. `pid` is also its session."""

    server: ForkServer
    pid: int
    stdout_path: Path
    stderr_path: Path

    def poll(self, timeout_s: float = 0.0) -> int | None:
        return self.server.poll(self.pid, timeout_s)

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")


# ---- the server's side


def _serve() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _preload()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started: a fork would lose it"
    buffered = b""
    children: dict[int, int] = {}  # pidfd -> pid
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != 0:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pid = children.pop(key.fd)
                    _reply({"ended": pid, "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
                    continue
                received = os.read(0, 1 << 16)
                if not received:
                    return
                *lines, buffered = (buffered + received).split(b"\n")
                for line in lines:
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        for descriptor in children:
                            os.close(descriptor)
                        _run(json.loads(line))
                    descriptor = os.pidfd_open(pid)
                    children[descriptor] = pid
                    selector.register(descriptor, selectors.EVENT_READ)
                    _reply({"started": pid})


def _reply(message: Mapping[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def _preload() -> None:
    """Import all that a run imports, and compile what numba would compile in each."""
    import numpy as np
    import torch

    for name in (*PRELOADED, "fault_program", "matplotlib.pyplot", "torch.utils.tensorboard"):
        importlib.import_module(name)
    config: Any = importlib.import_module("megatron_fipo.config")
    losses: Any = importlib.import_module("megatron_fipo.losses")
    tokens = torch.from_numpy(np.linspace(-2.0, -1.0, 8, dtype=np.float32))
    mask = torch.ones(8, dtype=torch.bool)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    with torch.no_grad():
        losses.fipo_loss(tokens, tokens + 0.01, tokens, mask, config.FIPOSettings(), cu_seqlens=bounds, denominator=1)
        terms: Any = importlib.import_module("megatron_fipo.ops.fipo_terms")
        terms.scale_sequences(tokens, torch.ones(2, dtype=torch.float64), bounds)
    gc.collect()
    gc.freeze()  # what was imported is not looked through again in every copy


def _run(wanted: Mapping[str, Any]) -> None:
    """Become the run: a session, streams, directory and environment of its own, then the program."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, wanted["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, wanted["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(wanted["directory"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    sys.path[:0] = [wanted["directory"]]
    sys.argv = ["fault_program.py", json.dumps(wanted["faults"]), *wanted["arguments"]]
    program: Any = importlib.import_module("fault_program")
    sys.exit(program.main())


if __name__ == "__main__":
    _serve()
