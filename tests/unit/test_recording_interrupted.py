"""A recording that a signal or a kill breaks off leaves the step's older one, and nothing else for good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.trainer import recording
from megatron_fipo.trainer.recording import read_rollouts, write_rollouts

KILLED = """
import os, signal, sys
from megatron_fipo.trainer import recording
recording.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
recording.write_rollouts(sys.argv[1], 1, [], {"score": 0.5})
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("at", ["fsync", "dumps"])
def test_a_signal_in_the_middle_leaves_no_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write_rollouts(str(tmp_path), 1, [], {"score": 1.0})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recording.os if at == "fsync" else recording.json, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_rollouts(str(tmp_path), 1, [], {"score": 2.0})
    assert names(tmp_path) == ["step_000001.jsonl"]
    assert read_rollouts(str(tmp_path), 1) == ((), {"score": 1.0})


def test_what_a_killed_process_left_is_gone_when_the_step_is_made_again(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step_000001.jsonl.tmp"]
    path = write_rollouts(str(tmp_path), 1, [], {"score": 2.0})
    assert names(tmp_path) == [path.name]
    assert json.loads(path.read_text().splitlines()[0])["metrics"] == {"score": 2.0}
