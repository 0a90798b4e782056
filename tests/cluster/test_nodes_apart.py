"""Two machines with addresses of their own, started by hand: torchrun, our launcher, and a cable that is pulled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from namespaces import Node
from slurm_cluster import wait_for
from slurm_jobs import replayed_flags
from small_run import START_WITHIN_S, command_line, num_steps

PORT = 29500  # each pair of nodes has ports of its own
TORCHRUN = "torch.distributed.run"
LAUNCHER = "megatron_fipo.launch"
NODE_TIMEOUT_S = 8
ENDS_WITHIN_S = 90.0

Start = Callable[..., "subprocess.Popen[bytes]"]


def start_all(
    start: Start, nodes: tuple[Node, Node], launcher: str, program: list[str], directory: Path
) -> list[tuple[Any, Path]]:
    """One launcher per node with one rank each, and where it writes."""
    launched = []
    for index, node in enumerate(nodes):
        words = [
            *(sys.executable, "-m", launcher, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={index}"),
            *(f"--master-addr={nodes[0].address}", f"--master-port={PORT}", *program),
        ]
        output = directory / f"output-{node.name}.txt"
        launched.append((start(node, words, output, directory), output))
    return launched


def has_ended(launched: list[tuple[Any, Path]]) -> bool:
    return any(process.poll() is not None for process, _ in launched)


def test_torchrun_on_two_machines_trains_with_an_engine_on_each(
    nodes: tuple[Node, Node], start: Start, inputs: Path, tmp_path: Path
) -> None:
    arguments = command_line(inputs / "model", tmp_path, ranks=1, lr=1e-3, train_iters=2)
    program = arguments[arguments.index("megatron_fipo.train") - 1 :]
    for launched, output in start_all(start, nodes, TORCHRUN, program, tmp_path):
        assert launched.wait(START_WITHIN_S) == 0, output.read_text()[-3000:]
    assert num_steps(tmp_path) == 2
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for record in records:  # both engines hold the trainer's weights, or their log-probs would be others
        assert record["engine_mismatch/mean"] < 1e-4
        assert record["token_age/max"] == 0
    for index, node in enumerate(nodes):  # each listens on its own machine's address, and nowhere else
        log = (tmp_path / "out" / f"engine-{index}.log").read_text()
        assert f"'host': '{node.address}'" in log
        assert re.search(r"POST /generate HTTP/1.1\" 200|Prefill batch", log)


def test_a_cable_that_is_pulled_ends_the_run_on_both_machines_with_a_reason(
    nodes: tuple[Node, Node], start: Start, inputs: Path, tmp_path: Path
) -> None:
    flags = replayed_flags(inputs, train_iters=50, node_timeout_s=NODE_TIMEOUT_S, distributed_timeout_minutes=60)
    launched = start_all(start, nodes, LAUNCHER, ["-m", "megatron_fipo.train", *flags], tmp_path)
    wait_for("two steps", lambda: num_steps(tmp_path) >= 2 or has_ended(launched), START_WITHIN_S)
    assert not has_ended(launched), launched[0][1].read_text()[-3000:]
    nodes[1].wire("down")
    began = time.monotonic()
    for (process, output), other in zip(launched, reversed(nodes)):
        assert process.wait(ENDS_WITHIN_S) == 1, output.read_text()[-3000:]
        said = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
        assert said == [f"error: another rank ended, or cannot be reached any more (at {other.address})"]
        assert "Traceback" not in output.read_text()
    assert time.monotonic() - began < NODE_TIMEOUT_S + 60.0


def test_a_machine_that_vanishes_while_data_is_under_way_to_it_is_noticed_in_time(
    nodes: tuple[Node, Node], start: Start, tmp_path: Path
) -> None:
    """Linux alone would go on sending for a quarter of an hour, and does not probe meanwhile."""
    (tmp_path / "read.py").write_text(
        f"import socket\npeer, _ = socket.create_server(('', {PORT})).accept()\nwhile peer.recv(1 << 20): pass\n"
    )
    (tmp_path / "send.py").write_text(
        "import socket, time\n"
        "from megatron_fipo.connections import notice_lost_machines\n"
        "deadline = time.monotonic() + 30.0\n"
        "while True:\n"
        "    try:\n"
        f"        peer = socket.create_connection(('{nodes[1].address}', {PORT}))\n"
        "        break\n"
        "    except ConnectionRefusedError:\n"
        "        assert time.monotonic() < deadline\n"
        "        time.sleep(0.1)\n"
        "notice_lost_machines(4)\n"
        "print('up', flush=True)\n"
        "while True:\n"
        "    peer.sendall(bytes(1 << 16))\n"
    )
    start(nodes[1], [sys.executable, "read.py"], tmp_path / "read.txt", tmp_path)
    sender = start(nodes[0], [sys.executable, "send.py"], tmp_path / "send.txt", tmp_path)
    wait_for("a connection", lambda: "up" in (tmp_path / "send.txt").read_text())
    time.sleep(1.0)
    assert sender.poll() is None, (tmp_path / "send.txt").read_text()
    nodes[1].wire("down")
    began = time.monotonic()
    assert sender.wait(30.0) == 1
    assert time.monotonic() - began > 3.0
    assert re.search("BrokenPipeError|ConnectionResetError", (tmp_path / "send.txt").read_text())
