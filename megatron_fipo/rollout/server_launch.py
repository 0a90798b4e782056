"""A SGLang server's process, its port and key: started, watched, ended, and started again as it was."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.patches.sglang_cpu.plugin import ASKED_FOR
from megatron_fipo.rollout.interface import interface_name
from megatron_fipo.rollout.process_group import shared_memory_of, stop_process_group
from megatron_fipo.sheltered import sheltered_children

# What torchrun and srun tell the trainer about its own process group; SGLang would take it for its own.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_")
_MODEL_PACKAGE = "megatron_fipo.patches.sglang_cpu.models"
_MODEL_PACKAGE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class ServerStart:
    """All that a server is started with, each time."""

    arguments: Mapping[str, Any]  # SGLang's, without host, port and key
    host: str  # the address it listens on
    tp_size: int
    architecture: str
    use_cpu: bool
    log_path: str


class ServerProcess:
    """A server that was started, in a session and process group of its own: Ctrl-C reaches the trainer alone, which
    then ends it. It ends with this process, however that ends. Every start has a new port and a new random key."""

    def __init__(self, start: ServerStart, *, append_log: bool = False) -> None:
        """Returns at once. The log is readable by its owner only; OSError when the process cannot be started."""
        self.log_path = start.log_path
        self.log_start = Path(start.log_path).stat().st_size if append_log and Path(start.log_path).exists() else 0
        self.api_key = secrets.token_urlsafe(24)
        self._reservation = _reserve_port(start.host)
        self._segments: frozenset[Path] = frozenset()
        self._stopped = False
        port = self._reservation.getsockname()[1]
        self.url = f"http://{start.host}:{port}"
        arguments = {**start.arguments, "host": start.host, "port": port, "api_key": self.api_key}
        with contextlib.ExitStack() as undo:  # what has begun, should the process not start
            undo.enter_context(self._reservation)
            self.scratch_dir = tempfile.mkdtemp(prefix="megatron_fipo_engine_")  # its unix sockets are in it: mode 0700
            undo.callback(shutil.rmtree, self.scratch_dir, ignore_errors=True)
            environment = server_environment(start, self.scratch_dir)
            request = {"server_args": arguments, "use_cpu": start.use_cpu, "scratch_dir": self.scratch_dir}
            self._process = _spawn(request, start.log_path, environment, append_log)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """The server's process id, which is its process group's too."""
        return self._process.pid

    @property
    def end(self) -> str | None:
        """How the process ended, None while it lives."""
        if self._stopped:
            return "has been shut down"
        status = self._process.poll()
        if status is None:
            return None
        return f"ended with {f'signal {-status}' if status < 0 else f'exit status {status}'}"

    def note_segments(self) -> None:
        """Remember the shared memory the process uses now: one that fails takes its maps along."""
        self._segments |= shared_memory_of(self.pid)

    def release_port(self) -> None:
        """To be called once the server listens."""
        self._reservation.close()

    def stop(self) -> None:
        """End the process and all it started, remove what they would leave behind. May be called again."""
        if self._stopped:
            return
        self._stopped = True
        self._reservation.close()
        # The group goes first: its leader would race us for the clean-up once it sees stdin close.
        stop_process_group(self.pid, self.scratch_dir, self._segments)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a launcher told the trainer about its process group."""
    return {
        key: value
        for key, value in environment.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith(_LAUNCHER_PREFIXES)
    }


def server_environment(start: ServerStart, scratch_dir: str) -> dict[str, str]:
    """The environment of a server's process."""
    environment = without_launcher(os.environ)
    environment["TMPDIR"] = scratch_dir
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["HF_HUB_OFFLINE"] = "1"
    # The run asks for a few tokens more than it uses, which may be more than the model's own longest context.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    # Asking after an engine's health must not make it generate: anyone may, and batches must not depend on it.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    # gloo carries pickles between an engine's own ranks, all on this machine; NCCL only carries weights.
    environment["GLOO_SOCKET_IFNAME"] = interface_name("127.0.0.1")
    environment["NCCL_SOCKET_IFNAME"] = interface_name(start.host)
    environment["FORWARDED_ALLOW_IPS"] = "127.0.0.1"  # nobody else may claim another address (uvicorn)
    if not start.use_cpu:
        environment.pop("TORCHDYNAMO_DISABLE", None)  # of a shell in which something ran on the CPU
        return environment
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["TORCHDYNAMO_DISABLE"] = "1"
    environment[ASKED_FOR] = "1"
    if start.tp_size > 1:
        cpus = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cpus[rank % len(cpus)]) for rank in range(start.tp_size)
        )
    if start.architecture in _MODEL_PACKAGE_ARCHITECTURES:
        environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = _MODEL_PACKAGE
    return environment


def _spawn(
    request: dict[str, Any], log_path: str, environment: dict[str, str], append_log: bool
) -> subprocess.Popen[bytes]:
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append_log else os.O_TRUNC), 0o600)
    try:
        with sheltered_children():
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fipo.rollout.server"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
    finally:
        os.close(log)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _reserve_port(host: str) -> socket.socket:
    """A socket bound to a free port. It never listens: SO_REUSEADDR lets the server bind the port as well."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind((host, 0))
    except BaseException:
        reservation.close()
        raise
    return reservation
