"""The program of an engine's process: `python -m megatron_fipo.rollout.server`, one SGLang HTTP server.

Reads one line of JSON from stdin: `{"server_args": {...}, "use_cpu": bool, "scratch_dir": "..."}`, where server_args
are SGLang's ServerArgs. Stdin then stays open for as long as the trainer wants the engine: its end, or the trainer's
death, ends this process and its whole process group (SGLang's schedulers and detokenizer).
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from megatron_fipo.rollout.interface import LOOPBACK
from megatron_fipo.rollout.request_filter import RequestFilter

_PARENT_POLL_INTERVAL_S = 0.5


def main() -> int:
    """Serve until the trainer lets go. Returns SGLang's exit status."""
    parent_pid = os.getppid()
    request: dict[str, Any] = json.loads(_read_line(sys.stdin.fileno()))
    watched = (sys.stdin.fileno(), parent_pid, request["scratch_dir"])
    threading.Thread(target=_die_with_trainer, args=watched, daemon=True).start()
    _keep_out_of_logs(request["server_args"]["api_key"])
    serve(request["server_args"], use_cpu=request["use_cpu"])
    return 0


def serve(server_args: dict[str, Any], *, use_cpu: bool) -> None:
    """Run SGLang's HTTP server in this process; with `use_cpu` after applying the CPU patches, else untouched."""
    if use_cpu:
        from megatron_fipo.patches.sglang_cpu.apply import apply_sglang_cpu

        apply_sglang_cpu()
    from sglang.srt.entrypoints import http_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    http_server.app.add_middleware(RequestFilter)
    store = _serve_rendezvous()  # held while this process serves
    if use_cpu:
        http_server.launch_server(ServerArgs(**server_args), execute_warmup_func=_declare_up)
    else:
        http_server.launch_server(ServerArgs(**server_args))
    del store


def _serve_rendezvous() -> Any:
    """A store on loopback, at which this engine's ranks meet. They would serve one on every address of the machine.

    torch's ranks join a store that is already served where TORCHELASTIC_USE_AGENT_STORE says so; SGLang takes its
    address from SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE. All children of this process inherit both.
    """
    from torch.distributed import TCPStore

    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno())
        listener.detach()  # it is the store's now
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"tcp://{LOOPBACK}:{port}"
    return store


def _declare_up(server_args: Any) -> bool:
    """In place of SGLang's warm-up, which generates: a CPU has nothing to warm up. Waits for the port, because SGLang
    calls its own HTTP interface next."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex((server_args.host, server_args.port)) == 0:
                http_server.get_global_state().tokenizer_manager.server_status = ServerStatus.Up
                return True
        time.sleep(0.05)
    return False


def _read_line(fd: int) -> bytes:
    """One line from `fd`, unbuffered: what follows the line must stay visible to select."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            raise ValueError("stdin ended before a whole line of JSON had been read")
        line += chunk
    return line


def _die_with_trainer(fd: int, parent_pid: int, scratch_dir: str) -> None:
    """End this process group once stdin ends, or once the parent is gone (a fork of it may still hold the pipe)."""
    while os.getppid() == parent_pid:
        readable, _, _ = select.select([fd], [], [], _PARENT_POLL_INTERVAL_S)
        if readable and not os.read(fd, 1 << 16):
            break
    assert os.getpgid(0) == os.getpid(), "the engine must lead its own process group"
    from megatron_fipo.rollout.process_group import stop_process_group

    try:
        stop_process_group(os.getpid(), scratch_dir)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _keep_out_of_logs(secret: str) -> None:
    """SGLang logs all its arguments, the API key among them."""
    make_record = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        message = record.getMessage()
        if secret in message:
            record.msg, record.args = message.replace(secret, "<hidden>"), ()
        return record

    logging.setLogRecordFactory(make_redacted)


if __name__ == "__main__":
    sys.exit(main())
