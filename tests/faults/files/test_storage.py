"""A disk that is full, read-only or failing: the error names the path, what was there stays, the next write works."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import FaultTable
from processes import run_ranks

KINDS = {"fails with": "failing fsync, rename or mkdir", "no file": "write refused", "disk": "disk full (tmpfs)"}


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path | None]:
    """A tmpfs of 8 MB, and one for `tmp_path/run`, where flushing is quick; None where mounting is not allowed."""
    directories = {tmp_path / "disk": "8m", tmp_path / "run": "512m"}
    done = []
    try:
        for directory, size in directories.items():
            directory.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                done.append(directory)
        yield tmp_path / "disk" if len(done) == len(directories) else None
    finally:
        for directory in done:
            subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("choice", [True, pytest.param(False, marks=pytest.mark.full_only)])
def test_what_cannot_be_written_is_named_and_what_was_there_stays(
    model_dir: Path, tmp_path: Path, mounted: Path | None, faults: FaultTable, choice: bool
) -> None:
    kwargs = {"model_dir": str(model_dir), "directory": str(tmp_path / "run"), "choice": choice}
    kwargs["mounted"] = str(mounted) if mounted is not None else None
    (found,) = run_ranks(tmp_path, 1, "files.failing_storage:fail_everything", kwargs, 400)
    for name, outcome in found.items():
        kind = next((kind for word, kind in KINDS.items() if word in name), "read-only directory")
        is_whole = "BROKEN" not in outcome["after"] and outcome["after"] is not None
        # a call after the new state was in place may fail: then the new state is whole
        unharmed = outcome["error"] == "no error" or outcome["where"] in outcome["error"]
        moved_on = outcome["then"] != outcome["before"] and "BROKEN" not in outcome["then"]
        faults.record(kind, name, str(outcome), is_whole and unharmed and moved_on)
    assert len(found) > 30
    assert not faults.failed, "\n".join(f"{fault.name}: {fault.outcome}" for fault in faults.failed)
