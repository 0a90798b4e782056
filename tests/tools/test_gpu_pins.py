"""What the images install is on the package index, for their Python, and goes together: by metadata, no downloads."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dockerfile import named_pins, stages_of
from gpu_metadata import REQUIRES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

UV = "uv==0.13.9"
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


@pytest.fixture(scope="module")
def uv(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uv")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory), UV]
    subprocess.run(command, check=True, timeout=300)
    return directory / "bin" / "uv"


def resolved(uv: Path, python: str, platform: str, files: list[Path], constraints: Path) -> dict[str, str]:
    """name -> version of all that the files bring; the resolver takes the newest that the constraints allow."""
    command = [
        str(uv),
        "pip",
        "compile",
        "--no-header",
        "--no-annotate",
        "--no-python-downloads",
        "--python",
        sys.executable,
    ]
    command += ["--python-version", python, "--python-platform", platform, "--constraints", str(constraints)]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split("==") for line in done.stdout.splitlines())


def versions(*files: Path) -> dict[str, str]:
    lines = [
        line.partition("#")[0].partition(";")[0].strip() for file in files for line in file.read_text().splitlines()
    ]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): next(iter(each.specifier)).version for each in found}


def test_the_gpu_images_packages_resolve_to_its_constraints(uv: Path, repo_root: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.in"
    named.write_text("\n".join(named_pins(stages_of(repo_root)["gpu"])))
    requirements = repo_root / "requirements"
    files = [*(requirements / name for name in ("build.txt", "gpu.txt", "test.txt")), named]
    constraints = requirements / "gpu-constraints.txt"
    assert resolved(uv, "3.12", "x86_64-manylinux_2_39", files, constraints) == versions(constraints)


def test_the_cpu_images_packages_resolve_to_its_constraints(uv: Path, repo_root: Path) -> None:
    """The package index has a CUDA build of torch: what only that brings is not in the constraints."""
    requirements = repo_root / "requirements"
    files = [requirements / name for name in ("torch.txt", "build.txt", "cpu.txt", "test.txt")]
    found = resolved(uv, "3.11", "x86_64-manylinux_2_36", files, requirements / "constraints.txt")
    of_cuda = {name for name in found if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    wanted = versions(*files, requirements / "constraints.txt")
    assert {name: found[name] for name in found.keys() - of_cuda} == {**wanted, "pip": found["pip"]}
