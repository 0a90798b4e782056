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
    """A tmpfs of 8 MB; None where mounting is not allowed."""
    directory = tmp_path / "disk"
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    try:
        yield directory if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
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
    assert len(found) > 40
    assert not faults.failed, "\n".join(f"{fault.name}: {fault.outcome}" for fault in faults.failed)
