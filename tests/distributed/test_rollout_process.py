"""Starting and ending an engine's process, as far as it goes without an engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import Qwen3Config

from megatron_fipo.patches.sglang_cpu.plugin import ASKED_FOR
from megatron_fipo.rollout.log_tail import log_tail
from megatron_fipo.rollout.process_group import group_members, stop_process_group
from megatron_fipo.rollout.server_launch import ServerStart, server_environment, without_launcher
from megatron_fipo.rollout.server_process import _fp8_arguments, start_engine

SETTINGS: dict[str, Any] = {
    "name": "e0",
    "dtype": "float32",
    "tp_size": 1,
    "context_length": 64,
    "random_seed": 0,
    "start_timeout_s": 5,
    "request_timeout_s": 5,
    "use_cpu": True,
}
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 100})


def test_what_a_launcher_said_about_the_trainer_does_not_reach_the_engine() -> None:
    environment = {"RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "PET_NNODES": "1", "PATH": "/bin"}
    assert without_launcher(environment) == {"PATH": "/bin"}


def environment_of(*, use_cpu: bool = True, host: str = "127.0.0.1") -> dict[str, str]:
    start = ServerStart({}, host, tp_size=1, architecture="LlamaForCausalLM", use_cpu=use_cpu, log_path="log")
    return server_environment(start, "scratch")


def test_only_an_engine_on_the_cpu_asks_for_our_platform() -> None:
    assert environment_of()[ASKED_FOR] == "1"
    assert ASKED_FOR not in environment_of(use_cpu=False)


def test_what_the_trainer_says_of_its_network_does_not_open_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    environment = environment_of()
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["FORWARDED_ALLOW_IPS"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("enable_custom_logit_processor", True), ("tokenizer_worker_num", 2), ("grpc_port", 5000), ("grpc_mode", True)],
)
def test_an_argument_that_would_leave_the_engine_open_is_refused(tmp_path: Path, argument: str, value: object) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(ValueError, match=f"--sglang-{argument.replace('_', '-')} is {value}"):
        start_engine(str(tmp_path), log_path=str(tmp_path / "log"), server_args={argument: value}, **SETTINGS)


def test_a_directory_without_a_model_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with pytest.raises(ValueError, match=r"--hf-checkpoint is .*holds no config.json"):
        start_engine(str(tmp_path), log_path=log, server_args={}, **SETTINGS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no architecture"):
        start_engine(str(tmp_path), log_path=log, server_args={}, **SETTINGS)
    (tmp_path / "config.json").write_text(CONFIG.replace("100", "-1"))
    with pytest.raises(ValueError, match="vocab_size is -1, not a positive integer"):
        start_engine(str(tmp_path), log_path=log, server_args={}, **SETTINGS)
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(ValueError, match="--sglang-api-key is 'x', but is set by the run itself"):
        start_engine(str(tmp_path), log_path=log, server_args={"api_key": "x"}, **SETTINGS)


def test_fp8_weights_are_for_gpus_and_need_an_update_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(ValueError, match="--rollout-fp8 is set, but engines on a CPU"):
        start_engine(str(tmp_path), log_path=str(tmp_path / "log"), server_args={}, fp8=True, **SETTINGS)
    config = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256}
    Qwen3Config(**config, head_dim=128, num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(
        tmp_path
    )
    arguments = _fp8_arguments(str(tmp_path), 2, {"json_model_override_args": '{"rope_theta": 1}'})
    assert arguments["load_format"] == "dummy"
    override = json.loads(arguments["json_model_override_args"])
    assert override["rope_theta"] == 1
    assert override["quantization_config"]["weight_block_size"] == [128, 128]
    with pytest.raises(ValueError, match="--rollout-fp8"):
        _fp8_arguments(str(tmp_path), 4, {})


@pytest.mark.parametrize("failure", ["no log", "no process", "it dies at once"])
def test_an_engine_that_cannot_be_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    log, server_args = tmp_path / "log", {}
    if failure == "no log":
        log.mkdir()
    elif failure == "no process":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    else:  # and has read nothing: the arguments do not fit its pipe
        monkeypatch.setattr(sys, "executable", shutil.which("true"))
        server_args = {"long": "x" * (1 << 20)}
    process = psutil.Process()
    before = process.children(), process.net_connections()
    with pytest.raises(OSError, match=r"Is a directory|No such file|Broken pipe"):
        start_engine(str(tmp_path), log_path=str(log), server_args=server_args, **SETTINGS)
    assert list(scratch.iterdir()) == []
    assert (process.children(), process.net_connections()) == before


def test_the_log_tail_names_the_exception_and_shows_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert "does not exist" in log_tail(log)
    log.write_text("")
    assert "is empty" in log_tail(log)
    lines = [f"line {index}" for index in range(100)]
    log.write_text("\n".join([*lines, "torch.OutOfMemoryError: no more", "the end"]))
    tail = log_tail(log)
    assert "last exception in its log: torch.OutOfMemoryError: no more\n" in tail
    assert tail.endswith("    torch.OutOfMemoryError: no more\n    the end")
    assert "line 99" in tail
    assert "line 50" not in tail
    start = log.stat().st_size
    assert "is empty" in log_tail(log, start)
    log.write_text(log.read_text() + "started again\n")
    assert log_tail(log, start) == f"\nlast lines of {log}:\n    started again"


def test_stopping_a_group_ends_its_children_and_removes_its_scratch(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "file").write_text("x")
    child = "import time; time.sleep(99)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); {child}"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 20
    while len(group_members(leader.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(group_members(leader.pid)) == 2
    stop_process_group(leader.pid, str(scratch))
    leader.wait()
    assert group_members(leader.pid) == []
    assert not scratch.exists()


def test_stopping_a_group_removes_the_segments_it_goes_on_making(tmp_path: Path) -> None:
    code = (
        "import mmap, os, sys\n"
        "for number in range(100000):\n"
        "    name = f'/dev/shm/sglang_loads_{sys.argv[1]}_{number}'\n"
        "    file = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)\n"
        "    os.ftruncate(file, 4096)\n"
        "    kept = mmap.mmap(file, 4096)\n"
        "    if number: os.unlink(last); os.close(before)\n"
        "    before, last = file, name\n"
    )
    for attempt in range(3):
        mark = f"test{os.getpid()}x{attempt}"
        maker = subprocess.Popen([sys.executable, "-c", code, mark], start_new_session=True)
        deadline = time.monotonic() + 20
        while not list(Path("/dev/shm").glob(f"sglang_loads_{mark}_*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        stop_process_group(maker.pid, str(tmp_path / "none"))
        maker.wait()
        assert list(Path("/dev/shm").glob(f"sglang_loads_{mark}_*")) == []


def test_the_server_ends_when_its_input_does(tmp_path: Path) -> None:
    server = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.rollout.server"],
        input=b"no whole line",
        capture_output=True,
        check=False,
        env=dict(os.environ),
        timeout=60,
    )
    assert server.returncode != 0
    assert b"stdin ended before a whole line" in server.stderr
