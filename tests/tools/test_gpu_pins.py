"""The table of what the GPU image's packages demand is what the package index says: their metadata, no downloads."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu_metadata import REQUIRES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

LINUX = {"platform_system": "Linux", "sys_platform": "linux", "python_version": "3.12", "extra": ""}


def metadata_of(release: str, directory: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    options = ["--report", "-", "--target", str(directory), "--python-version", "3.12", "--only-binary=:all:"]
    done = subprocess.run([*command, *options, release], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"the package index did not answer for {release}: {done.stderr[-500:]}"
    found = json.loads(done.stdout)["install"][0]["metadata"]
    requires = {"python": found["requires_python"]}
    for text in found.get("requires_dist", []):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(LINUX):
            requires[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return requires


@pytest.mark.parametrize("release", REQUIRES)
def test_the_index_says_the_same(release: str, tmp_path: Path) -> None:
    found = metadata_of(release, tmp_path)
    for name, wanted in REQUIRES[release].items():
        assert SpecifierSet(found[name]) == SpecifierSet(wanted), name


def test_transformer_engine_has_the_extras_that_are_asked_for(tmp_path: Path) -> None:
    [release] = [name for name in REQUIRES if name.startswith("transformer-engine==")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(tmp_path), release], check=True, timeout=300)
    [wheel] = tmp_path.glob("transformer_engine-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    for extra, brings in (
        ("core-cu13", "transformer_engine_cu13==2.20.2"),
        ("pytorch", "transformer_engine_torch==2.20.2"),
    ):
        assert f'Requires-Dist: {brings}; extra == "{extra}"' in text
