"""What outlives a fault test is found and ended, however far it has moved from the test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import left_behind
import pytest
from left_behind import SHARED_MEMORY, nothing_left_behind


def test_a_process_of_a_process_that_left_its_session_is_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "ON_THEIR_WAY_OUT_S", 0.5)
    program = (
        "import subprocess\n"
        "print(subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=subprocess.DEVNULL).pid)"
    )
    started = []
    with pytest.raises(AssertionError, match=r"left running: .*sleep 60"), nothing_left_behind("outer"):
        started.append(int(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout))
    deadline = time.monotonic() + 5.0
    while Path(f"/proc/{started[0]}/cmdline").exists() and Path(f"/proc/{started[0]}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


def test_shared_memory_that_nobody_uses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "ON_THEIR_WAY_OUT_S", 0.5)
    path = SHARED_MEMORY / f"psm_{uuid.uuid4()}"
    try:
        with pytest.raises(AssertionError, match=path.name), nothing_left_behind("segment"):
            path.write_bytes(b"left")
    finally:
        path.unlink()


def test_what_ends_in_time_is_not_left_behind() -> None:
    with nothing_left_behind("quick"):
        assert os.environ[left_behind.MARK].endswith("-quick")
        process = subprocess.Popen(["sleep", "0.3"])
    assert process.wait() == 0
