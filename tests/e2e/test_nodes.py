"""Two nodes, each with a launcher, a rank and an engine of its own; here they share a machine."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from left_behind import nothing_left_behind
from small_run import START_WITHIN_S, command_line, num_steps

TORCHRUN = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")


def node_arguments(arguments: list[str], node: int, port: int) -> list[str]:
    """The command of one of two nodes, from that of a single one."""
    at = arguments.index(TORCHRUN[0])
    assert tuple(arguments[at : at + 4]) == TORCHRUN
    rendezvous = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [*arguments[:at], *rendezvous, *arguments[at + 4 :]]


def test_every_node_starts_an_engine_and_gives_it_the_weights(
    tiny_chat_model: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    arguments = command_line(tiny_chat_model, tmp_path, ranks=1, lr=1e-3, train_iters=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directories = [tmp_path / "node0", tmp_path / "node1"]
    for directory in directories:
        directory.mkdir()
        (directory / "own_reward.py").write_text((tmp_path / "own_reward.py").read_text())
    with nothing_left_behind("nodes"):
        nodes = [
            launch(node_arguments(arguments, node, port), directory=directory)
            for node, directory in enumerate(directories)
        ]
        for node in nodes:
            assert node.wait(START_WITHIN_S) == 0, node.stderr
    assert num_steps(tmp_path) == 2
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for record in records:  # both engines hold the trainer's weights, or their log-probs would be others
        assert record["engine_mismatch/mean"] < 1e-4
        assert record["token_age/max"] == 0
    logs = [(tmp_path / "out" / f"engine-{index}.log").read_text() for index in range(2)]
    for log in logs:
        assert len(re.findall(r"POST /generate HTTP/1.1\" 200", log)) >= 2 or "Prefill batch" in log, log[-2000:]
