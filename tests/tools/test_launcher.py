"""megatron_fipo.launch as a process of its own: what ends it, in a line, and what it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_fipo.launch import _check, _weight
from megatron_fipo.train import LOST_RANK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_while_it_waits_for_other_nodes(number: signal.Signals, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", "2", "--node-rank", "0", "--nproc-per-node", "1"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    words = [sys.executable, "-m", "megatron_fipo.launch", *nodes, *meeting, "-m", "megatron_fipo.train"]
    launcher = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=with_temporary_files(tmp_path)
    )
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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "said", "kept"),
    [
        ((), 3, "the rank says why\n", 0),
        (("--redirects", "3"), 3, "", 1),  # the ranks' logs
        (("--nnodes", "2", "--node-rank", "1", "--rdzv-conf", "timeout=1"), 1, "did not meet at 127.0.0.1:", 0),
        (("--nnodes", "2", "--node-rank", "0", "--rdzv-conf", "timeout=1"), 1, "only 1 of 2 nodes came to", 0),
    ],
)
def test_it_ends_with_one_line_and_takes_its_temporary_files_along(
    options: tuple[str, ...], status: int, said: str, kept: int, tmp_path: Path
) -> None:
    program, files = tmp_path / "rank.py", tmp_path / "files"
    program.write_text("import sys\nprint('the rank says why', file=sys.stderr)\nsys.exit(3)\n")
    files.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.launch", *meeting, *options, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=with_temporary_files(files),
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    assert len(list(files.iterdir())) == kept


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--nproc-per-node", "abc"], "--nproc-per-node is 'abc'"),
        (["--nproc-per-node", "0"], "--nproc-per-node is '0'"),
        (["--nnodes", "2:1"], "--nnodes is '2:1'"),
        (["--nnodes", "two"], "--nnodes is 'two'"),
        (["--nnodes", "2", "--node-rank", "2"], "--node-rank is 2"),
    ],
)
def test_a_start_that_cannot_be_is_refused(words: list[str], flag: str) -> None:
    from torch.distributed.run import parse_args

    with pytest.raises(ValueError, match=flag):
        _check(parse_args([*words, "program.py"]))


def test_of_ranks_that_end_together_the_one_that_failed_counts() -> None:
    def ended(status: int, at: int, message: str = "") -> SimpleNamespace:
        said = {"message": {"message": message}, "said_aloud": True} if message else {}
        return SimpleNamespace(exitcode=status, timestamp=at, error_file_data=said)

    failed, killed = ended(1, 5, "no space left"), ended(-9, 6)
    saved, signalled, lost = ended(75, 3), ended(128 + 15, 4), ended(1, 1, f"{LOST_RANK} (at 10.0.0.7)")
    ranks = dict(enumerate([lost, signalled, saved, killed, failed]))
    assert sorted(ranks, key=lambda rank: _weight((rank, ranks[rank]))) == [4, 3, 2, 1, 0]


def with_temporary_files(directory: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(directory)}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
