"""The set-up and test scripts: what they say about a machine that does not fit, and that Ctrl-C ends everything.

The scripts run in a copy of what they need, with stand-ins for Python and pip, so nothing is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import processes_in_session

FAKE_PYTHON = r"""#!/usr/bin/env bash
# stands in for python3.11 and for .venv/bin/python
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3 11}" ;;
    --version) echo "Python 3.11.2" ;;
    *ensurepip*) exit "${FAKE_ENSUREPIP:-0}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        echo "$*" >>"$FAKE_CALLS"
        if [[ $* == *"${FAKE_PIP_FAILS_ON:-nothing}"* ]]; then echo "$FAKE_PIP_SAYS"; exit 1; fi
        if [[ $* == *"${FAKE_PIP_HANGS_ON:-nothing}"* ]]; then exec sleep 600; fi
        ;;
    *torch.json) echo "${FAKE_CUDA_PACKAGES:-0}" ;;
    *importlib.metadata*) exit 1 ;;
    "-m pytest"*) echo "TRITON_INTERPRET=$TRITON_INTERPRET PYTHONPATH=$PYTHONPATH $*" >>"$FAKE_CALLS" ;;
esac
"""


@pytest.fixture
def repo(tmp_path: Path, repo_root: Path) -> Path:
    """A repository with the scripts, the requirements and a Python that installs nothing; its path has a space."""
    copy = tmp_path / "a repository"
    shutil.copytree(repo_root / "requirements", copy / "requirements")
    for name in ("examples/setup_env.sh", "tests/run.sh", "setup.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(repo_root / name, copy / name)
    command(tmp_path, "python3.11", FAKE_PYTHON)
    return copy


def command(tmp_path: Path, name: str, text: str) -> None:
    """Put a program in front of the PATH that `environment` gives."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def environment(repo: Path, **extra: str) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key != "TORCH_INDEX_URL"}
    path = f"{repo.parent / 'bin'}:{os.environ['PATH']}"
    return {**found, "PATH": path, "FAKE_CALLS": str(repo.parent / "calls"), **extra}


