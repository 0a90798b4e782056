"""Start an engine: SGLang's arguments, the environment, the process."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.patches.sglang_cpu.plugin import ASKED_FOR
from megatron_fipo.rollout.pool import EnginePool
from megatron_fipo.rollout.sglang_engine import ServerHandle, SGLangEngine
from megatron_fipo.run_config import EngineSettings

SPARE_TOKENS = 8  # SGLang keeps 6 of its context to itself
# What torchrun and srun tell the trainer about its own process group; SGLang would take it for its own.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_")
_OWN_ARGUMENTS = ("host", "port", "api_key", "model_path", "tp_size", "dtype", "context_length", "random_seed")
_MODEL_PACKAGE = "megatron_fipo.patches.sglang_cpu.models"
_MODEL_PACKAGE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_CPU_CACHE_TOKENS = 65536


def start_engines(
    model_dir: str,
    engine: EngineSettings,
    *,
    num_engines: int,
    dtype: Literal["float32", "bfloat16"],
    longest: int,
    random_seed: int,
    log_dir: str,
    use_cpu: bool,
) -> EnginePool:
    """Start `num_engines` engines, each on GPUs of its own, and return at once; `wait_ready` waits for them.

    `longest` is the longest prompt and response together, in tokens; engine i writes to engine-i.log in `log_dir`.
    Raises ValueError as `start_engine`.
    """
    return EnginePool(
        [
            start_engine(
                model_dir,
                name=f"engine-{index}",
                dtype=dtype,
                tp_size=engine.tp_size,
                context_length=longest + SPARE_TOKENS,
                random_seed=random_seed,
                log_path=str(Path(log_dir) / f"engine-{index}.log"),
                start_timeout_s=engine.start_timeout_s,
                request_timeout_s=engine.request_timeout_s,
                server_args={**({} if use_cpu else {"base_gpu_id": index * engine.tp_size}), **engine.server_args},
                use_cpu=use_cpu,
            )
            for index in range(num_engines)
        ]
    )


def start_engine(
    model_dir: str,
    *,
    name: str,
    dtype: Literal["float32", "bfloat16"],
    tp_size: int,
    context_length: int,
    random_seed: int,
    log_path: str,
    start_timeout_s: float,
    request_timeout_s: float,
    server_args: Mapping[str, Any],
    use_cpu: bool,
) -> SGLangEngine:
    """Start SGLang on the Hugging Face model in `model_dir` and return at once; `wait_ready()` on the result waits.

    The server listens on a free port of 127.0.0.1 under a random API key, writes to `log_path` (readable by its owner
    only) and ends with this process, however that ends. `server_args` are SGLang's own (`--sglang-*`) and override
    the defaults. Raises ValueError for a model directory that is none and for server_args that are ours to set.
    """
    architecture = _architecture(model_dir)
    for argument in _OWN_ARGUMENTS:
        if argument in server_args:
            flag = argument.replace("_", "-")
            raise ValueError(f"--sglang-{flag} is {server_args[argument]!r}, but is set by the run itself")
    reservation = _reserve_port()
    port = reservation.getsockname()[1]
    api_key = secrets.token_urlsafe(24)
    arguments: dict[str, Any] = {
        "model_path": model_dir,
        "host": "127.0.0.1",
        "port": port,
        "api_key": api_key,
        "tp_size": tp_size,
        "dtype": dtype,
        "context_length": context_length,
        "random_seed": random_seed,
        "skip_tokenizer_init": True,
        "weight_version": "0",
        "sleep_on_idle": True,
        "log_level_http": "warning",
        "watchdog_timeout": max(300.0, request_timeout_s),
        **(_cpu_arguments(context_length) if use_cpu else {}),
        **server_args,
    }
    with contextlib.ExitStack() as undo:  # what has begun, should the process not start
        undo.enter_context(reservation)
        scratch_dir = tempfile.mkdtemp(prefix="megatron_fipo_engine_")
        undo.callback(shutil.rmtree, scratch_dir, ignore_errors=True)
        process = _spawn(
            arguments, use_cpu, scratch_dir, log_path, _environment(scratch_dir, use_cpu, tp_size, architecture)
        )
        undo.pop_all()
    engine = SGLangEngine(
        name,
        ServerHandle(
            process=process,
            port_reservation=reservation,
            url=f"http://127.0.0.1:{port}",
            api_key=api_key,
            log_path=log_path,
            scratch_dir=scratch_dir,
            tp_size=tp_size,
            seeded=bool(arguments.get("enable_deterministic_inference", False)),
            prefix_cache=not arguments.get("disable_radix_cache", False),
            start_timeout_s=start_timeout_s,
            request_timeout_s=request_timeout_s,
        ),
    )
    atexit.register(engine.shutdown)
    return engine


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a launcher told the trainer about its process group."""
    return {
        key: value
        for key, value in environment.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith(_LAUNCHER_PREFIXES)
    }


def _cpu_arguments(context_length: int) -> dict[str, Any]:
    """SGLang's arguments that a CPU needs or is faster with; the cache is sized by tokens, not by free memory."""
    max_running_requests = 128
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "enable_deterministic_inference": True,  # requests carry seeds
        "mem_fraction_static": 0.8,
        "max_running_requests": max_running_requests,
        "max_total_tokens": max(context_length, min(max_running_requests * context_length, _CPU_CACHE_TOKENS)),
    }


def _environment(scratch_dir: str, use_cpu: bool, tp_size: int, architecture: str) -> dict[str, str]:
    environment = engine_environment(os.environ)
    environment["TMPDIR"] = scratch_dir
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["HF_HUB_OFFLINE"] = "1"
    # The run asks for a few tokens more than it uses, which may be more than the model's own longest context.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    if not use_cpu:
        return environment
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["TORCHDYNAMO_DISABLE"] = "1"
    environment[ASKED_FOR] = "1"
    if tp_size > 1:
        cpus = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cpus[rank % len(cpus)]) for rank in range(tp_size))
    if architecture in _MODEL_PACKAGE_ARCHITECTURES:
        environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = _MODEL_PACKAGE
    return environment


def _spawn(
    arguments: dict[str, Any], use_cpu: bool, scratch_dir: str, log_path: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """The server in a session and process group of its own: Ctrl-C reaches the trainer alone, which then ends it."""
    request = json.dumps({"server_args": arguments, "use_cpu": use_cpu, "scratch_dir": scratch_dir})
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.rollout.server"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    finally:
        os.close(log)
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _reserve_port() -> socket.socket:
    """A socket bound to a free port. It never listens: SO_REUSEADDR lets the server bind the port as well."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation


def _architecture(model_dir: str) -> str:
    """The model's class by its config.json."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--hf-checkpoint is {model_dir!r}, which holds no config.json: a Hugging Face model is wanted"
        )
    try:
        return str(json.loads(path.read_text())["architectures"][0])
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} names no architecture ({error!r})") from error
