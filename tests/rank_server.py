"""A process that has imported what ranks import and forks a copy for each: a rank starts in milliseconds instead of the
seconds that torch, megatron-core and transformers take to import and the loss to compile.

Nothing that a fork cannot take over exists before it: no second thread, no process group. Each copy leads a session of
its own, its standard streams are files, and it ends as any interpreter does. Run as a script this file is the server;
it ends with whoever started it.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
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
from importlib import import_module
from pathlib import Path
from typing import Any

ANSWERS_WITHIN_S = 300.0  # the first time it imports everything, on a machine that may be busy
PRELOADED = ("actor_on_ranks", "checkpoint_on_ranks", "tiny_models", "transformers", "megatron_fipo.run")
MARKS = ("FAULT_TEST",)  # variables by which a test recognises what it started itself


class RankServer:
    """The server, started. One of these serves a whole test run."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in env.items() if name not in MARKS},
            start_new_session=True,  # Ctrl-C is for the tests, with which it ends
        )
        self._statuses: dict[int, int] = {}
        self._received = b""

    def start(
        self, arguments: Sequence[str], directory: Path, env: Mapping[str, str], stdout: Path, stderr: Path
    ) -> ForkedRank:
        """A rank that runs `processes.py` with `arguments` in `directory`."""
        wanted = {"arguments": list(arguments), "directory": str(directory), "env": dict(env)}
        wanted |= {"stdout": str(stdout), "stderr": str(stderr)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        while (message := self._next_message(ANSWERS_WITHIN_S)) is None or "started" not in message:
            assert message is not None, f"the server of ranks does not answer within {ANSWERS_WITHIN_S} s"
            self._statuses[message["ended"]] = message["status"]
        self._statuses.pop(message["started"], None)  # of an earlier rank that had the same number
        return ForkedRank(self, message["started"])

    def status_of(self, pid: int) -> int | None:
        """How a rank ended (negative: by a signal), None while it runs."""
        while pid not in self._statuses and (message := self._next_message(0.0)) is not None:
            self._statuses[message["ended"]] = message["status"]
        return self._statuses.get(pid)

    def close(self) -> None:
        """End the server, and with it every rank."""
        self._process.kill()
        self._process.wait()

    def _next_message(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                return None
            received = os.read(descriptor, 1 << 16)
            assert received, f"the server of ranks ended with {self._process.wait()}"
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


@dataclass(frozen=True)
class ForkedRank:
    """A rank that was forked. `pid` is also its session."""

    server: RankServer
    pid: int

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self.server.status_of(self.pid)

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.01)
        return status


@functools.cache
def rank_server(python_path: str) -> RankServer:
    """This process's server, started by the first who asks."""
    server = RankServer({**os.environ, "PYTHONPATH": python_path})
    atexit.register(server.close)
    return server


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
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        import_module(name)
    from transformers import AutoModelForCausalLM  # noqa: F401

    from megatron_fipo.config import FIPOSettings
    from megatron_fipo.losses import fipo_loss
    from megatron_fipo.ops.fipo_terms import scale_sequences

    for dtype in (torch.float32, torch.float64):  # compiles the loss, without and with token weights
        tokens = torch.linspace(-2.0, -1.0, 8, dtype=dtype)
        mask, bounds = torch.ones(8, dtype=torch.bool), torch.tensor([0, 3, 8], dtype=torch.int32)
        for weights in (None, tokens):
            fipo_loss(tokens, tokens, tokens, mask, FIPOSettings(), cu_seqlens=bounds, token_weights=weights)
        scale_sequences(tokens, torch.ones(2, dtype=torch.float64), bounds)  # a backward pass would start a thread
    gc.collect()
    gc.freeze()  # what was imported is not looked through again in every copy


def _run(wanted: Mapping[str, Any]) -> None:
    """Become the rank: a session, streams, directory and environment of its own, then `processes.py`."""
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
    import_module("processes").rank_main(*wanted["arguments"])
    sys.exit(0)


if __name__ == "__main__":
    _serve()
