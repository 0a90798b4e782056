"""megatron_fipo.launch as a process of its own: what ends it while no rank is there yet."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_waits_for_other_nodes(number: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", "2", "--node-rank", "0", "--nproc-per-node", "1"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    words = [sys.executable, "-m", "megatron_fipo.launch", *nodes, *meeting, "-m", "megatron_fipo.train"]
    launcher = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1)
        launcher.send_signal(number)
        _, said = launcher.communicate(timeout=15)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 128 + number
    assert "Traceback" not in said


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
