"""What one GPU of an inference engine holds: weights, the cache of keys and values, and what SGLang works with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_fipo.weights.architecture import Architecture, hf_shapes
from megatron_fipo.weights.fp8 import is_quantised, quantised_tensors

MIB = 2**20
GIB = 2**30
_VOCABULARY_MULTIPLE = 64  # SGLang pads the embedding's rows
# SGLang 0.5.23's own estimates (srt/arg_groups/memory_hook.py): GPUs below so many GiB, tokens of one prefill, batch of
# the largest decode graph below and from 4 tensor-parallel ranks
_BY_CAPACITY = (
    (20, 2048, 8, 8),
    (35, 4096, 48, 160),
    (60, 4096, 32, 160),
    (160, 8192, 256, 512),
    (math.inf, 16384, 512, 512),
)


@dataclass(frozen=True)
class Engine:
    """An engine's model and what it is told. `fraction` is --sglang-mem-fraction-static, None: SGLang's own choice."""

    arch: Architecture
    tp: int
    dtype_bytes: int
    is_fp8: bool
    cache_bytes: float  # of one number in the cache
    fraction: float | None
    max_total_tokens: int | None
    longest: int  # tokens of the longest prompt and response
    on_cpu: bool = False


@dataclass(frozen=True)
class EngineBytes:
    """On one GPU of an engine."""

    weights: int
    cache: int
    runtime: int  # activations and CUDA graphs, by SGLang's own estimate
    cache_tokens: int
    fraction: float  # --sglang-mem-fraction-static, given or chosen by SGLang


def engine_bytes(engine: Engine, free_bytes: int, gpu_bytes: int) -> EngineBytes:
    """With `free_bytes` free of a GPU of `gpu_bytes` when the engine starts, as mem_fraction_static counts."""
    weights = weight_bytes(engine)
    runtime = 0 if engine.on_cpu else _runtime_bytes(engine, gpu_bytes)
    fraction = engine.fraction if engine.fraction is not None else max(0.0, 1 - runtime / gpu_bytes)
    tokens = max(0, int((free_bytes * fraction - weights) // token_bytes(engine)))
    if engine.max_total_tokens is not None:
        tokens = engine.max_total_tokens if engine.on_cpu else min(tokens, engine.max_total_tokens)
    return EngineBytes(weights, tokens * token_bytes(engine), runtime, tokens, fraction)


def token_bytes(engine: Engine) -> int:
    """Of one token in one GPU's cache: key and value of every layer; heads are repeated where there are more ranks."""
    heads = max(1, engine.arch.num_query_groups // engine.tp)
    return round(2 * heads * engine.arch.kv_channels * engine.arch.num_layers * engine.cache_bytes)


def weight_bytes(engine: Engine) -> int:
    """Of one GPU. Norms and routers are on every rank, key-value heads on several where there are more ranks than
    heads."""
    arch, tp, total = engine.arch, engine.tp, 0
    copies = max(1, tp // arch.num_query_groups)  # of each key-value head
    for name, unpadded in hf_shapes(replace(arch, num_layers=1)).items():
        is_vocabulary = "embed_tokens" in name or name.startswith("lm_head")
        multiple = _VOCABULARY_MULTIPLE if is_vocabulary else 1
        shape = (-(-unpadded[0] // multiple) * multiple, *unpadded[1:])
        if engine.is_fp8 and is_quantised(name):
            size = sum(math.prod(part) * dtype.itemsize for _, part, dtype in quantised_tensors(name, shape))
        else:
            size = math.prod(shape) * engine.dtype_bytes
        is_whole = "norm" in name or ".gate.weight" in name
        times = copies if ".k_proj." in name or ".v_proj." in name else 1
        size = size if is_whole else size * times // tp
        total += size * (arch.num_layers if ".layers." in name else 1)
    return total


def _runtime_bytes(engine: Engine, gpu_bytes: int) -> int:
    """What SGLang keeps out of its static memory when it chooses the fraction itself."""
    _, prefill, few, many = next(row for row in _BY_CAPACITY if gpu_bytes < row[0] * GIB)
    mib = 512 + 1.5 * prefill + engine.tp / 8 * 1024 + 2 * (few if engine.tp < 4 else many)
    if gpu_bytes > 60 * GIB:
        mib = max(mib, 10 * 1024)
    return round(mib * MIB)
