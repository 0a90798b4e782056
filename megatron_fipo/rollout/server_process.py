"""Start engines: SGLang's arguments, which devices, which address."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.rollout.interface import LOOPBACK, listening_address
from megatron_fipo.rollout.pool import EnginePool, say_on_stderr
from megatron_fipo.rollout.server_launch import ServerStart
from megatron_fipo.rollout.sglang_engine import SGLangEngine
from megatron_fipo.run_config import EngineSettings
from megatron_fipo.weights.architecture import read_architecture
from megatron_fipo.weights.bucket import ENGINE_LOADER
from megatron_fipo.weights.fp8 import check_fp8, engine_arguments

SPARE_TOKENS = 8  # SGLang keeps 6 of its context to itself
_OWN_ARGUMENTS = ("host", "port", "api_key", "model_path", "tp_size", "dtype", "context_length", "random_seed")
# Each opens a way into the engine that the API key does not guard, or unpickles what a request carries.
_UNGUARDED_ARGUMENTS = {
    "enable_custom_logit_processor": "requests may carry no code",
    "grpc_port": "SGLang's gRPC server asks for no API key",
    "grpc_mode": "SGLang's gRPC server asks for no API key",
    "smg_grpc_mode": "SGLang's gRPC server asks for no API key",
}
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
    first_gpu: int = 0,
    first_index: int = 0,
    say: Callable[[str], None] = say_on_stderr,
) -> EnginePool:
    """Start `num_engines` engines on this machine and return at once; `wait_ready` waits for them.

    `longest` is the longest prompt and response together, in tokens. Each engine has `engine.tp_size` GPUs of its own,
    from `first_gpu` on: 0 where engines share the trainer's, the number of this node's ranks where they do not. They
    are called engine-`first_index` and so on, and log to files of these names in `log_dir`. They listen on
    `engine.interface`. `say` is told of engines that fail. Raises ValueError as `start_engine`.
    """
    host = listening_address(engine.interface)
    disaggregated = engine.placement == "disaggregated"
    engines = []
    for index in range(num_engines):
        gpu_arguments = {
            "base_gpu_id": first_gpu + index * engine.tp_size,
            "enable_memory_saver": not disaggregated,  # what lets weights and cache leave the GPU while training
        }
        name = f"engine-{first_index + index}"
        engines.append(
            start_engine(
                model_dir,
                name=name,
                dtype=dtype,
                tp_size=engine.tp_size,
                context_length=longest + SPARE_TOKENS,
                random_seed=random_seed,
                log_path=str(Path(log_dir) / f"{name}.log"),
                start_timeout_s=engine.start_timeout_s,
                request_timeout_s=engine.request_timeout_s,
                server_args={**({} if use_cpu else gpu_arguments), **engine.server_args},
                use_cpu=use_cpu,
                host=host,
                disaggregated=disaggregated,
                fp8=engine.fp8_weights,
            )
        )
    return EnginePool(
        engines,
        max_retries=engine.max_retries,
        max_restarts=engine.max_restarts,
        health_check_interval_s=engine.health_check_interval_s,
        say=say,
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
    host: str = LOOPBACK,
    disaggregated: bool = False,
    fp8: bool = False,
) -> SGLangEngine:
    """Start SGLang on the Hugging Face model in `model_dir` and return at once; `wait_ready()` on the result waits.

    The server listens on a free port of `host`, one of this machine's addresses, under a random API key, writes to
    `log_path` (readable by its owner only) and ends with this process, however that ends. `disaggregated`: weights come
    by broadcast, not through shared memory. `fp8`: it holds block-quantised weights, and none before the first update
    brings them. `server_args` are SGLang's own (`--sglang-*`) and override the defaults.
    Raises ValueError for a model directory that is none and for server_args that are ours to set or would leave the
    engine open.
    """
    architecture, vocab_size = _model_facts(model_dir)
    _refuse(server_args)
    if fp8 and use_cpu:
        raise ValueError("--rollout-fp8 is set, but engines on a CPU hold fp32 or bf16 weights: leave it out")
    loaders = [ENGINE_LOADER, *(server_args.get("custom_weight_loader") or [])]
    arguments: dict[str, Any] = {
        "model_path": model_dir,
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
        "custom_weight_loader": loaders,
        **(_fp8_arguments(model_dir, tp_size, server_args) if fp8 else {}),
    }
    start = ServerStart(
        arguments=arguments,
        host=host,
        tp_size=tp_size,
        architecture=architecture,
        use_cpu=use_cpu,
        log_path=log_path,
    )
    backend: Literal["gloo", "nccl"] = "gloo" if use_cpu else "nccl"
    engine = SGLangEngine.started(
        name,
        start,
        vocab_size=vocab_size,
        seeded=bool(arguments.get("enable_deterministic_inference", False)),
        prefix_cache=not arguments.get("disable_radix_cache", False),
        update_backend=backend if disaggregated else None,
        start_timeout_s=start_timeout_s,
        request_timeout_s=request_timeout_s,
        has_weights=not fp8,
    )
    atexit.register(engine.shutdown)
    return engine


def _refuse(server_args: Mapping[str, Any]) -> None:
    for argument in _OWN_ARGUMENTS:
        if argument in server_args:
            flag = argument.replace("_", "-")
            raise ValueError(f"--sglang-{flag} is {server_args[argument]!r}, but is set by the run itself")
    for argument, reason in _UNGUARDED_ARGUMENTS.items():
        if server_args.get(argument):
            flag = argument.replace("_", "-")
            raise ValueError(f"--sglang-{flag} is {server_args[argument]!r}, but {reason}: leave it out")
    if server_args.get("tokenizer_worker_num", 1) != 1:
        workers = server_args["tokenizer_worker_num"]
        raise ValueError(f"--sglang-tokenizer-worker-num is {workers!r}, but SGLang's API key guards one worker: use 1")


def _fp8_arguments(model_dir: str, tp_size: int, server_args: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine with FP8 weights is started with, beside the user's own overrides of config.json."""
    check_fp8(read_architecture(model_dir), tp_size)
    arguments = engine_arguments()
    of_user = json.loads(server_args.get("json_model_override_args") or "{}")
    of_fp8 = json.loads(arguments["json_model_override_args"])
    return {**arguments, "json_model_override_args": json.dumps({**of_user, **of_fp8})}


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


def _model_facts(model_dir: str) -> tuple[str, int]:
    """The model's class and the size of its vocabulary by its config.json."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--hf-checkpoint is {model_dir!r}, which holds no config.json: a Hugging Face model is wanted"
        )
    try:
        config = json.loads(path.read_text())
        architecture, vocab_size = str(config["architectures"][0]), config["vocab_size"]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} names no architecture or no vocab_size ({error!r})") from error
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"{path}: vocab_size is {vocab_size!r}, not a positive integer")
    return architecture, vocab_size