def set_up(repo: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    arguments = ["bash", str(repo / "examples/setup_env.sh"), *words]
    return subprocess.run(
        arguments, cwd="/", env=environment(repo, **extra), capture_output=True, text=True, check=False, timeout=60
    )


def pip_calls(repo: Path) -> list[str]:
    path = repo.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_second_set_up_does_nothing_until_the_requirements_change(repo: Path) -> None:
    first = set_up(repo)
    assert first.returncode == 0, first.stderr
    assert "[6/6]" in first.stderr
    assert first.stdout == ""
    calls = pip_calls(repo)
    assert any("torch.txt" in call for call in calls)
    started = time.monotonic()
    second = set_up(repo)
    assert (second.returncode, second.stderr) == (0, "")
    assert time.monotonic() - started < 1
    assert pip_calls(repo) == calls
    with (repo / "requirements/gpu.txt").open("a") as file:
        file.write("# no part of .venv\n")
    assert set_up(repo).stderr == ""
    with (repo / "requirements/test.txt").open("a") as file:
        file.write("# changed\n")
    assert "[6/6]" in set_up(repo).stderr


def test_a_set_up_that_failed_is_not_taken_for_complete(repo: Path) -> None:
    failed = set_up(repo, FAKE_PIP_FAILS_ON="cpu.txt", FAKE_PIP_SAYS="ERROR: No matching distribution found for x==1")
    assert failed.returncode == 1
    assert "set-up failed: pip says: ERROR: No matching distribution found for x==1 (log: " in failed.stderr
    assert set_up(repo).returncode == 0


def test_no_network_is_told_in_one_line_with_the_log(repo: Path) -> None:
    says = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution found"
    failed = set_up(repo, FAKE_PIP_FAILS_ON="torch.txt", FAKE_PIP_SAYS=says)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("set-up failed: no network: pip could not reach its package index (log: ")
    assert says in (repo / ".venv/setup.log").read_text()


@pytest.mark.parametrize("name", ["kernels", "quantize"])
def test_a_variant_is_set_up_when_asked_for_and_where_nothing_else_finds_it(name: str, repo: Path) -> None:
    assert set_up(repo).returncode == 0
    assert not any(f"/{name}" in call for call in pip_calls(repo))
    asked = set_up(repo, name)
    assert asked.returncode == 0
    assert "[1/1]" in asked.stderr
    last = pip_calls(repo)[-1]
    assert "--no-deps --target" in last
    assert last.endswith(f"{repo}/.venv/{name} -r {repo}/requirements/{name}.txt")
    num_calls = len(pip_calls(repo))
    assert set_up(repo, name).stderr == set_up(repo).stderr == ""
    (repo / f"requirements/{name}.txt").write_text("a-package==9.9\n")
    assert set_up(repo).stderr == ""
    assert len(pip_calls(repo)) == num_calls
    failed = set_up(repo, name, FAKE_PIP_FAILS_ON=f"{name}.txt", FAKE_PIP_SAYS="ERROR: No match for a-package==9.9")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "set-up failed: pip says: ERROR: No match for a-package==9.9 (log: " in failed.stderr
    assert "[1/1]" in set_up(repo, name).stderr


def test_both_are_set_up_at_once_and_other_words_are_refused(repo: Path) -> None:
    assert "[7/7] done" in set_up(repo, "kernels").stderr
    refused = set_up(repo, "kernel")
    assert (refused.returncode, refused.stderr) == (
        1,
        "set-up failed: unknown argument: kernel (there are kernels and quantize)\n",
    )


def test_a_variant_is_seen_by_its_own_part_of_the_tests(repo: Path) -> None:
    for part in ("distributed", "kernels", "tools"):
        arguments = ["bash", str(repo / "tests/run.sh"), part]
        env = environment(repo, PYTHONPATH="elsewhere")
        found = subprocess.run(arguments, cwd="/", env=env, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 0, found.stderr
    calls = [call for call in pip_calls(repo) if "-m pytest tests" in call]
    assert calls == [
        "TRITON_INTERPRET= PYTHONPATH=elsewhere -m pytest tests/distributed",
        f"TRITON_INTERPRET=1 PYTHONPATH={repo}/.venv/kernels:elsewhere -m pytest tests/kernels",
        f"TRITON_INTERPRET= PYTHONPATH={repo}/.venv/quantize:elsewhere -m pytest tests/tools",
    ]


def test_a_wrong_python_is_named(repo: Path) -> None:
    command(repo.parent, "python3", '#!/bin/sh\necho "Python 3.9.2"\n')
    failed = set_up(repo, FAKE_VERSION="3 12")
    assert failed.returncode == 1
    assert failed.stderr == (
        "set-up failed: Python 3.11 is needed, but python3.11 is not there and python3 is Python 3.9.2\n"
    )


def test_a_missing_venv_module_names_its_package(repo: Path) -> None:
    failed = set_up(repo, FAKE_ENSUREPIP="1")
    assert failed.returncode == 1
    assert "python3.11-venv" in failed.stderr


def test_too_little_disk_is_told_before_anything_is_installed(repo: Path) -> None:
    command(repo.parent, "df", '#!/bin/sh\nprintf "a b c d\\n/ 9 9 700\\n"\n')
    failed = set_up(repo)
    assert failed.returncode == 1
    assert re.search(r"needs 4096 MiB of disk, but only 700 MiB are free there", failed.stderr)
    assert pip_calls(repo) == []


def test_another_system_than_linux_is_refused(repo: Path) -> None:
    command(repo.parent, "uname", "#!/bin/sh\necho Darwin\n")
    failed = set_up(repo)
    assert (failed.returncode, failed.stderr) == (1, "set-up failed: Linux is needed, but this is Darwin\n")


def test_a_cuda_build_is_announced_and_another_index_is_passed_on(repo: Path) -> None:
    announced = set_up(repo, FAKE_CUDA_PACKAGES="16")
    assert "torch from pip's own index is a CUDA build: it brings 16 NVIDIA packages" in announced.stderr
    (repo / ".venv/setup.stamp").unlink()
    (repo.parent / "calls").unlink()
    chosen = set_up(repo, FAKE_CUDA_PACKAGES="16", TORCH_INDEX_URL="https://example.org/cpu")
    assert "CUDA" not in chosen.stderr
    torch_calls = [
        call for call in pip_calls(repo) if "-r" in call and "/torch.txt -c" in call and "cpu.txt" not in call
    ]
    assert [call.endswith("--no-deps --index-url https://example.org/cpu") for call in torch_calls] == [True]
    [rest] = [call for call in pip_calls(repo) if "/cpu.txt" in call]
    assert f"-r {repo}/requirements/torch.txt" in rest  # and so what torch depends on


def test_two_set_ups_take_turns(repo: Path) -> None:
    scripts = [
        subprocess.Popen(
            ["bash", str(repo / "examples/setup_env.sh")], env=environment(repo), stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    texts = [script.communicate(timeout=60)[1] for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0]
    assert sum("[6/6]" in text for text in texts) == 1


def test_an_interrupted_set_up_ends_pip_and_goes_on_later(repo: Path) -> None:
    script = subprocess.Popen(
        ["bash", str(repo / "examples/setup_env.sh")],
        env=environment(repo, FAKE_PIP_HANGS_ON="cpu.txt"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: any("cpu.txt" in call for call in pip_calls(repo)))
    script.send_signal(signal.SIGINT)
    assert "interrupted" in script.communicate(timeout=20)[1]
    assert script.returncode == 130
    assert processes_in_session(script.pid) == []
    assert set_up(repo).returncode == 0


@pytest.mark.parametrize("reader", ["reads on", "is gone"])
def test_ctrl_c_on_the_tests_ends_processes_that_left_their_session(repo: Path, reader: str) -> None:
    pids = repo.parent / "pids"
    (repo / "examples/setup_env.sh").write_text("exit 0\n")
    (repo / ".venv/bin").mkdir(parents=True)
    (repo / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (repo / ".venv/bin/python").chmod(0o755)
    (repo / "tests/distributed").mkdir()
    (repo / "tests/distributed/test_hangs.py").write_text(
        "import os, pathlib, subprocess, time\n"
        "def test_hangs():\n"
        "    child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"    pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "    time.sleep(600)\n"
    )
    script = subprocess.Popen(
        ["bash", str(repo / "tests/run.sh"), "distributed"], cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"))
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(is_running(pid) for pid in started)
    assert script.stdout is not None
    if reader == "is gone":  # as in `tests/run.sh | tee`, where a terminal's Ctrl-C ends tee
        script.stdout.close()
        script.send_signal(signal.SIGINT)
        script.wait(timeout=30)
    else:
        script.send_signal(signal.SIGINT)
        assert b"interrupted" in script.communicate(timeout=30)[0]
    assert script.returncode == 130
    wait_for(lambda: not any(is_running(pid) for pid in started), timeout_s=2.0)  # killed, perhaps not yet gone


def test_extras_hold_the_pins_of_the_requirement_files(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    monkeypatch.chdir(repo_root)
    spec = importlib.util.spec_from_file_location("package_setup", repo_root / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    extras = given["extras_require"]
    assert set(extras) == {"cpu", "gpu", "quantize", "test"}
    assert set(extras["cpu"]) == {*pins(repo_root, "torch"), *pins(repo_root, "cpu")}
    assert set(extras["gpu"]) == set(pins(repo_root, "gpu"))
    assert set(extras["quantize"]) == set(pins(repo_root, "quantize"))
    assert set(extras["test"]) == set(pins(repo_root, "test"))
    assert "torch==2.13.0" in extras["cpu"]


def test_every_requirement_is_an_exact_version_given_once(repo_root: Path) -> None:
    named: dict[str, str] = {}
    for name in ("torch", "build", "cpu", "cpu-no-deps", "test", "kernels", "quantize", "constraints"):
        for pin in pins(repo_root, name):
            assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9_]+\])?==[0-9][A-Za-z0-9.]*", pin), f"{name}.txt: {pin}"
            package = re.sub(r"[-_.]+", "-", re.split(r"\[|==", pin)[0]).lower()
            assert package not in named, f"{package} is in {named[package]}.txt and {name}.txt"
            named[package] = name


def pins(repo_root: Path, name: str) -> list[str]:
    lines = (repo_root / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
