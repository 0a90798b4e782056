"""The patches against the release that the GPU image takes, downloaded: what their README says of it is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROW = re.compile(r"^\| `(\w+)` \| `(megatron\.core[\w.:]+)` \| (same|changed|gone) \|$", re.MULTILINE)


def run(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_patches.py", *arguments]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False, timeout=300)


def test_the_readmes_table_of_megatron_core_0_19_is_true(repo_root: Path) -> None:
    done = run(repo_root, "--megatron-core", "0.19.2")
    assert done.returncode == 1, done.stderr  # some have changed
    found = {tuple(line.split()) for line in done.stdout.splitlines()}
    rows = ROW.findall((repo_root / "patches" / "README.md").read_text())
    assert {(status, f"megatron_cpu/{patch}.py", symbol) for patch, symbol, status in rows} == found
    assert len(found) == 15


def test_what_is_installed_is_what_the_patches_were_written_for(repo_root: Path) -> None:
    done = run(repo_root)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 28
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"same"}


def test_a_release_that_is_not_there_is_one_line(repo_root: Path) -> None:
    done = run(repo_root, "--megatron-core", "0.0.0.1")
    assert done.returncode == 2
    assert re.fullmatch(r"error: megatron-core==0\.0\.0\.1 could not be downloaded: .+", done.stderr.strip())
    assert "Traceback" not in done.stderr
