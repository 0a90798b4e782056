"""The quickstart's own part: which flags it keeps for itself, and how signals reach the run that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# stands in for torchrun: says that it is there, and on SIGTERM ends as torchrun does
RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
print("ready", flush=True)
time.sleep(60)
"""
PROGRAM = f"import sys, quickstart; sys.exit(quickstart._run([sys.executable, '-c', {RUN!r}]))"


@pytest.mark.parametrize("flag", ["--output-dir", "--export-hf=x"])
def test_where_the_output_goes_is_the_quickstarts_to_say(repo_root: Path, tmp_path: Path, flag: str) -> None:
    command = [sys.executable, str(repo_root / "examples/quickstart.py"), "--hf-checkpoint", str(tmp_path), flag, "x"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert refused.returncode == 2
    assert f"error: {flag}: the quickstart reads its own output; say where with --run-dir" in refused.stderr


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 143),
    ],
)
def test_a_signal_to_the_quickstart_alone_ends_the_run(repo_root: Path, sent: list[int], status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=repo_root / "examples",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in sent:
        process.send_signal(number)
        time.sleep(0.3)
    _, stderr = process.communicate(timeout=30)  # returns once the run has let go of the pipes too
    assert (process.returncode, stderr) == (status, "")
